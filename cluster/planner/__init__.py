"""How one model is laid out over the ranks of a cluster: pure arithmetic, before anything is started."""
