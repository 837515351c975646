"""The frozen plan: everything that will be done, known and checked before a byte is written.

``model`` the types, ``resolve`` spec against layout: which axis grows to what, ``build`` the rows.
"""
