"""The cycle collector set aside while many small objects are made: it would walk them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def _collector(*, on: bool) -> Iterator[None]:
    was_on = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if was_on else gc.disable)()


#: No garbage collection inside; as it was afterwards.
collector_paused = partial(_collector, on=False)
#: Garbage collection inside a pause: for code that builds models, whose cycles hold tensors.
collector_running = partial(_collector, on=True)
