"""Torch zip files without ``torch.load``: read as inert trees, written back with other tensor shapes.

``archive`` the zip container, ``opcodes`` and ``unpickle`` the pickle, ``objects`` what it is read into,
``file`` reading, ``layout`` with ``repickle`` and ``writer`` the way back, ``new_file`` files from nothing,
``more`` a file with further weights and parameters.
"""

from sparkling_cli.formats.torchfile.file import (
    TorchFile,
    TreePath,
    called,
    read_attributes,
    read_torch_file,
    read_values,
)
from sparkling_cli.formats.torchfile.layout import REMOVED, lay_out
from sparkling_cli.formats.torchfile.more import Holder, More
from sparkling_cli.formats.torchfile.new_file import lay_out_state_dict, lay_out_tensor
from sparkling_cli.formats.torchfile.objects import ATTRIBUTES, Call, Ordered, TensorNode, at, plain
from sparkling_cli.formats.torchfile.subclass import INSIDE, is_packed, is_subclass, resized

__all__ = [
    "ATTRIBUTES",
    "INSIDE",
    "REMOVED",
    "Call",
    "Holder",
    "More",
    "Ordered",
    "TensorNode",
    "TorchFile",
    "TreePath",
    "at",
    "called",
    "is_packed",
    "is_subclass",
    "lay_out",
    "lay_out_state_dict",
    "lay_out_tensor",
    "plain",
    "read_attributes",
    "read_torch_file",
    "read_values",
    "resized",
]
