"""What widening does to a tensor: its view, the arithmetic on pieces and on whole tensors, random fills.

Pure functions of arrays and numbers; nothing here knows a file or a format. ``reference`` is all of it
once more, written out index by index: what proofs are made with.
"""
