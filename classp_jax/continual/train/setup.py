"""An experiment's data, network and options, read and checked."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax.continual._programs import program_hash
from classp_jax.continual.data.arrays import Split, Stream
from classp_jax.continual.data.batches import Batches
from classp_jax.continual.errors import ContinualError, check_count
from classp_jax.continual.models import Model, as_model, example_batch
from classp_jax.continual.train.experiment import Experiment, prepare
from classp_jax.continual.train.plan import Training


class Setup(NamedTuple):
    """An experiment without methods, ready to train."""

    experiment: Experiment
    configuration: dict[str, Any]
    """What two runs must have in common to be compared; JSON's types."""
    stream: dict[str, Any]
    """``name``, ``scenario``, ``task_names`` and ``kind``."""


def set_up(
    stream: Any,
    model: Any,
    seeds: Sequence[int],
    *,
    model_options: Mapping[str, Any] | None = None,
    devices: int | None = None,
    devices_per_run: int = 1,
    shard_parameters: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> Setup:
    """Reads every seed's data and checks network and options; trains nothing.

    Args:
      stream: as for :func:`run`.
      model: as for :func:`run`.
      seeds: as for :func:`run`.
      model_options: as for :func:`run`.
      devices: as for :func:`run`, like the next three.
      devices_per_run: likewise.
      shard_parameters: likewise.
      mesh: likewise.
      **options: fields of :class:`Training`.

    Raises:
      ContinualError: for whatever does not fit.
    """
    training = _training(options)
    seeds = _checked_seeds(seeds)
    if not (callable(stream) or isinstance(stream, Stream)):
        raise ContinualError(
            "stream must be what permuted, rotated, split, sequence, stream or "
            f"stream_of_batches returns, got {type(stream).__name__}"
        )
    draw: Any = stream if callable(stream) else lambda seed: stream
    streams: list[Stream] = [draw(seed) for seed in seeds]
    x = streams[0].tasks[0].test.x
    example = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    if training.moments == "running" and jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise ContinualError("moments 'running' is for images and vectors, not text")
    more = dict(model_options or {})
    if model == "transformer":
        more.setdefault("vocabulary_size", max(s.vocabulary_size for s in streams))
    try:
        network = as_model(model, example, streams[0].num_classes, **more)
    except ContinualError:
        raise
    except ValueError as error:
        raise ContinualError(" ".join(str(error).split())) from error
    experiment = prepare(
        streams,
        seeds,
        network,
        training,
        devices=devices,
        devices_per_run=devices_per_run,
        shard_parameters=shard_parameters,
        mesh=mesh,
    )
    data = getattr(stream, "configuration", None) or {"stream": streams[0].name}
    options = dict(more, name=network.name)
    if not isinstance(model, str):
        # Two networks may share a name: "<lambda>", or one that has been edited.
        options["program"] = _program(network, example_batch(example))
    recorded = training._asdict()
    for name in ("until_loss", "compute_dtype", "nonfinite", "moments"):
        if recorded[name] == Training._field_defaults[name]:
            recorded.pop(name)
    configuration = {
        "data": data,
        "fingerprint": getattr(stream, "fingerprint", None) or _fingerprint(streams),
        "network": options,
        "training": recorded,
    }
    names = {tuple(task.name for task in s.tasks) for s in streams}
    first = list(experiment.task_names)
    info = {
        "name": streams[0].name,
        "scenario": streams[0].scenario,
        "kind": streams[0].kind,
        # Where a task depends on the seed, it has only its number.
        "task_names": first
        if len(names) == 1
        else [f"task {k + 1}" for k in range(len(first))],
    }
    return Setup(experiment, json.loads(json.dumps(configuration)), info)


def _program(network: Model, inputs: jax.ShapeDtypeStruct) -> str:
    """A hash of how a network is initialised, trained and evaluated."""

    def outputs(key: jax.Array, x: jax.Array) -> Any:
        params = network.init(key)
        return [network.apply(params, x, mode) for mode in (key, None)]

    return program_hash(outputs, jax.random.key(0), inputs)


def _training(options: Mapping[str, Any]) -> Training:
    """The options as numbers that training can use."""
    unknown = [name for name in options if name not in Training._fields]
    if unknown:
        raise ContinualError(
            f"run has no option {unknown[0]!r}; it has {', '.join(Training._fields)}"
        )
    several = {
        name: (value,) if isinstance(value, int | float) else tuple(value or ())
        for name, value in options.items()
        if name in ("epochs", "until_loss", "normalisation")
    }
    for name in ("until_loss", "normalisation"):
        for value in several.get(name, ()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ContinualError(f"{name} takes numbers, got {value!r}")
    training = Training(**{**options, **several})
    for name in ("batch_size", "points", "fisher_examples"):
        check_count(name, getattr(training, name), 1)
    for value in training.epochs:
        check_count("epochs", value, 1)
    if not training.epochs:
        raise ContinualError("epochs: at least one number is needed")
    if training.max_test is not None:
        check_count("max_test", training.max_test, 1)
    choices = {
        "evaluate": ("seen", "all"),
        "evaluate_on": ("test", "validation"),
        "order": ("shuffled", "stored"),
        "fisher": ("exact", "sampled", "empirical"),
        "compute_dtype": ("float32", "bfloat16", "float16"),
        "nonfinite": ("stop", "skip"),
        "moments": ("first-task", "running"),
    }
    for name, allowed in choices.items():
        if getattr(training, name) not in allowed:
            raise ContinualError(
                f"{name} must be {' or '.join(map(repr, allowed))}, got "
                f"{getattr(training, name)!r}"
            )
    if not all(math.isfinite(t) and t > 0 for t in training.until_loss):
        raise ContinualError(f"until_loss must be above 0: {training.until_loss}")
    scale = training.normalisation
    if scale and not (
        len(scale) == 2 and all(map(math.isfinite, scale)) and scale[1] > 0
    ):
        raise ContinualError(
            f"normalisation must be a finite mean and a deviation above 0: {scale}"
        )
    return training


def _checked_seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, int | Iterable):
        raise ContinualError(f"seeds must be whole numbers, got {seeds!r}")
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    for seed in seeds:
        check_count("seeds", seed, 0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ContinualError(f"seeds must be named once each, at least one: {seeds}")
    return [int(seed) for seed in seeds]


def _fingerprint(streams: Sequence[Stream]) -> str:
    """A hash of one stream's arrays, for data that did not come from a maker."""
    digest = hashlib.sha256()
    for task in streams[0].tasks:
        # Of batches there is only their number.
        parts = (task.train, task.validation, task.test)
        digest.update(str(len(task.train)).encode() * isinstance(task.train, Batches))
        for split in (part for part in parts if isinstance(part, Split)):
            digest.update(np.ascontiguousarray(split.inputs()).tobytes())
            digest.update(np.ascontiguousarray(split.labels()).tobytes())
    return digest.hexdigest()[:16]
