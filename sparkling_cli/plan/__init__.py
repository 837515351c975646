"""The frozen plan: everything that will be done, known and checked before a byte is written.

``model`` the types, ``resolve`` spec against layout: which axis grows to what, ``naming`` the output's
names, ``build`` the rows, ``config`` the config, ``deepen`` more layers and experts that have names of their
own; ``state_names`` and ``measure`` of what kind state is, ``quantized`` that in blocks, ``account`` that no
tensor was overlooked, ``state_checks`` and ``symmetry`` what could go wrong, ``advice`` what a user should
know of it, and ``steps`` of how far old entries will step.
"""
