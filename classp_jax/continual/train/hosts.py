"""Several processes that work together: only the first writes, all know the same."""

import contextlib
import dataclasses
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from classp_jax.continual.errors import ContinualError
from classp_jax.continual.results.records import Provenance, Results, Run
from classp_jax.continual.train.places import Place

_T = TypeVar("_T")

PATIENCE = 30
"""Seconds that processes wait for each other at the start, and before an early end."""
_JOINED = threading.Event()
"""Whether this process is one of several, which wait for it."""
_FOR_EVER = 10**6
"""Seconds after which JAX would end a process that still waits."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    patience: int = PATIENCE,
) -> None:
    """Makes this process one of several; nothing may have run on a device before.

    Args:
      coordinator: address and port of the first process, ``host:port``. None, like the
        other two: what a cluster that JAX knows says (Slurm, TPU slices, Open MPI).
      processes: how many there are.
      process_id: which of them this is, from 0.
      patience: seconds to wait for the others.

    Raises:
      ContinualError: in one line, if the coordinator cannot be reached or the others do
        not all come in time, or no cluster is known. JAX cannot be called off then: a
        thread of its goes on waiting, and the process should end by ``os._exit``.
    """
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise ContinualError(
            "coordinator, processes and process_id go together; give all three or, on "
            "a cluster that JAX knows, none"
        )
    if coordinator is not None and processes is not None and process_id is not None:
        if not 0 <= process_id < processes:
            raise ContinualError(
                f"process_id {process_id} is not one of {processes} processes: 0 to "
                f"{processes - 1}"
            )
        host, port = _address(coordinator)
        if process_id == 0:
            _check_free(port)
        else:
            _reach(host, port, patience)
    # SIGTERM is ours: it ends a process, where JAX would only take note of it.
    jax.config.update("jax_enable_preemption_service", False)

    def join_them() -> None:
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=_FOR_EVER
        )

    # In a thread, since JAX ends a process that has waited for too long, with a page of
    # addresses in place of a line.
    joined = _in_thread(join_them, "join")
    try:
        joined.result(patience)
        _JOINED.set()
    except TimeoutError:
        raise ContinualError(
            f"waited {patience} seconds at {coordinator or 'the coordinator'} for "
            f"{f'{processes} processes' if processes else 'the processes'}, and not "
            "all came: is each of them running, with its own process id?"
        ) from None
    except (ValueError, RuntimeError) as error:
        if coordinator is None and isinstance(error, ValueError):
            raise ContinualError(
                "JAX finds no cluster here: give coordinator, processes and process_id"
            ) from error
        line = " ".join(str(error).split())
        raise ContinualError(f"the processes did not come together: {line}") from error


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ContinualError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    return host.strip("[]"), int(port)


def _check_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ContinualError(
            f"the coordinator cannot have port {port} "
            f"({os.strerror(error.errno or 0)}): give all processes another one"
        ) from error


def _reach(host: str, port: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ContinualError(
                    f"no coordinator at {host}:{port} within {patience} seconds "
                    f"({error.strerror or error}): is the first process running?"
                ) from error
            time.sleep(0.1)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def gather(content: bytes) -> list[bytes]:
    """What each process gives, on all of them."""
    if jax.process_count() == 1:
        return [content]

    def gather_them() -> list[bytes]:
        sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded))
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    # In a thread, since a signal would wait where JAX waits for the others.
    return _in_thread(gather_them, "gather").result()


def each(function: Callable[[], str]) -> list[str]:
    """What a function returns in each process, on all; an error of one is one of all.

    Raises:
      ContinualError: what the function raises here, else what it does elsewhere.
    """
    answer: dict[str, str] = {}
    error: Exception | None = None
    try:
        answer["text"] = function()
    except (ContinualError, OSError) as failure:
        error = failure
        answer["error"] = " ".join(str(failure).split())
    answers = [json.loads(text) for text in gather(json.dumps(answer).encode())]
    lines = [found["error"] for found in answers if "error" in found]
    if lines:
        raise error or ContinualError(lines[0])
    return [found["text"] for found in answers]


def leave(patience: float = PATIENCE) -> None:
    """Waits until the other processes leave, too; not for ever.

    JAX would end them in the middle of what they save, or before they say what went
    wrong, if this one ended first.
    """
    if _JOINED.is_set():
        left = _in_thread(jax.distributed.shutdown, "leave")
        with contextlib.suppress(Exception):
            left.result(patience)


def _in_thread(function: Callable[[], _T], name: str) -> Future[_T]:
    """Calls a function in a thread that nobody has to wait for, ever."""
    done: Future[_T] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=call, name=name, daemon=True).start()
    return done


def gather_runs(runs: Mapping[tuple[int, int], Run]) -> dict[tuple[int, int], Run]:
    """The runs of all processes, by index, on each."""
    if jax.process_count() == 1:
        return dict(runs)
    own = [(*index, dataclasses.asdict(run)) for index, run in runs.items()]
    return {
        (i, j): _run(fields)
        for content in gather(json.dumps(own).encode())
        for i, j, fields in json.loads(content)
    }


def _run(fields: dict[str, Any]) -> Run:
    plain = {name: value for name, value in fields.items() if name != "provenance"}
    return Run(**plain, provenance=Provenance(**fields["provenance"]))


def gather_trees(
    trees: Mapping[tuple[int, int], tuple[Place, Any]],
) -> dict[tuple[int, int], Any]:
    """Trees of arrays of all processes, by index; none where a process has none."""
    if jax.process_count() == 1:
        return {index: tree for index, (_, tree) in trees.items()}
    arrays: dict[str, np.ndarray] = {}
    example: Any = None
    for (i, j), (place, tree) in trees.items():
        # Pieces that lie in other processes: all of them take part in this.
        whole = jax.jit(lambda t: t, out_shardings=place.whole)(tree)
        example = tree
        if place.reports:
            for number, leaf in enumerate(jax.tree.leaves(whole)):
                key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                data = jax.random.key_data(leaf) if key else leaf
                arrays[f"{i} {j} {number}"] = np.asarray(data)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    leaves: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for content in gather(buffer.getvalue()):
        with np.load(io.BytesIO(content)) as file:
            for name in file.files:
                i, j, number = map(int, name.split())
                leaves.setdefault((i, j), {})[number] = file[name]
    if example is None:
        return {}
    structure = jax.tree.structure(example)
    return {
        index: structure.unflatten(found[k] for k in range(len(found)))
        for index, found in leaves.items()
    }


def by_first(function: Callable[[], Results]) -> Results:
    """What the first process gets from a function, on all; its error likewise."""
    if jax.process_count() == 1:
        return function()
    results: Results | None = None

    def told() -> str:
        nonlocal results
        if not is_first():
            return ""
        results = function()
        answer = {
            "configuration": results.configuration,
            "stream": results.stream,
            "runs": [dataclasses.asdict(run) for run in results.runs],
        }
        return json.dumps(answer)

    answer = json.loads(each(told)[0])
    runs = tuple(_run(fields) for fields in answer["runs"])
    return results or Results(answer["configuration"], answer["stream"], runs)
