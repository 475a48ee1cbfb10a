"""Time and memory of one optimizer step, beside Optax and PyTorch.

``python benchmarks/step.py`` times the step on this machine; it takes a few minutes. It
prints and judges nothing. PyTorch's rows appear where PyTorch is installed and JAX runs
on a CPU too.

``python benchmarks/step.py --compile-for tpu:v5e:2x2 --compile-for cuda:a100`` runs
nothing: it compiles the step for these machines, which need not be here, and counts
what the compiled step reads and writes. ``--save FILE`` adds what was counted to a JSON
file, and ``--page`` writes ``docs/speed.md`` from ``docs/speed.json``.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import optax
import page
from jax.sharding import NamedSharding, PartitionSpec
from transforms import BASELINE, EPS, RATE, THRESHOLD, transforms

import classp_jax

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "speed.json"
# What a step on float32 parameters cannot do without: read g, A and w, write A and w.
LIMIT = 20
LEAVES = 2
LARGE_LEAF, SMALL_LEAF = (1 << 16, 1 << 12), (1 << 10, 1 << 10)


class Row(NamedTuple):
    """One contestant: a step to time, and what is known of its memory."""

    name: str
    step: Callable[[], object]
    """Runs one step and waits for it."""
    traffic: float | None
    """XLA's "bytes accessed", for each parameter."""
    temporary: float | None
    """Bytes of temporary arrays, for each parameter."""
    state: float
    """Bytes of optimizer state, for each parameter."""


class Count(NamedTuple):
    """What a step compiled ahead of time moves and holds, for each parameter."""

    name: str
    traffic: float
    """Bytes read and written: the compiler's own count, on GPU that of the kernels."""
    main_memory: float
    """Bytes that the kernels read from and write to main memory."""
    kernels: float
    """Kernels for each leaf that read or write an array of the leaf's size."""
    temporary: float
    """Bytes of temporary arrays."""
    state: float
    """Bytes of optimizer state."""


def gradients(leaves: int, parameters: int) -> list[np.ndarray]:
    """Random float32 matrices; about half of the squares are above the threshold."""
    rng = np.random.default_rng(0)
    shape = (parameters // leaves // 100, 100)
    scale = np.float32(1.5 * THRESHOLD**0.5)
    return [scale * rng.standard_normal(shape, dtype=np.float32) for _ in range(leaves)]


def training_step(tx: optax.GradientTransformation) -> Any:
    """The jitted step of update and apply_updates, parameters and state donated.

    Its last argument is the key of those that are random; the others ignore it.
    """
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, grads: Any, key: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, key=key)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def jax_row(
    name: str, tx: optax.GradientTransformation, grads: Sequence[np.ndarray]
) -> Row:
    """A JAX contestant on this machine."""
    on_device = [jnp.asarray(g) for g in grads]
    params = [jnp.ones_like(g) for g in on_device]
    state = tx.init(params)
    key = jax.random.key(0)
    compiled = training_step(tx).lower(params, state, on_device, key).compile()
    count = sum(g.size for g in grads)
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    held = [(params, state)]

    def run() -> None:
        held.append(compiled(*held.pop(), on_device, key))
        jax.block_until_ready(held[0])

    return Row(
        name,
        run,
        costs["bytes accessed"] / count if costs else None,
        memory.temp_size_in_bytes / count if memory else None,
        sum(x.nbytes for x in jax.tree.leaves(state)) / count,
    )


def compiled_for(
    target: str,
    tx: optax.GradientTransformation,
    shape: tuple[int, int],
) -> Any:
    """The compiled step on leaves of a shape, cut into one piece for each chip."""
    chips = ahead.mesh(target)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {f"leaf {i}": leaf for i in range(LEAVES)}
    cut = NamedSharding(chips, PartitionSpec(ahead.AXIS))
    shardings = jax.tree.map(lambda _: cut, params)
    key = jax.eval_shape(jax.random.key, 0)
    arguments = (params, jax.eval_shape(tx.init, params), params, key)
    placed = ahead.placed(arguments, params, shardings, chips)
    return training_step(tx).lower(*placed).compile()


def count(
    name: str,
    target: str,
    tx: optax.GradientTransformation,
    shape: tuple[int, int],
) -> Count:
    """A contestant's step, compiled for a target."""
    compiled = compiled_for(target, tx, shape)
    weights = LEAVES * math.prod(shape)
    here = weights / ahead.mesh(target).size
    leaf = 4 * here / LEAVES
    kernels = ahead.kernels(compiled)
    main_memory = sum(kernel.in_main_memory for kernel in kernels)
    costs: Any = compiled.cost_analysis()
    large = [k for k in kernels if not k.copies_only and max(k.arrays) >= leaf]
    state = jax.eval_shape(tx.init, [jax.ShapeDtypeStruct(shape, jnp.float32)] * LEAVES)
    return Count(
        name,
        traffic=(costs["bytes accessed"] if costs else main_memory) / here,
        main_memory=main_memory / here,
        kernels=len(large) / LEAVES,
        temporary=compiled.memory_analysis().temp_size_in_bytes / here,
        state=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / weights,
    )


def torch_rows(grads: Sequence[np.ndarray]) -> list[Row]:
    """Algorithm 1 written out in PyTorch, and PyTorch's own AdaGrad.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    import torch

    number = sum(g.size for g in grads)

    def parameters() -> list[torch.nn.Parameter]:
        weights = [torch.nn.Parameter(torch.ones(g.shape)) for g in grads]
        for weight, g in zip(weights, grads, strict=True):
            weight.grad = torch.from_numpy(g)
        return weights

    def algorithm_1(power: float) -> Row:
        weights = parameters()
        sums = [torch.zeros_like(weight) for weight in weights]

        @torch.no_grad()
        def step() -> None:
            for weight, total in zip(weights, sums, strict=True):
                g = weight.grad
                assert g is not None
                accepted = g * g > THRESHOLD
                total += torch.where(accepted, g.abs() ** power, 0)
                root = (total + EPS) ** (1 / power)
                weight -= RATE * torch.where(accepted, g / root, 0)

        return Row(f"torch, Algorithm 1, power {power:g}", step, None, None, 4.0)

    def adagrad(name: str, **options: bool) -> Row:
        optimizer = torch.optim.Adagrad(parameters(), lr=RATE, **options)
        state = [x for per in optimizer.state.values() for x in per.values()]
        size = sum(x.numel() * x.element_size() for x in state) / number
        return Row(f"torch.optim.Adagrad, {name}", optimizer.step, None, None, size)

    return [
        algorithm_1(1.0),
        algorithm_1(2.0),
        adagrad("foreach", foreach=True),
        adagrad("fused", fused=True),
    ]


def time_rows(rows: Sequence[Row], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of a step, and its ratio to the first row's: medians over rounds.

    The rows take turns, and each ratio is taken within a round, so that a machine that
    slows down or speeds up over the minutes does so for all.
    """
    for row in rows:
        row.step()
    times: list[list[float]] = []
    for _ in range(rounds):
        times.append([])
        for row in rows:
            row.step()
            start = time.perf_counter()
            row.step()
            times[-1].append(1e3 * (time.perf_counter() - start))
    return [
        (
            statistics.median(one[i] for one in times),
            statistics.median(one[i] / one[0] for one in times),
        )
        for i in range(len(rows))
    ]


def report(leaves: int, parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Measures every contestant on one tree and prints the table."""
    grads = gradients(leaves, parameters)
    rows = [jax_row(name, tx, grads) for name, tx in transforms().items()]
    note = ""
    if jax.default_backend() != "cpu":
        note = "PyTorch's rows are left out: JAX does not run on the CPU here."
    else:
        try:
            rows += torch_rows(grads)
        except ImportError:
            note = "PyTorch's rows are left out: PyTorch is not installed."
    number = sum(g.size for g in grads)
    print(f"\n{number:,} float32 parameters in {leaves} leaves, {rounds} rounds\n")
    print(f"{'':36}{'ms':>9}{'ratio':>8}{'traffic':>9}{'temp':>7}{'state':>7}")
    measured = []
    for row, (milliseconds, ratio) in zip(rows, time_rows(rows, rounds), strict=True):
        known = {
            key: None if value is None else round(value, 3)
            for key, value in row._asdict().items()
            if key in ("traffic", "temporary", "state")
        }
        measured.append({"name": row.name, "ratio": round(ratio, 3)} | known)
        cells = ["-" if value is None else f"{value:.1f}" for value in known.values()]
        print(
            f"{row.name:36}{milliseconds:9.2f}{ratio:8.2f}"
            f"{cells[0]:>9}{cells[1]:>7}{cells[2]:>7}"
        )
    if note:
        print(f"\n{note}")
    return measured


def report_compiled(target: str) -> dict[str, list[dict[str, Any]]]:
    """Compiles every contestant for a target and prints the tables."""
    tables = {}
    for size, shape in (("large", LARGE_LEAF), ("small", SMALL_LEAF)):
        megabytes = 4 * math.prod(shape) / ahead.mesh(target).size / 2**20
        print(f"\n{target}, {LEAVES} leaves of {megabytes:g} MiB a device\n")
        print(f"{'':30}" + "".join(f"{key:>12}" for key in Count._fields[1:]))
        tables[size] = []
        for name, tx in transforms().items():
            counted = count(name, target, tx, shape)
            values = {
                k: round(v, 2) for k, v in counted._asdict().items() if k != "name"
            }
            print(f"{name:30}" + "".join(f"{v:12.2f}" for v in values.values()))
            tables[size].append({"name": name} | values)
    return tables


def page_tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of ``docs/speed.md``."""
    timed = [
        [f"`{row['name']}`", *(_cell(row[key]) for key in ("ratio", *_MEMORY))]
        for row in results["cpu"]["large"]
    ]
    tpu, gpu = (
        {row["name"]: row for row in results[target]["large"]} for target in _ON_PAGE
    )
    large = [
        [f"`{name}`"]
        + [
            _cell(target[name][key])
            for target in (tpu, gpu)
            for key in ("traffic", "kernels")
        ]
        + [_cell(max(tpu[name]["temporary"], gpu[name]["temporary"]))]
        + [_cell(tpu[name]["state"])]
        for name in tpu
    ]
    small = [
        [f"`{row['name']}`", _cell(row["traffic"]), _cell(row["main_memory"])]
        for row in results[_ON_PAGE[0]]["small"]
    ]
    return {
        "timed": page.table(["", "time", "traffic", "temporary", "state"], timed),
        "compiled": page.table(
            [
                "",
                "TPU: bytes",
                "kernels",
                "GPU: bytes",
                "kernels",
                "temporary",
                "state",
            ],
            large,
        ),
        "small": page.table(["", "all memories", "main memory"], small),
    }


_MEMORY = ("traffic", "temporary", "state")
_ON_PAGE = ("tpu:v5e:2x2", "cuda:a100")


def _cell(value: float | None) -> str:
    """Two digits, without those that say nothing."""
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def save(path: pathlib.Path, key: str, results: dict[str, Any]) -> None:
    """Adds what was measured to a file; of an older measurement nothing stays."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored[key] = ahead.provenance() | results
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Times the step here, or counts what it does elsewhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile-for", action="append", metavar="TARGET")
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md")
    arguments = parser.parse_args()
    if arguments.page:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        return page.write(DOCS / "speed.md", page_tables(results))
    for target in arguments.compile_for or ():
        try:
            tables = report_compiled(target)
        except ahead.UnknownTargetError as error:
            parser.error(str(error))
        if arguments.save:
            save(arguments.save, target, tables)
    if not arguments.compile_for:
        tables = time_here()
        if arguments.save:
            save(arguments.save, "cpu", tables)


def time_here() -> dict[str, Any]:
    """Prints the tables for few large leaves and for many small ones."""
    device = jax.devices()[0]
    print(
        f"classp_jax {classp_jax.__version__}, jax {jax.__version__}, "
        f"optax {optax.__version__}, Python {platform.python_version()}\n"
        f"{device.device_kind}, {os.cpu_count()} CPU cores, "
        f"{datetime.date.today().isoformat()}\n\n"
        "ms: one jitted, donated step of update and apply_updates, median\n"
        f"ratio: time in terms of {BASELINE}, median over rounds\n"
        "traffic, temp, state: bytes per parameter that XLA counts as accessed, as\n"
        "  temporary and as optimizer state; with an accumulator no step can do with\n"
        f"  less than {LIMIT} of traffic (read g, A, w; write A, w)"
    )
    return {
        "device": f"{device.device_kind}, {os.cpu_count()} cores",
        "large": report(leaves=8, parameters=8_000_000, rounds=15),
        "small": report(leaves=60, parameters=200_000, rounds=100),
    }


if __name__ == "__main__":
    main()
