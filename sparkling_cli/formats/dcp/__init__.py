"""``torch.distributed.checkpoint`` directories, read and written without a process group.

``metadata`` the pickle that names everything, ``names`` who is who, ``items`` the archives inside
``.distcp`` files, ``read`` and ``write`` the two directions, ``format`` the variants; ``megatron`` and
``buckets`` what only Megatron's directories have, ``lingua`` what only lingua's.
"""

from sparkling_cli.formats.dcp.format import DcpFormat

__all__ = ["DcpFormat"]
