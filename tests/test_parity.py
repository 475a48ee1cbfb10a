"""CLASSP in JAX and in torch, step by step and loss by loss."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from sklearn.datasets import load_digits

import classp_jax
from tests import parity
from tests.torch_reference import Classp, PublishedClassp

STEPS = 200
# Relative to the reference: (a step, a path of 200 steps).
TOLERANCES = {"float32": (1e-6, 1e-5), "float64": (1e-12, 1e-12)}

ALGORITHM_1 = [
    {"power": 0.5, "eps": 1e-2},
    {"power": 1},
    {"power": 1, "eps": 0.25, "threshold": 1e-4},
    {"power": 1.5, "threshold": 1e-2},
    {"power": 1.7},
    {"power": 2, "eps": 0.1},
    {"power": 2, "eps": 0.0},
    {"power": 2.5, "threshold": 1e-3, "eps": 1e-3},
    {"power": 3, "eps": 1e-8},
    {"power": 4, "eps": 1e-3, "threshold": 1.0},
    {"power": 5},
    {"scaling": False},
    {"scaling": False, "threshold": 1e-2, "power": 3},
    {"threshold": 1e3},
]
PUBLISHED = [
    {},
    {"power": 2},
    {"power": 3, "epsilon": 1e-3},
    {"power": 0.5, "lr": 0.01},
    {"power": 1.7, "threshold": 0.0},
    {"threshold": -0.1},
    {"threshold": 1.0},
    {"apply_scaling": False, "power": 2},
]
OURS = {"lr": "learning_rate", "epsilon": "eps", "apply_scaling": "scaling"}


def names(case: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in case.items()) or "defaults"


def precision(dtype: str):
    """A context in which JAX arrays may have the dtype."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@functools.cache
def tree(dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and 200 gradients, 4 decades wide; a row sparse, a row dead."""
    rng = np.random.default_rng(20240513)
    shapes = {"matrix": (9, 7), "scalar": (), "empty": (0, 3)}
    start, gradients = {}, {}
    for name, shape in shapes.items():
        size = (STEPS, *shape)
        start[name] = rng.normal(size=shape).astype(dtype)
        g = rng.normal(size=size) * 10 ** rng.uniform(-4, 0, size=size)
        gradients[name] = g.astype(dtype)
    gradients["matrix"][:, 0] *= rng.random((STEPS, 7)) < 0.1
    gradients["matrix"][:, 1] = 0
    return start, gradients


def compare(tx: Any, optimizer: Any, dtype: str) -> None:
    """The steps and the path of the parameters, JAX against torch."""
    start, gradients = tree(dtype)
    per_step, per_path = TOLERANCES[dtype]
    with precision(dtype):
        ours = parity.run_jax(tx, start, gradients)
        theirs = parity.run_torch(optimizer, start, gradients)
        assert {w.dtype.name for w in ours.params.values()} == {dtype}
        parity.assert_same_steps(ours, theirs, per_step)
        parity.assert_same_path(ours, theirs, per_path)


def in_both_dtypes(cases: list[dict[str, Any]], *double: int) -> list[Any]:
    """All cases in float32, and those of these indices in float64."""
    chosen = [(case, "float32") for case in cases]
    chosen += [(cases[i], "float64") for i in double]
    return [pytest.param(*c, id=f"{names(c[0])}-{c[1]}") for c in chosen]


# In float64 the powers' forms are others; the rest is the same code.
@pytest.mark.parametrize(
    ("case", "dtype"), in_both_dtypes(ALGORITHM_1, 0, 2, 3, 4, 6, 8, 9)
)
def test_algorithm_1(case, dtype):
    compare(
        classp_jax.classp(0.05, **case),
        functools.partial(Classp, lr=0.05, **case),
        dtype,
    )


@pytest.mark.parametrize(("case", "dtype"), in_both_dtypes(PUBLISHED, 0, 2))
def test_published(case, dtype):
    compare(
        classp_jax.classp_published(
            **{str(OURS.get(k, k)): v for k, v in case.items()}
        ),
        functools.partial(PublishedClassp, **case),
        dtype,
    )


@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        # Either side of where the square of a gradient rounds to 0 in its dtype.
        ("float32", [1e-38, 1e-30, 2.6e-23, 2.65e-23, 1e-22, 1e-20]),
        ("bfloat16", [1e-30, 2.65e-23, 6e-21, 7e-21, 1e-20]),
        ("float16", [1e-6, 1e-4, 1.7e-4, 1.8e-4, 1e-3]),
    ],
)
def test_published_takes_a_tensor_whose_squares_underflow_for_dead(dtype, magnitudes):
    tx = classp_jax.classp_published()
    moved = []
    for magnitude in magnitudes:
        w = torch.zeros(3, dtype=getattr(torch, dtype))
        w.grad = torch.tensor([0.0, magnitude, -magnitude / 2]).to(w.dtype)
        optimizer = PublishedClassp([w])
        optimizer.step()
        g = jnp.asarray(w.grad.float().numpy()).astype(dtype)
        _, state = jax.jit(tx.update)(g, tx.init(g))
        np.testing.assert_array_equal(
            state.accumulator.astype(jnp.float32),
            optimizer.accumulator(w).float().numpy(),
        )
        moved.append(bool((state.accumulator != 0).any()))
    assert moved == sorted(moved)
    assert set(moved) == {False, True}


def test_traced_hyperparams():
    start, gradients = tree("float32")
    tx = optax.inject_hyperparams(classp_jax.classp)(0.1, 1.0, power=1.0, scaling=1)
    for power in (0.5, 1.0, 2.0, 3.0, 1.7):
        case = {"threshold": 1e-3, "power": power, "eps": 1e-3}
        injected = {"learning_rate": 0.05, **case}
        ours = parity.run_jax(
            tx, start, gradients, hyperparams=lambda _, values=injected: values
        )
        optimizer = functools.partial(Classp, lr=0.05, **case)
        theirs = parity.run_torch(optimizer, start, gradients)
        parity.assert_same_path(ours, theirs, 1e-5)


def test_a_schedule_that_turns_scaling_on():
    """Plain SGD while the accumulator fills, then CLASSP: the published schedule."""
    start, gradients = tree("float32")
    tx = classp_jax.classp(0.05, 1e-4, scaling=lambda count: count >= 80)

    class TurnedOn(Classp):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", -1) + 1
            self.param_groups[0]["scaling"] = self.steps >= 80
            return super().step(closure)

    parity.assert_same_path(
        parity.run_jax(tx, start, gradients),
        parity.run_torch(
            lambda w: TurnedOn(w, lr=0.05, threshold=1e-4), start, gradients
        ),
        1e-5,
    )


def test_the_harness_sees_a_difference():
    """It must be able to fail: one part in 100,000 of the learning rate is too much."""
    start, gradients = tree("float32")
    run = functools.partial(parity.run_torch, start=start, gradients=gradients)
    right = run(lambda w: Classp(w, lr=0.05))
    again = run(lambda w: Classp(w, lr=0.05))
    for check in (parity.assert_same_steps, parity.assert_same_path):
        check(again, right, 0.0)
        with pytest.raises(AssertionError, match=r"(step|path) of"):
            check(run(lambda w: Classp(w, lr=0.05 * (1 + 1e-5))), right, 1e-6)
        with pytest.raises(AssertionError):
            check(run(lambda w: Classp(w, lr=0.05, threshold=1e-6)), right, 1e-6)


# A small network on real data.

WIDTHS = (64, 32, 10)
BATCH = 32


class MLP(nnx.Module):
    """64 inputs, 32 hidden units, 10 outputs."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(*WIDTHS[:2], param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(*WIDTHS[1:], param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.hidden(x)))


def twin(model: MLP) -> torch.nn.Sequential:
    """A torch network with the same weights."""

    def linear(layer: Any) -> torch.nn.Linear:
        kernel = torch.tensor(np.asarray(layer.kernel[...]))
        copy = torch.nn.Linear(kernel.shape[0], kernel.shape[1], dtype=kernel.dtype)
        with torch.no_grad():
            copy.weight.copy_(kernel.T)
            copy.bias.copy_(torch.tensor(np.asarray(layer.bias[...])))
        return copy

    return torch.nn.Sequential(
        linear(model.hidden), torch.nn.Tanh(), linear(model.head)
    )


def batches(dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """200 batches of scikit-learn's handwritten digits."""
    digits: Any = load_digits(return_X_y=True)
    x, y = digits
    order = np.random.default_rng(0).permuted(
        np.tile(np.arange(len(x)), (4, 1)), axis=1
    )
    steps = STEPS // 2
    rows = order.reshape(-1)[: steps * BATCH].reshape(steps, BATCH)
    return [((x[r] / 16).astype(dtype), y[r].astype(np.int32)) for r in rows]


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    def loss(model: MLP) -> jax.Array:
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def losses(
    tx: optax.GradientTransformation, torch_optimizer: Any, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The losses of the NNX network and of its torch twin on the same batches."""
    with precision(dtype):
        model = MLP(jnp.dtype(dtype), nnx.Rngs(0))
        net = twin(model)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        opt = torch_optimizer(net.parameters())
        ours, theirs = [], []
        for x, y in batches(dtype):
            ours.append(train_step(model, optimizer, jnp.asarray(x), jnp.asarray(y)))
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                net(torch.tensor(x)), torch.tensor(y).long()
            )
            loss.backward()
            opt.step()
            theirs.append(loss.item())
        return np.asarray(ours), np.asarray(theirs)


NETWORKS = [
    (classp_jax.classp, Classp, {"power": 1, "eps": 0.1}, "float32"),
    (
        classp_jax.classp,
        Classp,
        {"power": 2, "eps": 0.1, "threshold": 1e-8},
        "float64",
    ),
    (classp_jax.classp_published, PublishedClassp, {"power": 1, "eps": 0.1}, "float32"),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "case", "dtype"),
    NETWORKS,
    ids=lambda x: names(x) if isinstance(x, dict) else getattr(x, "__name__", x),
)
def test_network_loss_by_loss(ours, theirs, case, dtype):
    in_torch = {
        "epsilon" if k == "eps" and theirs is PublishedClassp else k: v
        for k, v in case.items()
    }
    found, expected = losses(
        ours(0.1, **case), functools.partial(theirs, lr=0.1, **in_torch), dtype
    )
    assert found.dtype == dtype
    assert expected[-20:].mean() < 0.5 * expected[0], "the network does not learn"
    per_step, per_path = TOLERANCES[dtype]
    np.testing.assert_allclose(found[:2], expected[:2], rtol=per_step)
    np.testing.assert_allclose(found, expected, rtol=per_path)
