"""Carry a plan out: stream every row from the source's extents into the output's.

``stream`` the order of events; ``job`` the tasks; ``pool`` and ``worker`` who does them, ``bundle`` many
small ones at once; ``ranks`` and ``distributed`` several processes; ``output_files`` files before and after
their tensors; ``journal`` what a killed run had finished; ``source_state`` whether the source has changed;
``disk_space``, ``flush`` and ``signals`` what the machine has to say; ``commit`` all or nothing.
"""
