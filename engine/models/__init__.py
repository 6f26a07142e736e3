"""What models are and how they are loaded: one spec, one decoder, a small mapping per family."""
