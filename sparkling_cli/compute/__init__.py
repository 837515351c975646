"""Parameters, active parameters and FLOPs, from a layout and axis sizes alone.

``shape`` counts parameters, ``flops`` compares training progressively with training from scratch,
``quantity`` reads and writes numbers such as ``200B``.
"""
