"""What is on disk: names, shapes, dtypes and where the bytes are. No tensor byte is read here.

One module or folder per format, all registered in ``detect``. What they share: ``model`` the types,
``statedict`` state dicts in ``torchfile`` files, ``weightfiles`` the weights of a directory,
``optimizer_states`` the names of optimizer state, ``numbered_states`` which parameter it belongs to,
``further`` what lies in files that no format reads.
"""
