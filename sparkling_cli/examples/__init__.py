"""Runs to try things on: `train` is a small one, with the Trainer's checkpoints."""
