"""The parity harness: two optimizers over the same gradients, compared step by step.

A run is a :class:`Run` whatever made it: an Optax transform, a torch optimizer or a
recording. The logic of running and comparing stands here once; test files supply cases.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from classp_jax import ScaleByGeneralizedAdagradState

# Torch's threads wait in a busy loop for work; on few cores they stop JAX's.
torch.set_num_threads(1)

Arrays = Mapping[str, np.ndarray]


class Run(NamedTuple):
    """What a run left behind, by leaf."""

    steps: Arrays
    """The steps alone, added to 0 and so not rounded, ``(steps, *shape)``."""
    params: Arrays
    """The parameters at the start and after each step, ``(steps + 1, *shape)``."""
    accumulator: Arrays
    """The accumulator after the last step, ``shape``."""


def run_jax(
    tx: optax.GradientTransformation,
    start: Arrays,
    gradients: Arrays,
    *,
    hyperparams: Callable[[int], Mapping[str, Any]] | None = None,
) -> Run:
    """Runs an Optax transform, in a compiled scan.

    Args:
      tx: the transform, learning rate included.
      start: the parameters to start from.
      gradients: the gradients of all steps, ``(steps, *shape)``.
      hyperparams: for a transform under ``optax.inject_hyperparams``: the values to
        set at a step.
    """
    rows = [hyperparams(t) if hyperparams else {} for t in range(len_of(gradients))]
    injected = {k: jnp.asarray([row[k] for row in rows]) for k in rows[0]}
    return jax.tree.map(np.asarray, _scan(tx, dict(start), dict(gradients), injected))


@functools.partial(jax.jit, static_argnames="tx")
def _scan(tx: Any, start: Any, gradients: Any, injected: Any) -> Run:
    def step(carry: Any, x: Any) -> Any:
        params, state = carry
        g, values = x
        if values:
            now = {k: v.astype(state.hyperparams[k].dtype) for k, v in values.items()}
            state = state._replace(hyperparams={**state.hyperparams, **now})
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    carry = start, tx.init(start)
    (_, state), (steps, path) = jax.lax.scan(step, carry, (gradients, injected))
    path = jax.tree.map(lambda w, p: jnp.concatenate([w[None], p]), start, path)
    return Run(steps, path, _accumulator(state))


def run_torch(
    optimizer: Callable[[list[torch.Tensor]], Any],
    start: Arrays,
    gradients: Arrays,
    *,
    step_arguments: Callable[[int], Mapping[str, Any]] = lambda _: {},
) -> Run:
    """Runs a torch optimizer: as :func:`run_jax`.

    It runs twice over: once on its way, and once with the parameters put back to 0
    before each step, to see the step alone. (CLASSP does not look at the parameters.)

    Args:
      optimizer: makes the optimizer of a list of tensors.
      start: the parameters to start from.
      gradients: the gradients of all steps, ``(steps, *shape)``.
      step_arguments: what to pass to ``optimizer.step`` at a step.
    """

    def run(back_to_zero: bool) -> tuple[list[Any], dict[str, np.ndarray]]:
        params = {name: torch.tensor(w) for name, w in start.items()}
        opt = optimizer(list(params.values()))
        rows = []
        for t in range(len_of(gradients)):
            for name, w in params.items():
                w.grad = torch.tensor(gradients[name][t])
                if back_to_zero:
                    w.zero_()
            opt.step(**step_arguments(t))
            rows.append({name: w.numpy().copy() for name, w in params.items()})
        return rows, {name: opt.accumulator(w).numpy() for name, w in params.items()}

    steps, _ = run(back_to_zero=True)
    path, accumulator = run(back_to_zero=False)
    return Run(_stack(steps), _stack([dict(start), *path]), accumulator)


def assert_same_steps(actual: Run, expected: Run, rtol: float) -> None:
    """Every step, and the accumulator, within ``rtol`` of itself, elementwise."""
    for name, want in expected.steps.items():
        _assert_within(actual.steps[name], want, rtol * np.abs(want), f"step of {name}")
    _assert_same_accumulator(actual, expected, rtol)


def assert_same_path(actual: Run, expected: Run, rtol: float) -> None:
    """Every weight at every step within ``rtol`` of the largest value it has had.

    Of the largest, as a sum that crosses zero keeps the absolute rounding error of its
    larger terms.
    """
    for name, want in expected.params.items():
        largest = np.maximum.accumulate(np.abs(want), axis=0)
        _assert_within(actual.params[name], want, rtol * largest, f"path of {name}")
    _assert_same_accumulator(actual, expected, rtol)


def len_of(gradients: Arrays) -> int:
    """The number of steps: the length of the first axis, which all leaves share."""
    (steps,) = {len(g) for g in gradients.values()}
    return steps


def _assert_same_accumulator(actual: Run, expected: Run, rtol: float) -> None:
    for name, want in expected.accumulator.items():
        found = actual.accumulator[name]
        _assert_within(found, want, rtol * np.abs(want), f"accumulator of {name}")


def _assert_within(
    actual: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str
) -> None:
    assert actual.shape == want.shape, f"{what}: {actual.shape}, not {want.shape}"
    if not want.size:
        return
    # Not "off > bound", which a NaN would pass.
    off = np.where(np.abs(actual - want) <= bound, 0, np.abs(actual - want))
    if off.any():
        at = np.unravel_index(np.argmax(off), off.shape)
        raise AssertionError(
            f"{what} at {tuple(map(int, at))} (first the step, if any): "
            f"{actual[at]!r}, expected {want[at]!r} within {bound[at]:.3g}"
        )


def _accumulator(state: Any) -> Any:
    def is_ours(node: Any) -> bool:
        return isinstance(node, ScaleByGeneralizedAdagradState)

    (ours,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    return ours.accumulator


def _stack(rows: list[Any]) -> dict[str, np.ndarray]:
    return {name: np.stack([np.asarray(r[name]) for r in rows]) for name in rows[0]}
