"""Time and memory of one optimizer step, beside Optax and PyTorch.

Run ``python -m classp_jax.benchmark``; it takes a few minutes. It prints and judges
nothing. PyTorch's rows appear where PyTorch is installed and JAX runs on a CPU too.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import classp_jax

_RATE, _THRESHOLD, _EPS = 0.01, 1e-6, 1e-5
_POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_BASELINE = "optax.adagrad"
# What a step on float32 parameters cannot do without: read g, A and w, write A and w.
_LIMIT = 20


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


def gradients(leaves: int, parameters: int) -> list[np.ndarray]:
    """Random float32 matrices; about half of the squares are above the threshold."""
    rng = np.random.default_rng(0)
    shape = (parameters // leaves // 100, 100)
    scale = np.float32(1.5 * _THRESHOLD**0.5)
    return [scale * rng.standard_normal(shape, dtype=np.float32) for _ in range(leaves)]


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Every JAX contestant by name, the baseline first."""

    def classp(power: float, threshold: float = _THRESHOLD) -> Any:
        return classp_jax.classp(_RATE, threshold, power, _EPS)

    traced_power = optax.inject_hyperparams(
        classp_jax.classp,
        static_args=("learning_rate", "threshold", "eps", "accumulator_dtype"),
    )
    return {
        _BASELINE: optax.adagrad(_RATE),
        "optax.sgd": optax.sgd(_RATE),
        "optax.adam": optax.adam(_RATE),
        **{f"classp, power {power:g}": classp(power) for power in _POWERS},
        "classp, power 1.7 (general)": classp(1.7),
        "classp, power traced": traced_power(_RATE, _THRESHOLD, 1.0, _EPS),
        "classp, power 1, threshold 0": classp(1.0, 0.0),
        "chain of mask and scale, power 1": optax.chain(
            classp_jax.mask_by_threshold(_THRESHOLD),
            classp_jax.scale_by_generalized_adagrad(1.0, _EPS),
            optax.scale_by_learning_rate(_RATE),
        ),
        "chain of mask_to_density and scale": optax.chain(
            classp_jax.mask_to_density(0.5),
            classp_jax.scale_by_generalized_adagrad(1.0, _EPS),
            optax.scale_by_learning_rate(_RATE),
        ),
        "classp_published, power 1": classp_jax.classp_published(_RATE),
    }


def jax_row(
    name: str, tx: optax.GradientTransformation, grads: Sequence[np.ndarray]
) -> Row:
    """The jitted step of update and apply_updates, parameters and state donated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    on_device = [jnp.asarray(g) for g in grads]
    params = [jnp.ones_like(g) for g in on_device]
    state = tx.init(params)
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, on_device).compile()
    )
    count = sum(g.size for g in grads)
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    held = [(params, state)]

    def run() -> None:
        held.append(compiled(*held.pop(), on_device))
        jax.block_until_ready(held[0])

    return Row(
        name,
        run,
        costs["bytes accessed"] / count if costs else None,
        memory.temp_size_in_bytes / count if memory else None,
        sum(x.nbytes for x in jax.tree.leaves(state)) / count,
    )


def torch_rows(grads: Sequence[np.ndarray]) -> list[Row]:
    """Algorithm 1 written out in PyTorch, and PyTorch's own AdaGrad.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    import torch

    count = sum(g.size for g in grads)

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
                accepted = g * g > _THRESHOLD
                total += torch.where(accepted, g.abs() ** power, 0)
                root = (total + _EPS) ** (1 / power)
                weight -= _RATE * torch.where(accepted, g / root, 0)

        return Row(f"torch, Algorithm 1, power {power:g}", step, None, None, 4.0)

    def adagrad(name: str, **options: bool) -> Row:
        optimizer = torch.optim.Adagrad(parameters(), lr=_RATE, **options)
        state = [x for per in optimizer.state.values() for x in per.values()]
        size = sum(x.numel() * x.element_size() for x in state) / count
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


def report(leaves: int, parameters: int, rounds: int) -> None:
    """Measures every contestant on one tree and prints the table."""
    grads = gradients(leaves, parameters)
    rows = [jax_row(name, tx, grads) for name, tx in optimizers().items()]
    note = ""
    if jax.default_backend() != "cpu":
        note = "PyTorch's rows are left out: JAX does not run on the CPU here."
    else:
        try:
            rows += torch_rows(grads)
        except ImportError:
            note = "PyTorch's rows are left out: PyTorch is not installed."
    count = sum(g.size for g in grads)
    print(f"\n{count:,} float32 parameters in {leaves} leaves, {rounds} rounds\n")
    print(f"{'':36}{'ms':>9}{'ratio':>8}{'traffic':>9}{'temp':>7}{'state':>7}")
    for row, (milliseconds, ratio) in zip(rows, time_rows(rows, rounds), strict=True):
        known = [
            "-" if value is None else f"{value:.1f}"
            for value in (row.traffic, row.temporary, row.state)
        ]
        print(
            f"{row.name:36}{milliseconds:9.2f}{ratio:8.2f}"
            f"{known[0]:>9}{known[1]:>7}{known[2]:>7}"
        )
    if note:
        print(f"\n{note}")


def main() -> None:
    """Prints the tables for few large leaves and for many small ones."""
    device = jax.devices()[0]
    print(
        f"classp_jax {classp_jax.__version__}, jax {jax.__version__}, "
        f"optax {optax.__version__}, Python {platform.python_version()}\n"
        f"{device.device_kind}, {os.cpu_count()} CPU cores, "
        f"{datetime.date.today().isoformat()}\n\n"
        "ms: one jitted, donated step of update and apply_updates, median\n"
        f"ratio: time in terms of {_BASELINE}, median over rounds\n"
        "traffic, temp, state: bytes a parameter that XLA counts as accessed, as\n"
        "  temporary and as optimizer state; with an accumulator no step can do with\n"
        f"  less than {_LIMIT} of traffic (read g, A, w; write A, w)"
    )
    report(leaves=8, parameters=8_000_000, rounds=15)
    report(leaves=60, parameters=200_000, rounds=100)


if __name__ == "__main__":
    main()
