"""Runs to try things on: `train` is a small one, with checkpoints; `upcycle` makes it a mixture."""
