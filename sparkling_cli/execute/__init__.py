"""Carry a plan out: stream every row from the source's extents into the output's.

``memory`` the arithmetic on whole tensors (small models, proofs), ``kernel`` the same piece by piece,
``fill`` random entries, ``stream`` the loop over rows, ``commit`` all or nothing.
"""
