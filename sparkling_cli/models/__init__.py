"""Layouts found by asking the model's own code, and proved by its logits.

``skeleton`` builds models, ``shrink`` makes a tiny config with every kind of layer, ``sizes`` says what a
config key probably sizes, ``axes`` measures which key moves which dim, ``terms`` and ``families`` form
hypotheses, ``parity`` and ``search`` decide between them, ``prove`` goes through all axes, ``labels`` tells
linear parts from others, ``disk`` reads off the names on disk, ``real_layout`` carries the result over to the
real model; ``infer`` is the entrance. ``expected`` asks a class for the tensors that an output must have.
"""
