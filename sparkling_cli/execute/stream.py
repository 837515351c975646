"""Carry a plan out: read, compute and write piece by piece, then let the output appear.

Order of events: the place is checked and taken (``commit.Staging``), files are allocated, standard
deviations of random tensors are measured, tasks are done by a few threads (on every rank), files are
sealed with their checksums, small files added, all is synced and opened once more, and one rename makes
it the output. Whatever goes wrong before that leaves no output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from sparkling_cli.errors import CheckpointError, OutputError
from sparkling_cli.execute import output_files, signals
from sparkling_cli.execute.commit import Staging, sync, write_new
from sparkling_cli.execute.disk_space import check_room, disk_error
from sparkling_cli.execute.flush import Flusher
from sparkling_cli.execute.job import Job, PartResult, make_job
from sparkling_cli.execute.journal import Journal, fingerprint, read_journals
from sparkling_cli.execute.output_files import digests_text
from sparkling_cli.execute.pool import Pool
from sparkling_cli.execute.ranks import Team
from sparkling_cli.execute.source_state import source_paths, source_state
from sparkling_cli.plan.model import Expansion, Plan
from sparkling_cli.storage.byte_ranges import Handles
from sparkling_cli.storage.crc import FileDigest, Span, whole
from sparkling_cli.storage.sidecar import DIGESTS, FOLDER
from sparkling_cli.storage.threads import processors


@dataclass(frozen=True)
class Written:
    """What was read and written.

    Attributes:
        tensors: output key -> CRC-32 of the tensor's bytes, row-major.
        sources: output key -> CRC-32 of its source's bytes; without tensors that become zero.
        files: every output file with tensors in it or around it, carried ones included.
        root: where the output lies until it appears; small files may be made by reading it there.
    """

    tensors: Mapping[str, int]
    sources: Mapping[str, int]
    files: Mapping[str, FileDigest]
    root: Path | None = None


@dataclass
class _Run:
    """One execution: what its steps share.

    ``resumed`` has the tasks that a killed run had finished; None where all files are new.
    """

    job: Job
    fingerprint: str
    staging: Staging
    team: Team
    memory: int
    threads: int
    progress: Callable[[int], None]
    resumed: Mapping[int, list[PartResult]] | None = None


def execute(
    expansion: Expansion,
    *,
    memory: int = 1 << 30,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    sidecar: Callable[[Written], Mapping[str, bytes]],
    check: Callable[[Path], None] | None = None,
    team: Team | None = None,
) -> Written:
    """Make the output of an expansion at its destination, wholly or not at all.

    Args:
        expansion: what to do; nothing may exist at its destination, and the source must still be in the state
            that it was in when it was opened.
        memory: bytes that pieces in flight may take; decides the number of threads where it is small. A
            larger output is not kept in the page cache.
        threads: worker threads; by default one per core, at most four.
        progress: called with the bytes written since the last call.
        sidecar: called when all tensor data is written; gives the remaining small files, paths beginning
            with ``sparkling/``.
        check: called with the finished output before it appears; raises if it cannot be opened.
        team: the ranks to work with.

    Raises:
        OutputError: the output cannot be written there, or the disk is full or failing.
        CheckpointError: the source is damaged or changed, or has NaN or Inf entries.
        Interrupted: Ctrl-C or SIGTERM.
    """
    team = team or Team()
    with signals.interrupts(expansion.destination) as raised, _one_torch_thread(expansion.plan):
        run = _begin(expansion, team, memory, threads, progress)
        raised.discard = run.staging.discard
        try:
            run.resumed = team.lead(lambda: _prepare(run))
            return _carry_out(run, sidecar, check, raised, expansion.source_state)
        except OSError as error:
            raise disk_error(error, run.job, run.staging) from error
        except KeyboardInterrupt as error:
            raise raised.error() from error
        finally:
            run.staging.discard()


def _begin(
    expansion: Expansion,
    team: Team,
    memory: int,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> _Run:
    """Check everything that can be checked without touching the disk's contents."""
    plan, files = expansion.plan, expansion.files
    job = make_job(plan, files)
    for path in (*(file.path for file in files), *plan.source.carried):
        _check_path(path)
    is_file = any(file.path == "" for file in files)
    staged: list[Staging] = []
    team.step(lambda: staged.append(Staging(plan.source.root, expansion.destination, is_file=is_file)))
    marks = team.step(lambda: fingerprint(job))
    if len(set(marks)) > 1:
        raise OutputError(
            "the ranks were given different plans", hint="start all with the same command and files"
        )
    count = _threads(threads, memory)
    return _Run(job, marks[0], staged[0], team, memory, count, progress or (lambda _: None))


def _prepare(run: _Run) -> Mapping[int, list[PartResult]] | None:
    """Take the folder and allocate files, or go on with what a killed run left: see :class:`_Run`."""
    if run.staging.begin(run.fingerprint):
        if _complete(run):
            return read_journals(run.staging.journals())
        run.staging.restart(run.fingerprint)
    check_room(run.job, run.staging)
    if not run.staging.is_file:
        run.staging.data.mkdir()
    for file in run.job.files:
        output_files.allocate(_under(run.staging.data, file.path), file.size)
    return None


def _complete(run: _Run) -> bool:
    """All files that tasks write into are there, in full length, and nothing else is."""
    expected = {file.path: file.size for file in run.job.files}
    for path, size in expected.items():
        target = _under(run.staging.data, path)
        if target.is_symlink() or not target.is_file() or target.stat().st_size != size:
            return False
    if not run.staging.is_file:
        for entry in run.staging.data.rglob("*"):
            if entry.is_file() and entry.relative_to(run.staging.data).as_posix() not in expected:
                entry.unlink()  # a carried or small file: made again
    return True


def _carry_out(
    run: _Run,
    sidecar: Callable[[Written], Mapping[str, bytes]],
    check: Callable[[Path], None] | None,
    raised: signals.Raised,
    state: Mapping[str, tuple[int, int, int]],
) -> Written:
    job, team = run.job, run.team
    before = state or source_state(job.plan.source.root, source_paths(job.plan))
    _refuse_changed(job.plan.source.root, before)
    filled = [
        _under(run.staging.data, file.path) for file in job.files if file.tensors and team.first_on_host
    ]

    def finish(results: list[PartResult], sealed: Collection[tuple[str, int]]) -> Written:
        _refuse_changed(job.plan.source.root, before)
        _refuse_nonfinite(job, results)
        written = _finish(run, results, sealed)
        _refuse_changed(job.plan.source.root, before)  # what is carried over was read just now
        _add_sidecars(run, sidecar(written))
        if check is not None:
            check(run.staging.data)
        return written

    def appear() -> None:
        _sync_all(run)
        raised.settled = True
        run.staging.commit()

    keep = sum(file.size for file in job.files) <= run.memory
    with Flusher(filled, keep=keep) as flusher, closing(Journal(run.staging.journal(team.rank))) as journal:

        def wrote(size: int) -> None:
            flusher.wrote(size)
            run.progress(size)

        pool = Pool(job, run.staging.data, run.threads, wrote, team, clean=run.resumed is None)
        results = pool.run(run.resumed or {}, journal)
        flusher.finish()
        written = team.lead(lambda: finish(results, pool.sealed))
        team.step(flusher.result)
        team.lead(appear)
        return written


def _finish(run: _Run, results: list[PartResult], sealed: Collection[tuple[str, int]]) -> Written:
    """Seal every file, but for the literals that stand already, and copy what is carried over."""
    job = run.job
    sources: list[tuple[Span, ...]] = [()] * len(job.rows)
    targets: list[tuple[Span, ...]] = [()] * len(job.rows)
    for row, source, target, _ in results:
        sources[row] += source
        targets[row] += target
    tensor_crcs, source_crcs = {}, {}
    for one, source, target in zip(job.rows, sources, targets, strict=True):
        tensor_crcs[one.row.key] = whole(target, 0, one.nbytes)
        if not one.row.recipe.zero:
            source_crcs[one.row.key] = whole(source, 0, prod(one.row.recipe.before) * one.item)
    handles = Handles(run.staging.data, writing=True)
    try:
        spans = output_files.tensor_spans(zip(job.rows, targets, strict=True), handles)
        digests = {
            file.path: output_files.seal(
                file, spans.get(file.path, []), handles, sealed, clean=run.resumed is None
            )
            for file in sorted(job.files, key=lambda file: file.last)
        }
    finally:
        handles.close()
    for path in job.plan.source.carried:
        digests[path] = output_files.copy_carried(job.plan.source.root / path, run.staging.data / path)
        run.progress(digests[path].bytes)
    return Written(tensor_crcs, source_crcs, dict(sorted(digests.items())), run.staging.data)


def _add_sidecars(run: _Run, sidecars: Mapping[str, bytes]) -> None:
    for path in sidecars:
        _check_path(path)
        if PurePosixPath(path).parts[0] != FOLDER:
            raise ValueError(f"sidecar file {path!r} does not lie in sparkling/")
    folder = run.staging.sidecars
    digests = digests_text({path: FileDigest.of(content) for path, content in sidecars.items()})
    for path, content in {**sidecars, DIGESTS: digests}.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        write_new(target, content)


def _sync_all(run: _Run) -> None:
    """Everything on the disk, the files that make the rest valid last."""
    last = {file.path for file in run.job.files if file.last}
    late = {_under(run.staging.data, path) for path in last}
    inside = [path for path in run.staging.partial.rglob("*") if path.is_file()]
    for path in inside:
        if path not in late:
            sync(path)
    for folder in sorted({path.parent for path in inside}, key=lambda path: -len(path.parts)):
        sync(folder)
    for path in sorted(late):
        sync(path)


def _refuse_changed(root: Path, before: Mapping[str, tuple[int, int, int]]) -> None:
    if source_state(root, set(before)) != before:
        raise CheckpointError(
            f"the source {root} was changed while it was read",
            hint="wait until the training run has finished writing it, then run the command again",
        )


def _refuse_nonfinite(job: Job, results: list[PartResult]) -> None:
    if job.plan.spec.allow_nonfinite:
        return
    counts: dict[int, int] = {}
    for result in results:
        if result.nonfinite:
            counts[result.row] = counts.get(result.row, 0) + result.nonfinite
    if not counts:
        return
    names = [f"{job.rows[row].row.key} ({counts[row]} entries)" for row in sorted(counts)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    raise CheckpointError(
        f"NaN or Inf in {len(names)} tensor(s) of {job.plan.source.root}: {', '.join(names[:8])}{more}",
        hint="take an earlier checkpoint; --allow-nonfinite widens it all the same",
    )


def _check_path(path: str) -> None:
    """A relative path that stays inside.

    Raises:
        CheckpointError: it does not.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise CheckpointError(f"the checkpoint names a file outside itself: {path!r}")


def _under(root: Path, path: str) -> Path:
    return root / path if path else root


def _threads(threads: int | None, memory: int) -> int:
    if threads is not None and threads < 1:
        raise OutputError(f"{threads} threads cannot do any work", hint="give at least 1")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) or 1
    wanted = threads or min(max(processors() // processes, 1), 4)
    return max(1, min(wanted, memory >> 23))  # a thread has less than 8 MiB in flight


@contextmanager
def _one_torch_thread(plan: Plan) -> Iterator[None]:
    """Pieces are small: torch's own threads would only wait for each other.

    torch is needed for float16 only, and takes its time to import.
    """
    if not any(recipe.dtype == "float16" for recipe in plan.recipes):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
