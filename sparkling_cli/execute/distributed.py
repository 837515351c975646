"""Several processes, maybe on several hosts, carry out one plan (``torchrun -m sparkling_cli expand``).

Every rank makes the same plan, takes tasks until none is left, and writes its pieces into the same
files; rank 0 makes and seals the files and lets the output appear. The file system must be shared. All
talking is done by torch.distributed (gloo, objects only; no tensor data goes over the network), and tasks
are taken one by one from a counter in its key-value store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from sparkling_cli import errors
from sparkling_cli.errors import OutputError, SparklingError
from sparkling_cli.execute.ranks import Team

T = TypeVar("T")

#: a rank that works is not late; one that dies is noticed by its closed connection, at once
_TIMEOUT = timedelta(days=7)
#: to reach rank 0 for the first time
_PATIENCE = timedelta(minutes=5)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def team_of_processes() -> Iterator[Team | None]:
    """The team that torchrun started this process in; None outside torchrun or with one process."""
    if any(name not in os.environ for name in _LAUNCHED) or int(os.environ["WORLD_SIZE"]) < 2:
        yield None
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield Processes(group)
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


class Processes(Team):
    """A team of several ranks.

    Args:
        group: a gloo process group.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"
        self._counters = 0
        self._store = self._shared_store()

    def _shared_store(self) -> Any:
        """A store on rank 0's host, on a port of its own: the process group may not be ours."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined] # documented, but not exported

        host = os.environ["MASTER_ADDR"]

        def make(port: int) -> Any:
            return TCPStore(host, port, is_master=self.rank == 0, wait_for_workers=False, timeout=_PATIENCE)

        made: list[Any] = []

        def begin() -> int:
            made.append(make(0))
            port: int = made[0].port
            return port

        port = self.lead(begin)
        try:
            return made[0] if made else make(port)
        except RuntimeError as error:
            raise OutputError(
                f"rank {self.rank} cannot reach rank 0 at {host}:{port}",
                hint="ports that the system chooses must be open between the machines, as gloo needs too",
            ) from error

    def step(self, work: Callable[[], T]) -> list[T]:
        """See :class:`Team`."""
        import torch.distributed as dist

        kept: Exception | None = None
        mine: tuple[str, Any]
        try:
            mine = "done", work()
        except Exception as error:
            kept, mine = error, ("raised", _packed(error))
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:
            if kept is not None:
                raise kept from error
            raise _gone(error) from error
        for rank, (kind, value) in enumerate(found):
            if kind == "raised":
                raise kept if rank == self.rank and kept is not None else _unpacked(value, rank)
        return [value for _, value in found]

    def numbers(self) -> Callable[[], int]:
        """See :class:`Team`."""
        key = f"counter {self._counters}"
        self._counters += 1

        def take() -> int:
            try:
                given: int = self._store.add(key, 1)
            except RuntimeError as error:
                raise _gone(error) from error
            return given - 1

        return take


def _gone(error: RuntimeError) -> OutputError:
    return OutputError(
        f"another rank is gone: {str(error).splitlines()[0]}",
        hint="no output was made; see that rank's own message, and run the command again",
    )


def _packed(error: Exception) -> tuple[str, Any]:
    """An exception as plain data."""
    if isinstance(error, SparklingError):
        return type(error).__name__, (error.message, error.hint)
    if isinstance(error, OSError):
        return "OSError", (error.errno, error.strerror, error.filename)
    return "", f"{type(error).__name__}: {error}"


def _unpacked(packed: tuple[str, Any], rank: int) -> Exception:
    name, value = packed
    if name == "OSError":
        return OSError(*value)
    if name and hasattr(errors, name):
        kind: type[SparklingError] = getattr(errors, name)
        return kind(f"rank {rank}: {value[0]}", hint=value[1])
    return RuntimeError(f"rank {rank}: {value}")
