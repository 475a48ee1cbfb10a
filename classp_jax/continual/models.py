"""Networks behind a pure pair ``init`` and ``apply``: by name, or the user's own."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from classp_jax.continual._names import nearest
from classp_jax.continual.adapters import (
    MAX_PARAMETERS,
    Model,
    Params,
    batched,
    check_parameters,
    from_linen,
    from_nnx,
    from_pair,
    traced,
)
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.networks import (
    ACTIVATIONS,
    CNN,
    MLP,
    DropoutMLP,
    Transformer,
)

MODELS = {
    "mlp": "fully connected ReLU network, --hidden names its widths",
    "cnn": "the CLASSP paper's: two 3x3 convolutions, max-pool, dropout, dense 128",
    "transformer": "one encoder layer over 30 tokens, for text",
}

INITIALISATIONS = ("flax", "pytorch")


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
      ContinualError: in one line, if the network cannot read such inputs, its logits
        are not ``[batch, num_classes]``, a parameter is not of a floating-point dtype,
        it has more than ``MAX_PARAMETERS``, or it changes state beside its parameters
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
        tokens = jnp.issubdtype(example.dtype, jnp.signedinteger)
        if model in MODELS and tokens != (model == "transformer"):
            raise ContinualError(
                f"model {model!r} reads {'images' if tokens else 'text'}, "
                f"the data is {'text' if tokens else 'images'}"
            )
        network = make_model(model, example.shape, num_classes, **options)
        return network._replace(name=name or model)
    if options:
        raise ContinualError(f"{', '.join(options)}: only for models that have a name")
    inputs = example_batch(example)
    if isinstance(model, Model):
        network = model
    elif isinstance(model, linen.Module):
        network = from_linen(model, name or type(model).__name__, inputs)
    elif isinstance(model, nnx.Module):
        raise ContinualError(
            f"a {type(model).__name__} has its weights already: pass a function that "
            f"makes one, lambda rngs: {type(model).__name__}(..., rngs=rngs)"
        )
    elif isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        network = from_pair(*model, name or "own")
    elif callable(model):
        network = from_nnx(model, name or getattr(model, "__name__", "own"))
    else:
        raise ContinualError(
            "a model is a name, a function of rngs that returns an nnx.Module, a "
            f"linen.Module or a pair (init, apply), got {type(model).__name__}"
        )
    if name is not None:
        network = network._replace(name=name)
    _check(network, inputs, num_classes)
    return network


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
    activation: str = "relu",
    dropout: float = 0.0,
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
      activation: of the MLP: ``"relu"``, or ``"hard-ash"``, which is sparse.
      dropout: share of the MLP's hidden units that are left out in training.

    Returns:
      A :class:`Model`. Its parameters are float32; inputs are float32 images or int32
      tokens with 0 for padding.

    Raises:
      ContinualError: for an unknown name, a model that cannot read such inputs, a size
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
        raise ContinualError(f"unknown model {name!r}{nearest(name, MODELS)}")
    if initialisation not in INITIALISATIONS:
        raise ContinualError(
            f"unknown initialisation {initialisation!r}"
            f"{nearest(initialisation, INITIALISATIONS)}"
        )
    if name == "transformer" and initialisation != "flax":
        raise ContinualError(
            f"initialisation {initialisation!r} is for the models 'mlp' and 'cnn'"
        )
    shape = tuple(input_shape)
    if name == "transformer" and len(shape) != 1:
        raise ContinualError(f"model 'transformer' reads text, got inputs of {shape}")
    if name == "cnn" and (len(shape) != 3 or min(shape[:2]) < 6):
        raise ContinualError(f"model 'cnn' needs images of at least 6x6, got {shape}")
    if name == "mlp":
        sizes = (math.prod(shape), *hidden, num_classes)
        _check_sizes(hidden=hidden)
        if activation not in ACTIVATIONS:
            raise ContinualError(
                f"unknown activation {activation!r}{nearest(activation, ACTIVATIONS)}"
            )
        if not 0 <= dropout < 1:
            raise ContinualError(f"dropout must be at least 0, below 1: {dropout}")
        make = lambda rngs: (  # noqa: E731
            DropoutMLP(sizes, rngs, activation, dropout)
            if dropout
            else MLP(sizes, rngs, activation)
        )
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
            raise ContinualError(f"width {width} is not a multiple of heads {heads}")
        make = lambda rngs: Transformer(  # noqa: E731
            vocabulary_size,
            shape[0],
            num_classes,
            rngs,
            width=width,
            heads=heads,
            feed_forward=feed_forward,
        )
    model = from_nnx(make, name, plain_arrays=False)
    if initialisation == "pytorch":
        flax_init = model.init
        model = model._replace(init=lambda key: _uniform(flax_init(key), key))
    return model


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        for value in values:
            if not 1 <= value <= MAX_PARAMETERS // 1000:
                raise ContinualError(
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


def example_batch(example: Any) -> jax.ShapeDtypeStruct:
    """Three examples: a batch whose size is not mistaken for anything else's."""
    tokens = jnp.issubdtype(example.dtype, jnp.signedinteger)
    return jax.ShapeDtypeStruct(
        (3, *example.shape), jnp.int32 if tokens else jnp.float32
    )


def _check(model: Model, inputs: jax.ShapeDtypeStruct, num_classes: int) -> None:
    params = check_parameters(model.name, model.init)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for mode in (None, key):
        logits = traced(model.name, inputs, model.apply, params, inputs, mode)
        start = f"model {model.name!r} returns"
        if not isinstance(logits, jax.ShapeDtypeStruct):
            raise ContinualError(f"{start} a {type(logits).__name__}, not an array")
        if len(logits.shape) != 2 or logits.shape[0] != inputs.shape[0]:
            shape = batched(logits.shape)
            if logits.shape[:1] != inputs.shape[:1]:
                shape = str(list(logits.shape)) + " for a batch of 3"
            raise ContinualError(
                f"{start} an array of shape {shape}: "
                f"logits must be [batch, {num_classes}]"
            )
        if logits.shape[1] != num_classes:
            raise ContinualError(
                f"{start} {logits.shape[1]} logits for each input: "
                f"there are {num_classes} classes"
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ContinualError(f"{start} logits of dtype {logits.dtype}, not floats")
