"""What the dims of every tensor mean, in one small language (see ``docs/reference/layout-language.md``).

``expr`` the terms, ``parse`` text to terms, ``model`` a whole model's layout, ``geometry`` what widening
does to one tensor, ``regions`` which entries were born when, ``file`` the TOML form.
"""
