"""Checkpoints: a tree of arrays in a folder, whole or not at all.

Orbax writes the arrays, in a thread. A checkpoint is a folder that is named by its
step; it gets this name when everything is in it, last of all a manifest with the hash
of every file: what the disk, or a copy, has changed since is recognised by that.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from classp_jax.continual.errors import (
    CheckpointError,
    CheckpointWarning,
    ContinualError,
    check_count,
)
from classp_jax.continual.leaves import (
    as_leaf,
    copied,
    is_key,
    kind,
    least,
    lifted,
    named,
)
from classp_jax.continual.results.files import write_atomically

MANIFEST = "classp_jax.manifest"
"""The file with a checkpoint's note, leaves and hashes, and its own in line 1."""
_SIGNATURE = "classp-jax checkpoint 1"
_UNFINISHED, _REPLACED = ".writing.classp_jax", ".replaced.classp_jax"
"""What the names end with of a checkpoint that is being written, or is to be removed,
and of one that another of its step replaces. Nothing else is ever removed."""
_SIGN = "classp_jax.process_"
"""What a file's name begins with that says that another process wrote its part."""


class Restored(NamedTuple):
    """What :func:`restore` returns."""

    tree: Any
    step: int
    note: dict[str, Any]
    """What was saved beside the arrays."""


class Checkpoint(NamedTuple):
    """One checkpoint, whose files are what was written."""

    path: pathlib.Path
    step: int
    note: dict[str, Any]
    leaves: dict[str, str]
    """Every leaf's dtype and shape, such as ``float32[3,4]``, by its path."""


def save(
    folder: str | os.PathLike[str],
    tree: Any,
    *,
    step: int,
    keep: int = 2,
    note: Mapping[str, Any] | None = None,
    processes: Sequence[int] | None = None,
) -> Future[pathlib.Path]:
    """Saves a tree of arrays in the background.

    The arrays are copied before this returns, so they may be donated to the next step.
    The next call for this folder waits until this one is written. What went wrong with
    it is raised by ``result()`` of what is returned, which waits, too: call it after
    the last one; if nobody has, the next call raises it.
    A process that ends in the ordinary way first finishes writing. One that is killed
    leaves the checkpoints before.

    Args:
      folder: where checkpoints are kept, one folder in it for each; made if need be.
        What else is in it stays. No two processes may save into it at once, but
        together.
      tree: what is to come back: parameters, optimizer state, random keys (typed ones
        too), counters; any pytree of arrays and numbers.
      step: what to call the checkpoint. One of the same step is replaced, and those of
        later steps, which a restart has gone back behind, are removed.
      keep: how many checkpoints to keep: with 2, there is one to go back to if the
        newest is damaged.
      note: what else is to come back, of JSON's types.
      processes: which of several processes call this, for arrays that lie across them;
        each writes what it has. The first of these writes the note, and of numbers and
        arrays of NumPy its own. None: all. One that is named alone waits for nobody.

    Returns:
      A future of the checkpoint's folder.

    Raises:
      CheckpointError: if the folder cannot be written, or an earlier call's checkpoint
        could not.

    Example:
      >>> import tempfile
      >>> params = {"w": jax.numpy.arange(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save(folder, params, step=100)
      ...     restored = restore(folder, params)
      >>> restored.step, restored.tree["w"].tolist()
      (100, [0.0, 1.0, 2.0])
    """
    _check_count("step", step, 0)
    _check_count("keep", keep, 1)
    folder = pathlib.Path(os.path.abspath(folder))
    wait(folder)
    orbax()
    leaves = named(tree)
    if not any(np.size(leaf) for leaf in leaves.values()):
        raise CheckpointError("There is nothing to save: the tree holds no number.")
    if not isinstance(note or {}, Mapping):
        raise CheckpointError(f"The note must be a dictionary, not {note!r}.")
    content = {
        "step": int(step),
        "note": dict(note or {}),
        "leaves": {path: kind(leaf) for path, leaf in leaves.items()},
    }
    try:
        # A copy, since the caller's lists may grow before it is written.
        content = json.loads(json.dumps(content))
    except TypeError as error:
        raise CheckpointError(f"The note must be of JSON's types: {error}.") from None
    together = _together(processes)
    arrays = {path: copied(leaf) for path, leaf in leaves.items() if np.size(leaf)}
    if 0 not in together:
        arrays = {path: lifted(leaf, together) for path, leaf in arrays.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    saving = _pending[folder] = _Saving()
    arguments = (_write, folder, int(keep), content, arrays, together)
    if len(together) == 1:
        _writer().submit(saving.run, *arguments)
    else:
        # One that waits for another process must not keep a second one waiting, which
        # that process may have begun first.
        threading.Thread(target=saving.run, args=arguments).start()
    return saving


def restore(
    folder: str | os.PathLike[str],
    like: Any,
    *,
    step: int | None = None,
    processes: Sequence[int] | None = None,
) -> Restored:
    """Restores the newest checkpoint that is whole.

    A checkpoint that could not be written, is cut off or whose bytes have changed is
    named in a :class:`CheckpointWarning`, and the one before it is used.

    Args:
      folder: what :func:`save` was given.
      like: a tree such as the saved one: arrays, whose values are not used, or
        ``jax.ShapeDtypeStruct`` (from ``jax.eval_shape``). Every leaf comes back as the
        leaf here is: a JAX array with its sharding, on any number of devices, whatever
        the saved array's was; a NumPy array; a Python number. Containers may be others
        than the saved ones, and so the optimizer may, as long as every leaf has the
        same path, shape and dtype.
      step: restore this one, and no other.
      processes: which of several processes call this, to use the same checkpoint: what
        one of them finds damaged is passed over by all. None: all.

    Raises:
      CheckpointError: if there is none, if none is whole, or if the tree differs: the
        first leaf that does is named.
    """
    if step is not None:
        _check_count("step", step, 0)
    folder = pathlib.Path(os.path.abspath(folder))
    try:
        wait(folder)
    except CheckpointError as error:
        warnings.warn(f"{error} An earlier one is used.", CheckpointWarning, 2)
    found = find(folder, step, processes=_together(processes))
    if found is None:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"There is no {which} in {folder}.")
    return Restored(load(found, like), found.step, found.note)


def wait(folder: pathlib.Path) -> None:
    """Waits until what this process saves there is written.

    Raises:
      CheckpointError: if it cannot be, and nobody has been told so far.
    """
    pending = _pending.pop(folder, None)
    if pending is not None and pending.exception() and not pending.told:
        pending.result()


def find(
    folder: pathlib.Path,
    step: int | None = None,
    warn: Callable[[str], None] | None = None,
    processes: Sequence[int] = (),
) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
      folder: where checkpoints are kept.
      step: look at this one only.
      warn: called with a line for each one that is passed over, in place of a
        :class:`CheckpointWarning`.
      processes: which of several processes call this, to find the same one. Each looks
        at a part of its files.

    Raises:
      CheckpointError: if there are some, but none that is whole.
    """
    # What Orbax wrote there, and has no manifest any more, is damaged.
    stored = _stored(folder, MANIFEST, "manifest.ocdbt")
    stored = {n: path for n, path in stored.items() if step in (None, n)}
    steps = {*stored}
    devices = [jax.local_devices(process_index=process)[0] for process in processes]
    rank = processes.index(jax.process_index()) if processes else 0
    part = slice(rank, None, max(len(processes), 1))
    faults = []
    while True:
        newest = max(steps, default=-1)
        number = least(newest, devices)
        if number < 0:
            break
        steps = {earlier for earlier in steps if earlier < number}
        path = stored.get(number, folder / str(number))
        found, fault = None, "another process says how"
        try:
            found = _verified(path, part)
        except (OSError, ValueError, KeyError) as error:
            fault = _line(error)
        if not least(int(found is not None), devices):
            faults.append(f"{path} is damaged ({fault})")
            continue
        assert found is not None
        for fault in faults:
            line = f"checkpoint {fault}; {found.path.name} is used in its place"
            if warn is not None:
                warn(line)
            else:
                warnings.warn(line, CheckpointWarning, stacklevel=3)
        return found
    if faults:
        raise CheckpointError(
            f"No checkpoint is whole: {'; '.join(faults)}. Remove these to start anew."
        )
    if least(-newest, devices) < 1:
        raise CheckpointError(
            f"Not all processes see the same checkpoints in {folder}: it must be on a "
            "file system that they share."
        )
    return None


def load(found: Checkpoint, like: Any) -> Any:
    """A checkpoint's arrays in the tree ``like``; see :func:`restore`."""
    wanted = named(like)
    for path in dict.fromkeys([*wanted, *found.leaves]):
        here = kind(wanted[path]) if path in wanted else None
        there = found.leaves.get(path)
        if here != there:
            raise CheckpointError(
                f"The checkpoint {found.path} does not fit: its leaf '{path}' "
                + ("is missing" if there is None else f"is {there}")
                + (", which is not asked for" if here is None else f", not {here}")
            )
    ocp = orbax()
    stored = {path: leaf for path, leaf in wanted.items() if np.size(leaf)}
    arguments = {path: _restore_argument(leaf) for path, leaf in stored.items()}
    try:
        with _quiet():
            item = dict.fromkeys(stored, 0)
            args = ocp.args.PyTreeRestore(item=item, restore_args=arguments)
            reader = _handler((jax.process_index(),))
            arrays = reader.restore(_path(found.path), args=args)
    except Exception as error:
        raise CheckpointError(f"Cannot read {found.path}: {_line(error)}.") from error
    leaves = [as_leaf(leaf, arrays.get(path)) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


class _Saving(Future[pathlib.Path]):
    """A checkpoint on its way to the disk."""

    told = False
    """Whether somebody knows how it ended."""

    def run(self, function: Callable[..., pathlib.Path], *arguments: Any) -> None:
        """Makes the result of the function its own."""
        try:
            self.set_result(function(*arguments))
        except BaseException as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> pathlib.Path:
        """Where the checkpoint is, when it is there."""
        self.exception(timeout)
        self.told = True
        return super().result()


_pending: dict[pathlib.Path, _Saving] = {}
"""Of each folder, the last checkpoint that this process has begun."""
_meetings: collections.Counter[pathlib.Path] = collections.Counter()
"""How often this process has met others over each folder."""


@functools.cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "checkpoints")


def _quiet_about_other_arrays() -> None:
    """When one array cannot be written, Orbax is gone before the others are.

    They try to tell its event loop, which may be closed, or raise what nobody waits
    for, and a traceback each is printed, when it likes; the first one's error is the
    one that is raised.
    """
    before = sys.unraisablehook

    def hook(fault: Any) -> None:
        if fault.object is not None or str(fault.exc_value) != "Event loop is closed":
            before(fault)

    def not_orbax(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        ours = any(name in text for name in ("orbax", "OCDBT", "zarr"))
        lost = ours and "exception was never retrieved" in text
        return not (lost or "_SignalingThread.run() raised" in text)

    sys.unraisablehook = hook
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(not_orbax)


@functools.cache
def orbax() -> Any:
    """Orbax takes seconds to import: only those wait who use it."""
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{error.name} is not installed; checkpoints need the extra "
            '"continual": pip install "classp-jax[continual]"'
        ) from None
    _quiet_about_other_arrays()
    return orbax.checkpoint


def _path(path: pathlib.Path) -> Any:
    """A path as Orbax's handlers take it."""
    from etils import epath  # Comes with Orbax, and imports slowly, too.

    return epath.Path(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's log lines from the user's terminal; its errors are raised."""
    logger = logging.getLogger("absl")

    def not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in pathlib.PurePath(record.pathname).parts

    logger.addFilter(not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(not_orbax)


def _together(processes: Sequence[int] | None) -> tuple[int, ...]:
    """The processes that save or restore together, the one first that leads."""
    if processes is None:
        return tuple(range(jax.process_count()))
    if jax.process_index() not in processes:
        raise CheckpointError(
            f"This is process {jax.process_index()}, none of {[*processes]}."
        )
    return tuple(processes)


def _handler(processes: tuple[int, ...]) -> Any:
    """What reads and writes a tree, in Orbax; it waits for no other process."""
    ocp = orbax()
    options = ocp.options.MultiprocessingOptions(
        primary_host=processes[0], active_processes={*processes}
    )
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(
                primary_host=processes[0],
                # What is only said to lie elsewhere is not written there.
                use_replica_parallel=None if len(processes) > 1 else False,
            ),
        ),
    )
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=options,
        type_handler_registry=handlers,
        # It takes time, and weights hardly shrink.
        use_compression=False,
    )


def _write(
    folder: pathlib.Path,
    keep: int,
    content: dict[str, Any],
    arrays: dict[str, Any],
    processes: tuple[int, ...],
) -> pathlib.Path:
    """Writes one checkpoint, and removes those that are not kept.

    All of the processes meet after each stage, however it went: none waits for one
    whose disk is full. That one leaves no sign of having written its part; without all
    signs the first process finishes nothing, and the others miss theirs in the end.
    """
    step = content["step"]
    final, temporary = folder / str(step), folder / f"{step}{_UNFINISHED}"
    leads = jax.process_index() == processes[0]
    others = {process: f"{_SIGN}{process}" for process in processes[1:]}
    token = secrets.token_hex()
    handler = _handler(processes)

    def begin() -> None:
        if leads:
            _remove_unfinished(folder)
            if final.exists() and not (final / MANIFEST).exists():
                raise FileExistsError(errno.EEXIST, "Not a checkpoint of ours", final)
            temporary.mkdir()

    def write_part() -> None:
        if not temporary.is_dir():
            raise FileNotFoundError(f"process {processes[0]} could not begin it")
        with _quiet():
            handler.save(_path(temporary), args=orbax().args.PyTreeSave(arrays))
        if not leads:
            sign = temporary / others[jax.process_index()]
            sign.write_text(token, encoding="ascii")

    def finish() -> None:
        if not leads:
            return
        for process, sign in others.items():
            if not (temporary / sign).is_file():
                raise FileNotFoundError(f"process {process} could not write its part")
        with _quiet():
            handler.finalize(_path(temporary))
        content["files"] = {name: _hash(temporary / name) for name in _files(temporary)}
        body = json.dumps(content)
        head = f"{_SIGNATURE} {hashlib.sha256(body.encode()).hexdigest()}"
        write_atomically(temporary / MANIFEST, f"{head}\n{body}\n".encode())
        if final.exists():
            final.rename(folder / f"{step}{_REPLACED}")
        temporary.rename(final)
        _prune(folder, step, keep)

    fault: Exception | None = None
    try:
        for stage in (begin, write_part, finish):
            try:
                if fault is None:
                    stage()
            except Exception as error:
                fault = error
            _meet(folder, processes)
        if fault is not None:
            raise fault
        if not leads:
            sign = final / others[jax.process_index()]
            if not sign.is_file() or sign.read_text(encoding="ascii") != token:
                raise FileNotFoundError("another process says why")
    except Exception as error:
        if leads:
            _remove_unfinished(folder)
        raise _cannot_write(final, error) from error
    return final


def _meet(folder: pathlib.Path, processes: tuple[int, ...]) -> None:
    """Waits for the others that write into a folder, at the coordinator.

    Not by a computation on devices, which training must not get in between. One that
    dies ends the wait; a slow disk may take its time.
    """
    if len(processes) == 1:
        return
    _meetings[folder] += 1
    meet = orbax().multihost.get_barrier_sync_fn(processes={*processes})
    # No name may come twice.
    meet(key=f"{folder}, {_meetings[folder]}", timeout_ms=3_600_000)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what a process that was killed, or a full disk, has left."""
    for left in folder.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
    for replaced in folder.glob(f"*{_REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)  # Killed before the other one was in its place.


def _prune(folder: pathlib.Path, step: int, keep: int) -> None:
    steps = sorted(_stored(folder, MANIFEST))
    earlier = [number for number in steps if number <= step]
    for number in {*steps} - {*earlier[-keep:]}:
        # Renamed first, so that no half of it is taken for damaged.
        (folder / str(number)).rename(folder / f"{number}{_UNFINISHED}")
    _remove_unfinished(folder)


def _stored(folder: pathlib.Path, *files: str) -> dict[int, pathlib.Path]:
    """What holds one of these files in a folder of checkpoints, by its step."""
    found = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        number, path = name.removesuffix(_REPLACED), folder / name
        is_step = number.isascii() and number.isdigit()
        if is_step and any((path / file).exists() for file in files):
            found.setdefault(int(number), path)
    return found


def _files(path: pathlib.Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file.relative_to(path).as_posix() for file in files)


def _hash(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _verified(path: pathlib.Path, part: slice) -> Checkpoint:
    """A checkpoint with the hashes of a part of its files compared.

    ValueError says which one is wrong.
    """
    head, _, rest = (path / MANIFEST).read_bytes().partition(b"\n")
    body = rest.removesuffix(b"\n")
    expected = f"{_SIGNATURE} {hashlib.sha256(body).hexdigest()}".encode()
    if head != expected or rest == body:
        raise ValueError(f"{MANIFEST} is not what was written")
    content = json.loads(body)
    files = [*content["files"].items()]
    for name, expected in files[part]:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if _hash(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(path, content["step"], content["note"], content["leaves"])


def _restore_argument(leaf: Any) -> Any:
    """How Orbax is to read a leaf."""
    ocp = orbax()
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or is_key(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype)


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    text = str(error).strip() or type(error).__name__
    # What the file system said, at the end of a long line.
    if codes := re.findall(r"os_error_code='(\d+)'", text):
        return os.strerror(int(codes[-1]))
    return text.splitlines()[0].rstrip(".")


def _check_count(name: str, value: Any, least: int) -> None:
    try:
        check_count(name, value, least)
    except ContinualError as error:
        raise CheckpointError(str(error)) from None


def _cannot_write(path: pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"Cannot write the checkpoint {path}: {_line(error)}.")
