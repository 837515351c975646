"""Proofs from files: an output against what was asked for, and against the checkpoint it came from.

Nothing here uses the plan or the engine's arithmetic: ``rules`` works out from spec, layout and sizes
what every tensor must be, ``widening.reference`` what every entry of it, and ``compare`` reads the bytes,
so that one fault cannot hide in both. ``files`` finds files too many or too few, ``public`` opens them by
the libraries that trainers use, ``account`` looks for tensors that were lost or stayed narrow, ``later``
tells what was trained on since from what is damaged; ``prove`` is the entrance.
"""

from sparkling_cli.results.commands import Verification
from sparkling_cli.verification.prove import verify

__all__ = ["Verification", "verify"]
