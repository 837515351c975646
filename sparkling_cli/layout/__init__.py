"""What the dims of every tensor mean, in one small language (see ``docs/reference/layout-language.md``).

``expr`` the terms, ``parse`` text to terms, ``names`` templates of tensor names, ``model`` a whole model's
layout, ``file`` the TOML form, ``keys`` the way to a value in a config, ``regions`` which entries were born
when. Files with sizes left open: ``packaged`` which one fits, ``presence`` what of it is about a checkpoint,
``solve`` the sizes from shapes.
"""
