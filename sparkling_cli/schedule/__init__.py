"""The re-warmup as data.

``curves`` the equations, ``baseline`` what the trainer was doing, ``rewarmup`` the expansions' stages,
``plan`` what of a plan depends on it, ``write`` the files ``sparkling/rewarmup.json`` and ``rewarmup.csv``.
"""
