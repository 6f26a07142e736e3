"""One model over several ranks: who holds which part of every parameter."""
