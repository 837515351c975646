"""What each command found, as one pydantic model: its JSON, its schema, and what every renderer takes.

``measured`` activations, weights, symmetry (``inspect``), ``plan`` and ``expansion`` what ``expand`` will do
and what it did, ``commands`` the other commands and the table of all documents, ``verdict`` what measurements
mean in plain words, ``evidence`` what our own measurements say to a run, ``numbers`` how numbers are written
for people.
"""
