"""What people see of an expansion: one HTML page, tables, plots, sparklines, a model card section.

All of it takes results (``results``). ``facts`` and ``plan`` make them from a plan and what was measured;
``page`` with ``page.html.jinja`` and ``page.css``, ``figures``, ``charts``, ``tensor_blocks`` and ``svg``
make the page; ``plots`` pictures by matplotlib; ``terminal`` and ``sparkline`` what the terminal shows,
``wrap`` where lines of messages end; ``model_card`` the section for a README. A new line is a fact in
``facts`` and its words in the template.
"""
