"""The `manta` command. Modules in here import nothing heavy when they are loaded: `--help` must answer at once."""
