"""What people see of an expansion: one HTML page, plots, sparklines, a model card section.

``model`` the facts (also ``report.json``), ``verdict`` what they mean in plain words, ``html`` with
``page.css``, ``charts``, ``drawing`` and ``svg`` the page, ``plots`` pictures by matplotlib, ``spark``
lines for the terminal, ``card`` the section for a README.
"""
