"""Proof by training: what every way of widening gains (``python -m benchmarks.train``)."""
