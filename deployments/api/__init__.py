"""The OpenAI-compatible HTTP API over a `Backend`. Knows no Ray: whatever makes the tokens is behind that protocol."""
