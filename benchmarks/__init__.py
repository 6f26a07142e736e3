"""Workloads, random-weight models and side-by-side runs. Every number printed in here comes from a run."""

# Before any module here imports torch: every contender is to run with bounded spinning, ours and theirs alike.
import engine  # noqa: F401
