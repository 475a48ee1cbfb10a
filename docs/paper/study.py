"""Ablations of CLASSP, and remedies for its weak points, on one stream.

Run ``python docs/paper/study.py STREAM [VARIANT ...] [--data-dir DIR]`` (extras
``continual`` and ``tfds``). Every variant gets the same number of tries on validation
data and on seeds that are not reported, then the reported seeds on test data. A variant
that is already in ``study-STREAM.json`` is kept.
"""

import argparse
import datetime
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax.continual import methods as registry
from classp_jax.continual.config import RunConfig, make_network, make_streams, training
from classp_jax.continual.methods import Part, Setting, parse_method
from classp_jax.continual.metrics import average_accuracy, learning_accuracy
from classp_jax.continual.run import device_name
from classp_jax.continual.sweep import best, tune
from classp_jax.continual.train import train

FOLDER = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)

_MNIST = {
    "source": ("tfds:mnist",),
    "validation_fraction": 0.02,
    "hidden": (256, 256),
    "epochs": (1,),
    "max_train": 5000,
    "fisher": "sampled",
    "fisher_examples": 500,
}
STREAMS: dict[str, dict[str, Any]] = {
    "permuted-digits": {"epochs": (5,)},
    "mnist-fashion-mlp": _MNIST
    | {
        "stream": "sequence",
        "source": ("tfds:mnist", "tfds:fashion_mnist"),
        "max_train": 20000,
    },
    "permuted-mnist": _MNIST | {"tasks": 10},
    "rotated-mnist": _MNIST | {"stream": "rotated"},
    "split-mnist-task": _MNIST | {"stream": "split", "scenario": "task-incremental"},
    "mnist-fashion": _MNIST
    | {
        "stream": "sequence",
        "source": ("tfds:mnist", "tfds:fashion_mnist"),
        "model": "cnn",
        "epochs": (4, 1),
    },
    "split-mnist-class": _MNIST | {"stream": "split", "scenario": "class-incremental"},
}


class _State(NamedTuple):
    count: Any
    accumulator: Any


def remedy(
    learning_rate: Any,
    *,
    eps: Any = 0.0,
    prior: Any = 0.0,
    own_prior: Any = 0.0,
    share: Any = 0.0,
    bound: Any = None,
    relative_threshold: Any = 0.0,
    power: Any = 1.0,
    eps_fan_in: bool = False,
    rate_fan_in: bool = False,
) -> optax.GradientTransformation:
    """CLASSP with every remedy that was tried; each is off by default.

    Args:
      learning_rate: as CLASSP's.
      eps: as CLASSP's.
      prior: accumulators begin with this many times the layer's mean first ``|g|^p``.
      own_prior: each begins with this many times its own first ``|g|^p``.
      share: the share of the layer's mean accumulator that is added to each.
      bound: the largest size of a scaled gradient.
      relative_threshold: a weight moves where ``|g|`` exceeds this times the layer's
        root mean square.
      power: as CLASSP's.
      eps_fan_in: eps counts times the fan-in.
      rate_fan_in: the learning rate is divided by the fan-in.
    """

    def init(params: Any) -> _State:
        return _State(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def leaf(g: jax.Array, a: jax.Array, first: Any) -> tuple[jax.Array, jax.Array]:
        fan_in = float(np.prod(g.shape[:-1]))
        accepted = (g != 0) & (g * g > relative_threshold**2 * jnp.mean(g * g))
        term = jnp.where(accepted, jnp.abs(g) ** power, 0.0)
        a = jnp.where(first, prior * jnp.mean(jnp.abs(g) ** power), a)
        a = jnp.where(a == 0, own_prior * term, a) + term
        divisor = eps * (fan_in if eps_fan_in else 1.0) + a + share * jnp.mean(a)
        u = jnp.where(
            accepted & (divisor > 0),
            g / jnp.where(divisor > 0, divisor, 1.0) ** (1 / power),
            0.0,
        )
        if bound is not None:
            u = jnp.clip(u, -bound, bound)
        return u / (fan_in if rate_fan_in else 1.0), a

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _State]:
        del params
        leaves, tree = jax.tree.flatten(updates)
        pairs = [
            leaf(g, a, state.count == 0)
            for g, a in zip(leaves, jax.tree.leaves(state.accumulator), strict=True)
        ]
        return tree.unflatten([u for u, _ in pairs]), _State(
            state.count + 1, tree.unflatten([a for _, a in pairs])
        )

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )


_RATE = {"learning_rate": Setting(0.1, 1e-3, 1.0)}
_EPS = {"eps": Setting(1e-2, 1e-6, 10.0)}
_SHARE = {"share": Setting(0.1, 1e-2, 10.0)}
_PRIOR = {"prior": Setting(1.0, 1e-2, 1e3)}


def _part(settings: Mapping[str, Setting], **fixed: Any) -> Part:
    return Part("", dict(settings), lambda **kw: remedy(**(kw | fixed)))


registry.OPTIMIZERS.update(
    {
        "prior": _part(_RATE | _PRIOR),
        "own-prior": _part(_RATE | {"own_prior": Setting(1.0, 1e-1, 1e3)}),
        "share": _part(_RATE | _EPS | _SHARE),
        "prior-share": _part(_RATE | _PRIOR | _SHARE),
        "eps-fan-in": _part(
            _RATE | {"eps": Setting(1e-4, 1e-8, 1e-1)}, eps_fan_in=True
        ),
        "rate-fan-in": _part(
            {"learning_rate": Setting(10.0, 0.1, 100.0)} | _EPS, rate_fan_in=True
        ),
        "bound": _part(_RATE | _EPS | {"bound": Setting(0.1, 1e-3, 1.0)}),
        "relative-threshold": _part(
            _RATE | _EPS | {"relative_threshold": Setting(0.1, 1e-2, 3.0)}
        ),
        "relative-own-prior": _part(
            _RATE
            | {
                "own_prior": Setting(1.0, 1e-1, 1e3),
                "relative_threshold": Setting(0.1, 1e-2, 3.0),
            }
        ),
        "traced-power": _part(_RATE | _EPS | {"power": Setting(1.0, 0.5, 1.5)}),
    }
)

_P1 = {"power": 1.0}
VARIANTS: dict[str, tuple[str, dict[str, float]]] = {
    # What CLASSP is measured against, and its ablations.
    "sgd": ("sgd", {}),
    "adam": ("adam", {}),
    "adagrad": ("adagrad", {}),
    "ewc": ("ewc", {}),
    "classp": ("classp", _P1),
    "no threshold": ("classp", _P1 | {"threshold": 0.0}),
    "density": ("classp-density", _P1),
    "power 0.5": ("classp", {"threshold": 0.0, "power": 0.5}),
    "power 2": ("classp", {"threshold": 0.0, "power": 2.0}),
    "power 3": ("classp", {"threshold": 0.0, "power": 3.0}),
    "exclusive": ("classp-exclusive", _P1 | {"threshold": 0.0}),
    "scaling from task 2": ("scale-later+classp", _P1 | {"threshold": 0.0}),
    "accumulator reset": ("reset+classp", _P1 | {"threshold": 0.0}),
    # Remedies; none of them has a fixed threshold.
    "power 0.5 to 1.5": ("traced-power", {}),
    "prior": ("prior", {}),
    "own prior": ("own-prior", {}),
    "share": ("share", {}),
    "prior and share": ("prior-share", {}),
    "eps times fan-in": ("eps-fan-in", {}),
    "rate over fan-in": ("rate-fan-in", {}),
    "bound": ("bound", {}),
    "relative threshold": ("relative-threshold", {}),
    "relative threshold, own prior": ("relative-own-prior", {}),
}


def study(stream: str, variant: str, data_dir: str | None) -> dict[str, Any]:
    """One variant: tuned on validation data, then run on test data."""
    name, fixed = VARIANTS[variant]
    method = parse_method(name)
    # A convolutional network takes a hundred times as long.
    tries, tuning_seeds = (
        (10, (1000,)) if stream == "mnist-fashion" else (20, (1000, 1001))
    )
    config = RunConfig(**STREAMS[stream], data_dir=data_dir)
    streams = make_streams(config, tuning_seeds)
    model = make_network(config, streams)
    how = training(config, evaluate_on="validation")._replace(points_per_task=1)

    def evaluate(settings: list[dict[str, float]]) -> list[float]:
        runs = train(method, settings, model, streams, tuning_seeds, how)
        return [
            float(np.mean([0 if r.diverged else average_accuracy(r.matrix) for r in s]))
            for s in runs
        ]

    made = tune(method, evaluate, tries=tries, together=5, fixed=fixed)
    winner = {k: float(f"{v:.3g}") for k, v in best(made).settings.items()}
    streams = make_streams(config, SEEDS)
    how = how._replace(evaluate_on="test")
    (runs,) = train(
        method, [winner], make_network(config, streams), streams, SEEDS, how
    )
    return {
        "method": name,
        "settings": winner,
        "validation": round(best(made).accuracy, 4),
        "tries": sorted((round(t.accuracy, 4) for t in made), reverse=True),
        "average": [round(average_accuracy(r.matrix), 4) for r in runs],
        "learning": [round(learning_accuracy(r.matrix), 4) for r in runs],
        "first": [round(r.matrix[-1][0], 4) for r in runs],
        "last": [round(r.matrix[-1][-1], 4) for r in runs],
        "density": [round(r.update_density, 4) for r in runs],
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
    }


def main() -> None:
    """Runs the variants that are not yet in the stream's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("variant", nargs="*", default=[])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args()
    path = options.out / f"study-{options.stream}.json"
    for variant in options.variant or VARIANTS:
        if path.exists() and variant in json.loads(path.read_text()):
            continue
        found = study(options.stream, variant, options.data_dir)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Another process may do other variants.
            table = json.loads(path.read_text()) if path.exists() else {}
            table[variant] = found
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(table, indent=1) + "\n")
            os.replace(temporary, path)
        print(stream_line(options.stream, variant, found), flush=True)


def stream_line(stream: str, variant: str, found: Mapping[str, Any]) -> str:
    """One variant's outcome on one line."""
    return (
        f"{stream} {variant}: validation {found['validation']:.1%}, test "
        f"{np.mean(found['average']):.1%}, {found['settings']}"
    )


if __name__ == "__main__":
    main()
