"""Where keys and values live: page accounting in pure Python, the tensors in one file."""
