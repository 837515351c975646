"""What is on disk: names, shapes, dtypes and where the bytes are. No tensor byte is read here.

One module or folder per format, all registered in ``detect``. What they share: ``model`` the types,
``directory`` the files of a folder, ``torchfile`` and ``safetensors`` files of tensors, ``statedict`` what is
in a torch file and ``statefiles`` in several, ``weightfiles`` the weights of a model directory,
``optimizer_states`` the names of optimizer state, ``quantized_states`` which pieces make up a quantized one,
``muon`` how far its variants step by shape, ``numbered_states`` which parameter state belongs to,
``trainer_facts`` what the Trainer's other files say, ``other_files`` what lies in files that no format reads.
"""
