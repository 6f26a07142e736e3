"""Weights in fewer bits: what they are, how they are made from full ones, and the checkpoint formats that hold them."""
