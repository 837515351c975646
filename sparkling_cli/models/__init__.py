"""Layouts found by asking the model's own code, and proved by its logits.

``skeleton`` builds models, ``shrink`` makes a tiny config with every kind of layer, ``axes`` measures
which config key moves which dim, ``terms`` and ``families`` form hypotheses, ``proof`` and ``search``
decide between them, ``labels`` tells linear parts from others, ``disk`` reads off the names on disk,
``realize`` carries the result over to the real model; ``infer`` is the entrance. ``expected`` asks a
class for the tensors that an output must have.
"""
