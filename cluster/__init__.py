"""Where things run: shards of one model over many nodes. Empty until a model needs more than one process."""
