"""Mirrors the tree. Each test asserts what a user would care about; nothing is downloaded."""

# Before any test imports torch: the engine bounds how long arithmetic threads spin, which a busy machine needs.
import engine  # noqa: F401
