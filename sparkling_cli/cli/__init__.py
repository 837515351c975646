"""The command line: thin commands that parse, call the API and render.

``app`` registers the commands, ``options`` defines every option, ``console`` is the one output sink, one
module per command.
"""
