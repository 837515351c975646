"""What the user wants: the expansion spec and where it may come from.

``choices`` the values that fields choose from, ``model`` the frozen schema, ``options`` its fields as
options, ``quantities`` sizes, ``sources`` options and YAML/TOML/JSON files. Nothing is imported here:
``--help`` needs ``choices`` alone.
"""
