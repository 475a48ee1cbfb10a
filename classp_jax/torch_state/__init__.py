"""Weights and accumulators of the published PyTorch class, from and to JAX.

Moving a checkpoint over takes three lines. A table says which tensor is which leaf, and
how it is turned; ``params`` gives tree, shapes and dtypes, its numbers are not used::

  saved = torch_state.read("checkpoint.pt", params, table)
  tx = classp_jax.classp_published(**saved.hyperparams)
  state = optax.tree.set(tx.init(saved.params), accumulator=saved.accumulators)

The table names each tensor of ``model.state_dict()``::

  from classp_jax.torch_state import conv, dense, flat, same

  table = {
      "conv.weight": conv("conv/kernel"),  # OIHW to HWIO
      "conv.bias": same("conv/bias"),
      "norm.running_mean": None,  # left out
      "tokens.weight": same("tokens/embedding"),
      "layers.{}.linear1.weight": dense("layers/{}/mlp/kernel"),  # {}: a number
      # nn.MultiheadAttention keeps three leaves in one tensor; NNX has heads.
      "layers.{}.self_attn.in_proj_weight": dense(
          "layers/{}/query/kernel", "layers/{}/key/kernel", "layers/{}/value/kernel"
      ),
      "layers.{}.self_attn.in_proj_bias": flat(
          "layers/{}/query/bias", "layers/{}/key/bias", "layers/{}/value/bias"
      ),
      "layers.{}.self_attn.out_proj.weight": dense("layers/{}/out/kernel", inputs=2),
  }

One thing no table can turn: PyTorch flattens images with the channels first. Before the
first dense layer, transpose the activations to channels first, too.

Reading and writing files needs ``torch``; it is imported only then.
"""

import os
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from classp_jax.torch_state.layouts import (
    Layout,
    Table,
    by_path,
    conv,
    dense,
    flat,
    read_leaves,
    same,
    tensor_shapes,
    tensors_of,
    with_leaves,
)

__all__ = ["Checkpoint", "Layout", "conv", "dense", "flat", "read", "same", "write"]

# The class's names for the arguments of `classp_published`.
_HYPERPARAMS = {
    "learning_rate": "lr",
    "threshold": "threshold",
    "power": "power",
    "eps": "epsilon",
    "scaling": "apply_scaling",
}


class Checkpoint(NamedTuple):
    """What the published class saves, as trees of JAX's arrays."""

    params: Any
    """The weights."""
    accumulators: Any
    """The class's ``grad_sum``, a tree like the weights; 0 where no gradient came."""
    hyperparams: dict[str, Any]
    """The arguments of :func:`classp_jax.classp_published`. The class lets its first
    parameter group's hyperparameters act on all; these are the first group's."""
    names: tuple[str, ...]
    """The parameters' names in PyTorch, as the optimizer numbers them."""


def read(
    file: str | os.PathLike[str] | IO[bytes],
    params: Any,
    table: Table,
    *,
    names: Sequence[str] | None = None,
) -> Checkpoint:
    """Reads a checkpoint of the published class; no code in the file is run.

    Args:
      file: what the class's ``save_checkpoint`` wrote, with model and optimizer, or its
        ``save_optimizer``, with the optimizer alone.
      params: a tree like the one wanted: a plain tree or the state of an NNX module, of
        arrays or ``jax.ShapeDtypeStruct``. Only shapes, dtypes and shardings count; but
        to an optimizer alone they are the weights, and returned as they are.
      table: tensor names to layouts, as this module's documentation shows.
      names: of the parameters, in the order in which the optimizer was given them; by
        default that of ``model.parameters()``. Needed for an optimizer alone, and where
        it was given some of the parameters only, or in groups.

    Returns:
      Weights, accumulators, hyperparameters and names. Numbers are converted to the
      dtypes of ``params``, which rounds where those are narrower.

    Raises:
      ValueError: if the file is damaged or no such checkpoint, or if tensors are
        missing, left over or of another shape: all are named.
      ImportError: if PyTorch is not installed.
    """
    label = str(file) if isinstance(file, str | os.PathLike) else "the file"
    model, optimizer = _parts(_loaded(file, label), label)
    leaves = by_path(params)
    weights: dict[str, Any] = {}
    if model is not None:
        weights = _read(leaves, table, model, f"The model in {label}")
    shapes = tensor_shapes(leaves, table)
    order = _names(optimizer, model, shapes, names, label)
    sums = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    sums |= {
        name: optimizer["state"][number]["grad_sum"]
        for number, name in enumerate(order)
        # Where no gradient ever came there is none, and the sum is 0.
        if "grad_sum" in optimizer["state"].get(number, {})
    }
    accumulators = _read(leaves, table, sums, f"The optimizer in {label}")
    group = optimizer["param_groups"][0]
    return Checkpoint(
        params=with_leaves(params, weights),
        accumulators=with_leaves(params, accumulators),
        hyperparams={
            ours: _to_number(group[theirs]) for ours, theirs in _HYPERPARAMS.items()
        },
        names=order,
    )


def write(
    file: str | os.PathLike[str] | IO[bytes], checkpoint: Checkpoint, table: Table
) -> None:
    """Writes what the published class's ``load_checkpoint`` reads.

    To go on in PyTorch after training in JAX::

      trained = saved._replace(
          params=params, accumulators=classp_jax.accumulators(state)
      )
      torch_state.write("trained.pt", trained, table)

    Args:
      file: where to; an existing file is replaced.
      checkpoint: what :func:`read` returned, with other arrays, or one of your own. All
        parameters become one parameter group.
      table: as for :func:`read`. Tensors that it leaves out are not written.

    Raises:
      ValueError: if the table has no tensor for some parameters, or no tensor has one
        of the names: all are named.
      ImportError: if PyTorch is not installed.
    """
    torch = _torch()
    model = tensors_of(by_path(checkpoint.params), table)
    sums = tensors_of(by_path(checkpoint.accumulators), table)
    unknown = [name for name in checkpoint.names if name not in sums]
    if unknown:
        raise ValueError(f"The table has no tensor named {', '.join(unknown)}.")
    group: dict[str, Any] = {
        theirs: checkpoint.hyperparams[ours] for ours, theirs in _HYPERPARAMS.items()
    }
    group["params"] = list(range(len(checkpoint.names)))
    state = {
        number: {"grad_sum": _to_torch(sums[name])}
        for number, name in enumerate(checkpoint.names)
    }
    saved = {
        "model_state_dict": {name: _to_torch(array) for name, array in model.items()},
        "optimizer_state_dict": {"state": state, "param_groups": [group]},
    }
    torch.save(saved, file)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch's files are read and written by PyTorch itself: pip install torch"
        ) from error
    return torch


def _loaded(file: Any, label: str) -> Any:
    torch = _torch()
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # What PyTorch raises depends on the byte that it cannot make sense of.
    except Exception as error:
        raise ValueError(
            f"{label} is damaged, not a file of PyTorch's, or holds more than tensors "
            "and numbers: nothing was read, and no code in it was run."
        ) from error


def _parts(saved: Any, label: str) -> tuple[Any, Any]:
    """The model's and the optimizer's state; None for a model that is not there."""
    saved = saved if isinstance(saved, Mapping) else {}
    whole = "optimizer_state_dict" in saved and "model_state_dict" in saved
    model = saved["model_state_dict"] if whole else None
    optimizer = saved["optimizer_state_dict"] if whole else saved
    if not ("state" in optimizer and optimizer.get("param_groups")):
        raise ValueError(
            f"{label} is no checkpoint of the published class: neither "
            "'model_state_dict' and 'optimizer_state_dict' nor an optimizer's 'state' "
            f"and 'param_groups' are in it. Found: {', '.join(map(str, saved))}."
        )
    absent = [k for k in _HYPERPARAMS.values() if k not in optimizer["param_groups"][0]]
    if absent:
        raise ValueError(
            f"{label} was written by another optimizer: its parameter group has no "
            f"{', '.join(absent)}."
        )
    return model, optimizer


def _names(
    optimizer: Any, model: Any, shapes: Any, names: Sequence[str] | None, label: str
) -> tuple[str, ...]:
    """The parameters' names, as the optimizer numbers them."""
    groups = optimizer["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and model is not None:
        names = [name for name in model if name in shapes]
    if names is None:
        raise ValueError(
            f"{label} holds an optimizer without its model, and numbers instead of "
            "names: give names, in the order of model.named_parameters()."
        )
    if len(names) != count:
        raise ValueError(
            f"The optimizer in {label} has {count} parameters, but there are "
            f"{len(names)} names: give names, in the order in which it was given them. "
            f"Names: {', '.join(names)}."
        )
    return tuple(names)


def _read(leaves: Any, table: Table, tensors: Mapping[str, Any], source: str) -> Any:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return read_leaves(leaves, table, shapes, lambda n: _to_numpy(tensors[n]), source)


def _to_numpy(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = _torch()
    tensor = tensor.detach()  # nn.Parameter
    if tensor.dtype == torch.bfloat16:  # NumPy has it from JAX only.
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _to_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # lr may be a tensor


def _to_torch(array: np.ndarray) -> Any:
    torch = _torch()
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
