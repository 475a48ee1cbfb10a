"""Networks of other libraries as a pure pair ``init`` and ``apply``."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from classp_jax.continual.errors import ContinualError

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


MAX_PARAMETERS = 10**9
"""More are refused: they take 4 GB in float32, and training several times that."""


def _mode(call: Callable[..., Any], key: jax.Array | None) -> dict[str, Any]:
    """The arguments that tell a module whether it trains, of those it has."""
    told = {
        "deterministic": key is None,
        "train": key is not None,
        "training": key is not None,
    }
    names = inspect.signature(call).parameters
    return {name: value for name, value in told.items() if name in names}


def parameters_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A factory's parameters: NNX hides those of a class, Linen adds two of its own."""
    if isinstance(make, functools.partial):
        make = make.func
    if not inspect.isclass(make):
        return dict(inspect.signature(make).parameters)
    parameters = inspect.signature(make.__init__).parameters
    theirs = ("parent", "name") if issubclass(make, linen.Module) else ()
    return {k: p for k, p in parameters.items() if k not in ("self", *theirs)}


def from_nnx(
    make: Callable[..., Any], name: str, *, plain_arrays: bool = True
) -> Model:
    """A function of ``rngs`` that returns an NNX module.

    Args:
      make: the function.
      name: of the model.
      plain_arrays: whether the module may hold arrays that are not NNX variables; it
        is made once more to find them.
    """

    def module_of(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        keyword = "rngs" in parameters_of(make)
        module = make(rngs=rngs) if keyword else make(rngs)
        if not isinstance(module, nnx.Module):
            raise ContinualError(
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
    check_parameters(name, init)
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
        before = _held_by(module)
        call = type(module).__call__
        arguments = _mode(call, key)
        if "rngs" in inspect.signature(call).parameters:
            arguments["rngs"] = None if key is None else nnx.Rngs(key)
        logits = module(inputs, **arguments)  # pyright: ignore[reportCallIssue]
        changed = {
            kind
            for path, (kind, leaves) in _held_by(module).items()
            if path not in before
            or any(a is not b for a, b in zip(leaves, before[path][1], strict=True))
        }
        if changed:
            raise _changes_state(name, changed)
        return logits

    return Model(name, init, apply)


def _held_by(module: nnx.Module) -> dict[Any, tuple[str, list[Any]]]:
    """What a module holds beside parameters and random streams, by its path."""
    _, _, state = nnx.split(module, (nnx.Param, nnx.RngState), ...)
    return {
        path: (type(leaf).__name__, jax.tree.leaves(leaf))
        for path, leaf in nnx.to_flat_state(state)
    }


def _changes_state(name: str, kinds: Iterable[str]) -> ContinualError:
    return ContinualError(
        f"model {name!r} changes state beside its parameters while it runs "
        f"({', '.join(sorted(kinds))}), which is not carried from step to step: use "
        "layers without running statistics, LayerNorm or GroupNorm for example"
    )


def from_linen(module: linen.Module, name: str, inputs: Any) -> Model:
    """A Linen module, whose parameters are shaped by the inputs."""
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

    key = jax.random.key(0)
    collections = set(traced(name, inputs, variables_of, key)) - {"params"}
    if collections:
        raise _changes_state(name, collections)
    return Model(name, init, apply)


def from_pair(init: Callable, apply: Callable, name: str) -> Model:
    """``init(key)`` and ``apply(params, inputs)`` or ``apply(params, inputs, key)``."""
    positional = [
        p
        for p in inspect.signature(apply).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if len(positional) >= 3:
        return Model(name, init, apply)
    return Model(name, init, lambda params, inputs, key: apply(params, inputs))


def traced(name: str, inputs: Any, function: Callable, *arguments: Any) -> Any:
    """``jax.eval_shape``; what the network raises becomes one line."""
    try:
        return jax.eval_shape(function, *arguments)
    except ContinualError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ContinualError(
            f"model {name!r} fails on inputs of shape "
            f"{batched(inputs.shape)}, {inputs.dtype}: {line}"
        ) from error


def batched(shape: Sequence[int]) -> str:
    """A batch's shape in words."""
    return f"[{', '.join(['batch', *map(str, shape[1:])])}]"


def check_parameters(name: str, init: Callable[[jax.Array], Params]) -> Params:
    """The shapes of the parameters, if all are floats and not too many."""
    params = jax.eval_shape(init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "the root"
            raise ContinualError(
                f"model {name!r} has parameters of dtype {leaf.dtype} at {where}: "
                "they must be floats"
            )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if not 0 < count <= MAX_PARAMETERS:
        raise ContinualError(
            f"model {name!r} has {count:,} parameters: at least 1 and at most "
            f"{MAX_PARAMETERS:,} can be trained"
        )
    return params
