"""What the cluster reports about itself. Imports the engine's plain result types and nothing else of the project."""
