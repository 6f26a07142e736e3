"""Workloads, random-weight models and side-by-side runs. Every number printed in here comes from a run."""
