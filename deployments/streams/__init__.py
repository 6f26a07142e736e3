"""Streamed answers that outlive the gateway they began at: what is kept of each, where, and whose it is."""
