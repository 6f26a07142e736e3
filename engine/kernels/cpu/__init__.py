"""The operators in C: compiled at first use, recorded into one program, run with one call a step."""
