"""Side by side with other engines, each in its own process and environment: same model, workload and threads."""
