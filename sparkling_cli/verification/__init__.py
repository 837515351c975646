"""Proofs from files: an output against its own manifest, and against the checkpoint it came from.

Nothing here uses the engine's arithmetic (``execute.kernel``): what a tensor must be is worked out anew,
from index tables, so that one fault cannot hide in both.
"""

from sparkling_cli.results.commands import Verification
from sparkling_cli.verification.prove import verify

__all__ = ["Verification", "verify"]
