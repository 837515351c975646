"""What people see of an expansion: one HTML page, tables, plots, sparklines, a model card section.

All of it takes results (``results``). ``plan`` and ``assemble`` make them from a plan and what was
measured; ``page`` with ``page.html.jinja`` and ``page.css``, ``figures``, ``charts``, ``drawing`` and
``svg`` the page; ``plots`` pictures by matplotlib; ``tables`` and ``spark`` the terminal; ``card`` the
section for a README.
"""
