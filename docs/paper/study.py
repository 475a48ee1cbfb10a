"""Ablations of CLASSP, and remedies for its weak points, on one stream.

Run ``python docs/paper/study.py STREAM [VARIANT ...] [--data-dir DIR]`` (extras
``continual`` and ``tfds``). Every variant gets the same number of trials on validation
data and on seeds that are not reported, then the reported seeds on test data. All of it
is stored in ``docs/paper/study-STREAM``, and the same command goes on from there.
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import classp_jax
from classp_jax import continual
from classp_jax.continual import Setting, experiment, presets
from classp_jax.continual.config import Experiment, Training

FOLDER = pathlib.Path(__file__).parent
SEEDS = tuple(range(10))
TUNING_SEEDS = (1000, 1001)
TRIALS = 20

STREAMS = {
    "permuted-digits": Experiment(training=Training(epochs=(5,))),
    "mnist-fashion-mlp": presets.load("mnist-fashion-mlp"),
    "permuted-mnist": presets.load("permuted-mnist"),
}

_RATE = Setting(0.1, 1e-3, 1.0)
_EPS = Setting(1e-2, 1e-6, 10.0)
_PRIOR = Setting(1.0, 1e-1, 1e3)


def chain(learning_rate: Any, *parts: Any) -> optax.GradientTransformation:
    """Gradient transformations, and the learning rate."""
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def per_fan_in() -> optax.GradientTransformation:
    """Divides each layer's updates by its number of inputs."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda g: g / float(np.prod(g.shape[:-1])), updates
        )
    )


def relative_mask(threshold: Any) -> optax.GradientTransformation:
    """A weight moves where its gradient exceeds so many times its layer's RMS."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda g: jnp.where(g * g > threshold**2 * jnp.mean(g * g), g, 0.0), updates
        )
    )


def eps_fan_in(learning_rate: Any, eps: Any) -> optax.GradientTransformation:
    """Epsilon counts times the fan-in: g / (f eps + A) = (g/f) / (eps + A/f)."""
    scale = classp_jax.scale_by_generalized_adagrad(1.0, eps)
    return chain(learning_rate, per_fan_in(), scale)


def rate_fan_in(learning_rate: Any, eps: Any) -> optax.GradientTransformation:
    """The learning rate is divided by the fan-in."""
    scale = classp_jax.scale_by_generalized_adagrad(1.0, eps)
    return chain(learning_rate, scale, per_fan_in())


def bound(learning_rate: Any, eps: Any, bound: Any) -> optax.GradientTransformation:
    """Scaled gradients are clipped."""
    scale = classp_jax.scale_by_generalized_adagrad(1.0, eps)
    return chain(learning_rate, scale, optax.clip(bound))


def relative_threshold(
    learning_rate: Any, relative: Any, eps: Any = 0.0, prior: Any = 0.0
) -> optax.GradientTransformation:
    """A threshold relative to the layer in place of a fixed one."""
    scale = classp_jax.scale_by_generalized_adagrad(1.0, eps, prior=prior)
    return chain(learning_rate, relative_mask(relative), scale)


class Variant(NamedTuple):
    """A method, and the settings of it that are not tuned."""

    method: Any
    fixed: dict[str, float]


def _own(make: Any, **settings: Setting) -> Variant:
    return Variant(continual.from_optax(make, settings), {})


_P1 = {"power": 1.0}
_RELATIVE = Setting(0.1, 1e-2, 3.0)
VARIANTS = {
    # What CLASSP is measured against, and its ablations.
    "sgd": Variant("sgd", {}),
    "adam": Variant("adam", {}),
    "adagrad": Variant("adagrad", {}),
    "ewc": Variant("ewc", {}),
    "classp": Variant("classp", _P1),
    "no threshold": Variant("classp", _P1 | {"threshold": 0.0}),
    "density": Variant("classp-density", _P1),
    "power 0.5": Variant("classp", {"threshold": 0.0, "power": 0.5}),
    "power 2": Variant("classp", {"threshold": 0.0, "power": 2.0}),
    "power 3": Variant("classp", {"threshold": 0.0, "power": 3.0}),
    "exclusive": Variant("classp-exclusive", _P1 | {"threshold": 0.0}),
    "scaling from task 2": Variant("scale-later+classp", _P1 | {"threshold": 0.0}),
    "accumulator reset": Variant("reset-optimizer+classp", _P1 | {"threshold": 0.0}),
    # Remedies; none of them has a fixed threshold.
    "own prior": Variant("classp-prior", _P1 | {"threshold": 0.0}),
    "power 0.5 to 1.5": _own(
        classp_jax.classp,
        learning_rate=_RATE,
        eps=_EPS,
        power=Setting(1.0, 0.5, 1.5),
    ),
    "eps times fan-in": _own(
        eps_fan_in, learning_rate=_RATE, eps=Setting(1e-4, 1e-8, 1e-1)
    ),
    "rate over fan-in": _own(
        rate_fan_in, learning_rate=Setting(10.0, 0.1, 100.0), eps=_EPS
    ),
    "bound": _own(bound, learning_rate=_RATE, eps=_EPS, bound=Setting(0.1, 1e-3, 1.0)),
    "relative threshold": _own(
        relative_threshold, learning_rate=_RATE, eps=_EPS, relative=_RELATIVE
    ),
    "relative threshold, own prior": _own(
        relative_threshold, learning_rate=_RATE, prior=_PRIOR, relative=_RELATIVE
    ),
}


def study(
    options: Experiment,
    variants: dict[str, Variant],
    folder: pathlib.Path,
    *,
    trials: int = TRIALS,
    seeds: tuple[int, ...] = SEEDS,
    command: str | None = None,
) -> continual.Results:
    """Tunes every variant on validation data, then runs the winners on test data.

    Args:
      options: data, network and training.
      variants: what to compare, by name.
      folder: where trials and results are stored; what is there is kept.
      trials: how many settings of each variant are tried.
      seeds: what to report; none of those that tuning takes.
      command: the command line, for the record.
    """
    model, model_options = experiment.network(options.network, {})
    common = functools.partial(
        dict,
        stream=experiment.stream(options.data),
        model=model,
        methods={name: variant.method for name, variant in variants.items()},
        model_options=model_options,
        folder=folder,
        announce=print,
    )
    training = dataclasses.asdict(options.training)
    tuned = continual.tune(
        **common(settings={name: v.fixed for name, v in variants.items()}),
        **training,
        trials=trials,
        seeds=TUNING_SEEDS,
        together=5,
        progress=lambda name, done, count, score: print(
            f"{name}: {done} of {count} trials, best {score:.1%}", flush=True
        ),
    )
    return continual.run(
        **common(settings=tuned.settings),
        **training,
        points=1,
        seeds=seeds,
        command=command,
    )


def main() -> None:
    """Runs the variants that are not yet in the stream's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("variant", nargs="*")
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    options = STREAMS[arguments.stream]
    options = dataclasses.replace(
        options, data=dataclasses.replace(options.data, data_dir=arguments.data_dir)
    )
    chosen = {name: VARIANTS[name] for name in arguments.variant or VARIANTS}
    command = f"python docs/paper/study.py {arguments.stream}"
    folder = FOLDER / f"study-{arguments.stream}"
    print(study(options, chosen, folder, command=command).table())


if __name__ == "__main__":
    main()
