"""Networks behind a pure pair ``init`` and ``apply``: by name, or the user's own."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from classp_jax.continual._names import nearest
from classp_jax.continual.networks import CNN, MLP, Transformer

Params = Any
"""A tree of floating-point arrays."""


class Model(NamedTuple):
    """A network as two pure functions."""

    name: str
    init: Callable[[jax.Array], Params]
    """``init(key)``: the parameters, a tree of floating-point arrays."""
    apply: Callable[[Params, jax.Array, jax.Array | None], jax.Array]
    """``apply(params, inputs, key)``: logits ``[batch, num_classes]``. With a key the
    network trains (dropout is drawn from it), with None it is evaluated."""


MODELS = {
    "mlp": "fully connected ReLU network, --hidden names its widths",
    "cnn": "the CLASSP paper's: two 3x3 convolutions, max-pool, dropout, dense 128",
    "transformer": "one encoder layer over 30 tokens, for text",
}

INITIALISATIONS = ("flax", "pytorch")

MAX_PARAMETERS = 10**9
"""More are refused: they take 4 GB in float32, and training several times that."""


def as_model(
    model: Any, example: Any, num_classes: int, *, name: str | None = None, **options
) -> Model:
    """Any network as a :class:`Model`, checked against the inputs and the classes.

    Args:
      model: one of

        - a function that takes ``rngs`` (an ``nnx.Rngs``) and returns a Flax NNX
          module, for example ``lambda rngs: MyModule(rngs=rngs)``. The module is called
          with the inputs. Its dropout is on in training and off in evaluation, whether
          its layers hold their own ``rngs``, or its ``__call__`` has an argument
          ``rngs`` (an ``nnx.Rngs`` in training, None in evaluation), ``deterministic``,
          ``train`` or ``training``;
        - a Flax Linen module, with the same arguments for dropout;
        - a pair ``(init, apply)`` of ``init(key)`` and ``apply(params, inputs)`` or
          ``apply(params, inputs, key)``, where the key is None in evaluation;
        - a :class:`Model`, or one of the names in ``MODELS``.
      example: one input without a batch axis, or anything with its ``shape`` and
        ``dtype``. Signed integers are tokens; everything else becomes float32.
      num_classes: how many logits the network must return for each input.
      name: stands in results and error messages; by default the model's own.
      **options: for :func:`make_model`, where ``model`` is a name.

    Returns:
      A :class:`Model`. What an NNX module holds beside its parameters and only reads, a
      table of positions for example, is fixed, and the same for every seed.

    Raises:
      ValueError: in one line, if the network cannot read such inputs, its logits are
        not ``[batch, num_classes]``, a parameter is not of a floating-point dtype, it
        has more than ``MAX_PARAMETERS``, or it changes state beside its parameters
        while it runs, as batch normalisation does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> class Linear(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.layer = nnx.Linear(64, 10, rngs=rngs)
      ...
      ...     def __call__(self, x):
      ...         return self.layer(x.reshape(x.shape[0], -1))
      >>> model = as_model(lambda rngs: Linear(rngs), jnp.zeros((8, 8, 1)), 10)
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((5, 8, 8, 1)), None).shape
      (5, 10)
    """
    if isinstance(model, str):
        made = make_model(model, example.shape, num_classes, **options)
        return made._replace(name=name or model)
    if options:
        raise ValueError(f"{', '.join(options)}: only for models that have a name")
    inputs = _example_batch(example)
    if isinstance(model, Model):
        made = model
    elif isinstance(model, linen.Module):
        made = _from_linen(model, name or type(model).__name__, inputs)
    elif isinstance(model, nnx.Module):
        raise ValueError(
            f"a {type(model).__name__} has its weights already: pass a function that "
            f"makes one, lambda rngs: {type(model).__name__}(..., rngs=rngs)"
        )
    elif isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        made = _from_pair(*model, name or "own")
    elif callable(model):
        made = _from_nnx(model, name or getattr(model, "__name__", "own"))
    else:
        raise ValueError(
            "a model is a name, a function of rngs that returns an nnx.Module, a "
            f"linen.Module or a pair (init, apply), got {type(model).__name__}"
        )
    if name is not None:
        made = made._replace(name=name)
    _check(made, inputs, num_classes)
    return made


def make_model(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    hidden: Sequence[int] = (128, 128),
    vocabulary_size: int = 0,
    width: int = 64,
    heads: int = 4,
    feed_forward: int = 256,
    initialisation: str = "flax",
) -> Model:
    """A network by its name.

    Args:
      name: one of ``MODELS``.
      input_shape: of one example: ``(height, width, channels)``, or ``(length,)`` for
        the tokens of a text.
      num_classes: the number of logits.
      hidden: the widths of the MLP's hidden layers.
      vocabulary_size: the number of different tokens, for the transformer.
      width: the transformer's width.
      heads: the number of its attention heads.
      feed_forward: the width of its feed-forward layer.
      initialisation: ``"flax"``, its layers' own (normal with variance 1 / fan-in,
        biases 0), or ``"pytorch"``, that of PyTorch's layers, for the MLP and the CNN:
        uniform between +-1 / sqrt(fan-in), biases too, a third of that variance.

    Returns:
      A :class:`Model`. Its parameters are float32; inputs are float32 images or int32
      tokens with 0 for padding.

    Raises:
      ValueError: for an unknown name, a model that cannot read such inputs, a size
        below 1, or more than ``MAX_PARAMETERS``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from classp_jax.continual.models import make_model
      >>> model = make_model("mlp", (8, 8, 1), 10, hidden=(32,))
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((5, 8, 8, 1)), None).shape
      (5, 10)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}")
    if initialisation not in INITIALISATIONS:
        raise ValueError(
            f"unknown initialisation {initialisation!r}"
            f"{nearest(initialisation, INITIALISATIONS)}"
        )
    if name == "transformer" and initialisation != "flax":
        raise ValueError(
            f"initialisation {initialisation!r} is for the models 'mlp' and 'cnn'"
        )
    shape = tuple(input_shape)
    if (name == "transformer") != (len(shape) == 1):
        wanted = "text" if name == "transformer" else "images"
        raise ValueError(f"model {name!r} reads {wanted}, got inputs of shape {shape}")
    if name == "cnn" and (len(shape) != 3 or min(shape[:2]) < 6):
        raise ValueError(f"model 'cnn' needs images of at least 6x6, got {shape}")
    if name == "mlp":
        sizes = (math.prod(shape), *hidden, num_classes)
        _check_sizes(hidden=hidden)
        make = lambda rngs: MLP(sizes, rngs)  # noqa: E731
    elif name == "cnn":
        make = lambda rngs: CNN(shape, num_classes, rngs)  # noqa: E731
    else:
        _check_sizes(
            vocabulary_size=[vocabulary_size],
            width=[width],
            heads=[heads],
            feed_forward=[feed_forward],
        )
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        make = lambda rngs: Transformer(  # noqa: E731
            vocabulary_size,
            shape[0],
            num_classes,
            rngs,
            width=width,
            heads=heads,
            feed_forward=feed_forward,
        )
    model = _from_nnx(make, name, plain_arrays=False)
    if initialisation == "pytorch":
        flax_init = model.init
        model = model._replace(init=lambda key: _uniform(flax_init(key), key))
    return model


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        for value in values:
            if not 1 <= value <= MAX_PARAMETERS // 1000:
                raise ValueError(
                    f"{name} must be between 1 and {MAX_PARAMETERS // 1000:,}, "
                    f"got {value}"
                )


def _uniform(params: Params, key: jax.Array) -> Params:
    """Weights and biases from ``U(-b, b)`` with ``b = 1 / sqrt(fan-in)``."""
    names = sorted(params)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    if "kernel" not in params:
        return {name: _uniform(params[name], keys[name]) for name in names}
    bound = math.prod(params["kernel"].shape[:-1]) ** -0.5
    return {
        name: jax.random.uniform(
            keys[name], params[name].shape, minval=-bound, maxval=bound
        )
        for name in names
    }


def _example_batch(example: Any) -> jax.ShapeDtypeStruct:
    """Three examples: a batch whose size is not mistaken for anything else's."""
    tokens = jnp.issubdtype(example.dtype, jnp.signedinteger)
    return jax.ShapeDtypeStruct(
        (3, *example.shape), jnp.int32 if tokens else jnp.float32
    )


def _mode(call: Callable[..., Any], key: jax.Array | None) -> dict[str, Any]:
    """The arguments that tell a module whether it trains, of those it has."""
    told = {
        "deterministic": key is None,
        "train": key is not None,
        "training": key is not None,
    }
    names = inspect.signature(call).parameters
    return {name: value for name, value in told.items() if name in names}


def _from_nnx(
    make: Callable[..., Any], name: str, *, plain_arrays: bool = True
) -> Model:
    def module_of(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        keyword = "rngs" in inspect.signature(make).parameters
        module = make(rngs=rngs) if keyword else make(rngs)
        if not isinstance(module, nnx.Module):
            raise ValueError(
                f"model {name!r} must return an nnx.Module, "
                f"it returned {type(module).__name__}"
            )
        return module

    def parts_of(key: jax.Array) -> tuple[Any, ...]:
        return nnx.split(module_of(key), nnx.Param, nnx.RngState, ...)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(parts_of(key)[1])

    # Inside eval_shape NNX takes a plain array for a static attribute, so a module that
    # may have one is made for good.
    parts = parts_of if plain_arrays else functools.partial(jax.eval_shape, parts_of)
    _check_parameters(name, init)
    graph, params, streams, held = parts(jax.random.key(0))
    structure = jax.tree.structure(params)
    held_leaves, held_structure = jax.tree.flatten(held)

    def reseeded(key: jax.Array | None) -> Any:
        """Each stream of random numbers with a key of its own, counting from 0."""
        key = jax.random.key(0) if key is None else key
        leaves, tree = jax.tree.flatten(streams)
        return tree.unflatten(
            jnp.broadcast_to(jax.random.fold_in(key, i), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        )

    def apply(params: Params, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
        # NNX's state has the same leaves in the same order as its pure dict.
        weights = structure.unflatten(jax.tree.leaves(params))
        held = held_structure.unflatten(map(jnp.asarray, held_leaves))
        module = nnx.merge(graph, weights, reseeded(key), held)
        module.eval() if key is None else module.train()
        before = jax.tree.leaves(nnx.split(module, (nnx.Param, nnx.RngState), ...)[2])
        call = type(module).__call__
        arguments = _mode(call, key)
        if "rngs" in inspect.signature(call).parameters:
            arguments["rngs"] = None if key is None else nnx.Rngs(key)
        logits = module(inputs, **arguments)  # pyright: ignore[reportCallIssue]
        rest = nnx.split(module, (nnx.Param, nnx.RngState), ...)[2]
        after = jax.tree.leaves(rest)
        if len(after) != len(before) or any(
            a is not b for a, b in zip(after, before, strict=True)
        ):
            kinds = {
                type(leaf).__name__
                for leaf in jax.tree.leaves(
                    rest, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
                )
            }
            raise _ChangesStateError(name, sorted(kinds))
        return logits

    return Model(name, init, apply)


class _ChangesStateError(ValueError):
    """The network changes state that only a caller who carries it could keep."""

    def __init__(self, name: str, kinds: Sequence[str]):
        super().__init__(
            f"model {name!r} changes state beside its parameters while it runs "
            f"({', '.join(kinds)}), which is not carried from step to step: use layers "
            "without running statistics, LayerNorm or GroupNorm for example"
        )


def _from_linen(module: linen.Module, name: str, inputs: Any) -> Model:
    call = type(module).__call__

    def variables_of(key: jax.Array) -> Mapping[str, Any]:
        params_key, dropout_key = jax.random.split(key)
        keys = {"params": params_key, "dropout": dropout_key}
        example = jnp.zeros(inputs.shape, inputs.dtype)
        return module.init(keys, example, **_mode(call, key))

    def init(key: jax.Array) -> Params:
        return variables_of(key)["params"]

    def apply(params: Params, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        logits: Any = module.apply(
            {"params": params}, inputs, rngs=rngs, **_mode(call, key)
        )
        return logits

    collections = set(_traced(name, inputs, variables_of, jax.random.key(0)))
    if collections - {"params"}:
        raise _ChangesStateError(name, sorted(collections - {"params"}))
    return Model(name, init, apply)


def _from_pair(init: Callable, apply: Callable, name: str) -> Model:
    positional = [
        p
        for p in inspect.signature(apply).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if len(positional) >= 3:
        return Model(name, init, apply)
    return Model(name, init, lambda params, inputs, key: apply(params, inputs))


def _traced(name: str, inputs: Any, function: Callable, *arguments: Any) -> Any:
    """``jax.eval_shape``; what the network raises becomes one line."""
    try:
        return jax.eval_shape(function, *arguments)
    except _ChangesStateError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {name!r} fails on inputs of shape "
            f"{_batched(inputs.shape)}, {inputs.dtype}: {line}"
        ) from error


def _batched(shape: Sequence[int]) -> str:
    return f"[{', '.join(['batch', *map(str, shape[1:])])}]"


def _check_parameters(name: str, init: Callable[[jax.Array], Params]) -> Params:
    params = jax.eval_shape(init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "the root"
            raise ValueError(
                f"model {name!r} has parameters of dtype {leaf.dtype} at {where}: "
                "they must be floats"
            )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if not 0 < count <= MAX_PARAMETERS:
        raise ValueError(
            f"model {name!r} has {count:,} parameters: at least 1 and at most "
            f"{MAX_PARAMETERS:,} can be trained"
        )
    return params


def _check(model: Model, inputs: jax.ShapeDtypeStruct, num_classes: int) -> None:
    params = _check_parameters(model.name, model.init)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for mode in (None, key):
        logits = _traced(model.name, inputs, model.apply, params, inputs, mode)
        start = f"model {model.name!r} returns"
        if not isinstance(logits, jax.ShapeDtypeStruct):
            raise ValueError(f"{start} a {type(logits).__name__}, not an array")
        if len(logits.shape) != 2 or logits.shape[0] != inputs.shape[0]:
            shape = _batched(logits.shape)
            if logits.shape[:1] != inputs.shape[:1]:
                shape = str(list(logits.shape)) + " for a batch of 3"
            raise ValueError(
                f"{start} an array of shape {shape}: "
                f"logits must be [batch, {num_classes}]"
            )
        if logits.shape[1] != num_classes:
            raise ValueError(
                f"{start} {logits.shape[1]} logits for each input: "
                f"there are {num_classes} classes"
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"{start} logits of dtype {logits.dtype}, not floats")
