"""What runs inside an engine's own environment: one module each, over `wire`. Imports nothing of this project but the
engine under test, so that it runs where the project is not installed."""
