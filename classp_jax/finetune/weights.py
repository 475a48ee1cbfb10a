"""Weights in safetensors files, by a table of names and layouts.

For a Flax NNX module, with a head of one's own beside it and LoRA in it or not::

  params = weights.read("folder", nnx.state(model.encoder, nnx.Param), layouts.BERT)
  nnx.update(model.encoder, params)

For the format see https://huggingface.co/docs/safetensors.
"""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from classp_jax.torch_state.layouts import (
    Table,
    by_path,
    read_leaves,
    tensors_of,
    with_leaves,
)

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What NumPy, with JAX's bfloat16, can hold; float8 comes with scales of its own.
_FLOATS = ("F64", "F32", "F16", "BF16")


def read(path: str | os.PathLike[str], params: Any, table: Table) -> Any:
    """Reads parameters from safetensors files.

    The names and shapes of all tensors are checked before the first is read; then one
    is read at a time, so that little more memory is taken than the parameters need.

    What LoRA adds (``lora_a``, ``lora_b``) stays as it is, and the layers beneath are
    found by the names that they had without it.

    Args:
      path: a file; the index of several, ``model.safetensors.index.json``; or a folder
        that holds the one or the other.
      params: a tree like the one wanted, such as ``nnx.state(model, nnx.Param)``, of
        arrays or ``jax.ShapeDtypeStruct``. Only shapes, dtypes and shardings count.
      table: tensor names to layouts, such as :data:`classp_jax.finetune.layouts.LLAMA`.

    Returns:
      The tree with what the files hold, converted to the dtypes of ``params``.

    Raises:
      ValueError: if tensors are missing, left over, of another shape or no floats (all
        are named), or if a file is damaged.
      FileNotFoundError: if a file is not there, be it named by the caller or an index.
    """
    places = _places(params)
    leaves = {name: leaf for name, (_, leaf) in places.items()}
    with contextlib.ExitStack() as stack:
        files = [_opened(file, stack) for file in _files(pathlib.Path(path))]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        shapes = {
            name: tuple(file.get_slice(name).get_shape())
            for name, file in holders.items()
        }
        found = read_leaves(
            leaves,
            table,
            shapes,
            lambda name: _tensor(holders[name], name, path),
            str(path),
        )
    return with_leaves(params, {places[name][0]: x for name, x in found.items()})


def write(
    path: str | os.PathLike[str],
    params: Any,
    table: Table,
    *,
    max_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters as safetensors files that :func:`read` and others read.

    All are complete before the first replaces one of its name. What an earlier call
    left in the folder under other names of the scheme (``model.safetensors``,
    ``model-00001-of-00002.safetensors``, the index) is then removed, or it would be
    read in place of these.

    Args:
      path: a file, ``….safetensors``, or a folder, for several files with an index
        where one would be larger than ``max_bytes``. A folder that is not there is
        made.
      params: the parameters, such as ``nnx.state(model, nnx.Param)``; written in their
        own dtypes.
      table: as for :func:`read`. Tensors that it leaves out are not written.
      max_bytes: the size of a file in a folder; a larger tensor has one to itself.

    Raises:
      ValueError: if the table has no tensor for some parameters (all are named), or if
        there is LoRA in them, which these files have no names for.
    """
    path = pathlib.Path(path)
    leaves = by_path(params)
    lora = [place for place in leaves if _is_lora(place)]
    if lora:
        raise ValueError(
            "Add LoRA's products to the weights beneath, or save what "
            f"nnx.state(model, nnx.LoRAParam) holds. LoRA: {', '.join(lora)}."
        )
    tensors = tensors_of(leaves, table)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path.parent, {path.name: tensors})
        return
    path.mkdir(parents=True, exist_ok=True)
    parts = _split(tensors, max_bytes)
    index = None
    files = {_FILE: tensors}
    if len(parts) > 1:
        files = {
            f"model-{number:05}-of-{len(parts):05}.safetensors": {
                name: tensors[name] for name in names
            }
            for number, names in enumerate(parts, start=1)
        }
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _save(path, files, index)
    written = {*files, _INDEX} if index else {*files}
    for file in path.iterdir():
        in_scheme = file.name in (_FILE, _INDEX) or _SHARD.fullmatch(file.name)
        if in_scheme and file.name not in written:
            file.unlink()


def _is_lora(place: str) -> bool:
    return place.rpartition("/")[2] in ("lora_a", "lora_b")


def _places(params: Any) -> dict[str, tuple[str, Any]]:
    """Leaves by the path that they have without LoRA, with the one that they have."""
    return {
        place.replace("/base_module/", "/"): (place, leaf)
        for place, leaf in by_path(params).items()
        if not _is_lora(place)
    }


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_dir():
        candidates = [path / _INDEX, path / _FILE]
        found = [candidate for candidate in candidates if candidate.exists()]
        if not found:
            raise FileNotFoundError(f"Neither {_FILE} nor {_INDEX} is in {path}.")
        path = found[0]
    if path.suffix != ".json":
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}.")
        return [path]
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files: it needs a 'weight_map' from "
            "tensor names to files."
        ) from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{path} names files that are not beside it: {', '.join(missing)}."
        )
    return files


def _opened(file: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}): get it once more."
        ) from error


def _tensor(file: Any, name: str, path: Any) -> Any:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _FLOATS:
        raise ValueError(
            f"{path}: tensor {name} is of dtype {dtype}; {', '.join(_FLOATS)} can be "
            "read, not quantized weights."
        )
    return file.get_tensor(name)


def _split(tensors: dict[str, Any], max_bytes: int) -> list[list[str]]:
    """The tensors' names, file by file."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > max_bytes and parts[-1]:
            parts.append([])
            size = tensor.nbytes
        parts[-1].append(name)
    return parts


def _save(folder: pathlib.Path, files: dict[str, Any], index: Any = None) -> None:
    """All files, and then the index, complete before the first of them is replaced."""
    names = [*files, _INDEX] if index else [*files]
    parts = {name: folder / f"{name}.part" for name in names}
    try:
        for name, tensors in files.items():
            # Other libraries ask in which framework the layouts are at home.
            save_file(tensors, parts[name], metadata={"format": "pt"})
        if index:
            parts[_INDEX].write_text(json.dumps(index, indent=2), encoding="utf-8")
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
