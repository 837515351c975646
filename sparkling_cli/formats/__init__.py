"""What is on disk: names, shapes, dtypes and where the bytes are. No tensor byte is read here.

``model`` the types that all formats share, ``detect`` which format a path is, ``formats`` one module or
folder per format, ``optimizer`` which state belongs to which parameter.
"""
