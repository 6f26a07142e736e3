"""Where things run, beyond one replica: the hosts that keep KV pages on every node."""
