"""Measurements of checkpoints: weights, optimizer state, activations, symmetry."""
