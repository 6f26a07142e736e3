"""Pages of the KV cache outside the device: in the memory of a node, then on its disk, by content."""
