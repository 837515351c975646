"""Widen a language model in the middle of pre-training, optimizer state included."""

from __future__ import annotations

__version__ = "0.1.0"
