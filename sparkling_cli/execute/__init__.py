"""Carry a plan out: stream every row from the source's extents into the output's.

``job`` the tasks, ``pool`` and ``worker`` who does them, ``stream`` the order of events, ``commit`` all or
nothing.
"""
