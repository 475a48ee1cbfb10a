"""Faults of devices, hosts, data and numbers, done on purpose.

Faults of ``faults.py``: functions of an empty folder that return how often it was tried
and what came out, and raise if that is not what the page promises.
"""

import multiprocessing
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faults_common import (
    Outcome,
    error_line,
    expect,
    free_address,
    one_line,
    python,
)

from classp_jax import continual
from classp_jax.continual.train import feed, hosts

FEATURES, CLASSES, BATCH = 1024, 10, 32
MODEL = (
    lambda key: {"w": 0.01 * jax.random.normal(key, (FEATURES, CLASSES))},
    lambda params, x: x @ params["w"],
)


def _batches(rng: np.random.Generator, count: int) -> Iterator[tuple[Any, Any]]:
    for _ in range(count):
        y = rng.integers(0, CLASSES, BATCH)
        x = rng.standard_normal((BATCH, FEATURES), np.float32)
        yield x + (y[:, None] == np.arange(FEATURES) % CLASSES), y


def _stream(read: Callable[..., Any], steps: int, tasks: int = 1) -> continual.Stream:
    parts = zip(*_batches(np.random.default_rng(0), 8), strict=True)
    x, y = (np.concatenate(part) for part in parts)
    return continual.stream_of_batches(
        [(read, x, y)] * tasks, examples=steps * BATCH, num_classes=CLASSES
    )


def _train(stream: Any, method: str = "classp", **options: Any) -> Any:
    options = {"seeds": [0], "epochs": 1, "points": 1, "batch_size": BATCH} | options
    return continual.run(
        stream, MODEL, [method], normalisation=(0.0, 1.0), fisher_examples=64, **options
    )


def absent_coordinator(folder: pathlib.Path, patience: int = 3) -> Outcome:
    """No process listens where the first one should be."""
    del folder
    address = free_address()
    line, seconds = one_line(lambda: hosts.join(address, 2, 1, patience=patience))
    expect(address in line and seconds < patience + 5, (line, seconds))
    return 1, f"one line that names it, {seconds - patience:.1f} s after the patience"


def absent_process(folder: pathlib.Path) -> Outcome:
    """The first of two processes waits for the other one."""
    address = free_address()
    options = f"--distributed --coordinator {address} --processes 2 --process-id 0"
    began = time.perf_counter()
    code = "from classp_jax.__main__ import main; main()"
    done = python(code, "run", *options.split(), "--out", str(folder))
    seconds = time.perf_counter() - began
    line = error_line(done)
    expect(done.returncode == 1 and address in line, (done.returncode, line))
    expect(f"waited {hosts.PATIENCE} seconds" in line, line)
    return 1, (
        "one line that names address and patience, status 1, "
        f"{seconds - hosts.PATIENCE:.0f} s of start and end beside {hosts.PATIENCE} s"
    )


def do_not_divide(folder: pathlib.Path) -> Outcome:
    """More devices than there are, runs and batches that do not divide, wrong axes."""
    del folder
    stream = _stream(lambda rng: _batches(rng, 4), 4)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cases: list[dict[str, Any]] = [
        {"devices": 9},
        {"devices": 8, "devices_per_run": 3},
        {"devices_per_run": 5},
        {"shard_parameters": True},
        {"mesh": mesh},
        {"mesh": mesh, "devices": 8},
    ]
    slowest = max(one_line(lambda c=case: _train(stream, **c))[1] for case in cases)
    outcome = f"one line before anything is compiled, within {slowest:.1f} s"
    return len(cases), outcome


def _nan_in_a_batch(nonfinite: str, good: Callable[[Any], bool]) -> int:
    """Trains with a batch of NaN at a random place, 20 times."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        place = int(rng.integers(0, 40))

        def read(rng: np.random.Generator, place: int = place) -> Iterator[Any]:
            for number, (x, y) in enumerate(_batches(rng, 40)):
                yield (x * np.nan if number == place else x), y

        (run,) = _train(_stream(read, 40), "ewc+classp", nonfinite=nonfinite).runs
        expect(good(run), run)
    return 20


def nan_stops(folder: pathlib.Path) -> Outcome:
    """A batch of NaN, which ends the run."""
    del folder
    times = _nan_in_a_batch("stop", lambda run: run.diverged)
    return times, "the run is marked as diverged"


def nan_is_skipped(folder: pathlib.Path) -> Outcome:
    """A batch of NaN, which is left out."""
    del folder
    times = _nan_in_a_batch(
        "skip", lambda run: run.skipped_steps == 1 and run.matrix[-1][0] > 0.5
    )
    return times, "the step is undone and counted, the task learned"


def overflow(folder: pathlib.Path) -> Outcome:
    """Inputs whose scaled gradients leave float16."""
    del folder
    stream = _stream(lambda rng: ((300 * x, y) for x, y in _batches(rng, 60)), 60)
    results = _train(stream, compute_dtype="float16", save_weights=True)
    (run,), ((_, trained),) = results.runs, results.params.items()
    leaves = jax.tree.leaves(trained)
    expect(all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves), trained)
    expect(0 < run.skipped_steps < 60, run.skipped_steps)
    return 1, (
        f"{run.skipped_steps} of 60 steps undone while the scale falls; weights and "
        "accumulators stay finite"
    )


def reader_fails(folder: pathlib.Path) -> Outcome:
    """The data ends in an exception at a random place."""
    del folder
    rng = np.random.default_rng(2)
    for _ in range(20):
        place = int(rng.integers(0, 40))

        def read(rng: np.random.Generator, place: int = place) -> Iterator[Any]:
            yield from _batches(rng, place)
            raise OSError("Input/output error")

        line, _ = one_line(lambda r=read: _train(_stream(r, 40), "sgd"))
        expect("task 1" in line and "Input/output error" in line, line)
        expect(not any(t.name == "feed" for t in threading.enumerate()), "a thread")
    return 20, "one line that names the task and the error, no thread left"


def memory(tasks: int, steps: int, block: int) -> list[tuple[float, float]]:
    """After each task, the MB that this process has in memory, and the most so far."""
    feed.BLOCK_BYTES = block
    found: list[tuple[float, float]] = []

    def after_a_task(event: Any) -> None:
        if event.task_finished:
            status = pathlib.Path("/proc/self/status").read_text()
            named = dict(re.findall(r"(\w+):\s*(\d+) kB", status))
            now, most = (int(named[n]) * 1024 / 1e6 for n in ("VmRSS", "VmHWM"))
            found.append((now, most))

    stream = _stream(lambda rng: _batches(rng, steps), steps, tasks)
    _train(stream, "replay+classp", progress=after_a_task)
    return found


def memory_of_batches(
    folder: pathlib.Path,
    tasks: int = 100,
    steps: int = 320,
    block: int = feed.BLOCK_BYTES,
) -> Outcome:
    """Tasks of 42 MB each, one after the other, in a process of their own."""
    del folder
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(memory, (tasks, steps, block))
    tenth = tasks // 10
    (early, early_peak), (last, peak) = found[tenth - 1], found[-1]
    task = steps * BATCH * FEATURES * 4 / 1e6
    # A leak of 4 % of 100 tasks would be seen.
    expect(peak - early_peak < min((tasks - tenth) * task / 4, 150), found)
    return 1, (
        f"{tasks} tasks, {tasks * task / 1e3:.1f} GB in all, `replay+classp`: "
        f"{early:,.0f} MB in memory after task {tenth} and {last:,.0f} MB after task "
        f"{tasks}; the most so far {early_peak:,.0f} and {peak:,.0f} MB"
    )
