"""Importance: measured on old data, saved beside a checkpoint, put into a state."""

import importlib
import json
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils

from classp_jax._arrays import (
    float_arrays,
    path_name,
    unwrapped,
    working_dtype,
    wrapped_like,
)
from classp_jax._hyperparams import non_negative
from classp_jax.importance import accumulators
from classp_jax.importance._states import accumulators_in, map_accumulators

_FORMAT = "classp_jax importance 1"
# In a folder: its format, and which files were written.
_MARK = "classp_jax_importance.json"


def gradients(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    per_example: bool = False,
    wrt: Any = None,
) -> Iterator[Any]:
    r"""The gradients of old data, for :func:`classp_jax.accumulate_importance`.

    A generator: a batch is read and its gradient taken when it is asked for, with one
    compiled function for all batches of one shape::

      old = finetune.gradients(loss, params, batches, per_example=True)
      state = accumulate_importance(tx, state, params, old, per_example=True)

    Args:
      loss: ``(params, batch) -> scalar``, the mean over the batch, as in training.
      params: the pretrained weights, any tree of floats; or a Flax NNX module, which
        the loss then takes in their place. It stays as it is, also in training mode:
        dropout draws anew for each batch, or example, and running statistics are not
        updated. ``BatchNorm`` that normalises over a single example leaves nothing to
        measure: with ``per_example`` let it use its running statistics.
      batches: anything that yields batches, each an array or a tree of arrays with the
        examples along the first axis.
      per_example: whether to take the gradient of every example by itself, which the
        loss then sees as a batch of one. They say more than a batch's mean, in which
        examples cancel; each takes as much memory as the parameters.
      wrt: for an NNX module, which variables to differentiate, as in
        ``nnx.Optimizer``; by default ``nnx.Param``.

    Yields:
      A tree like ``params``, with ``per_example`` of ``[examples, *shape]``. For an NNX
      module an ``nnx.State``.

    Raises:
      ValueError: if a batch's arrays differ in their numbers of examples or have none.
      TypeError: if a parameter is not of floats.

    Example:
      >>> import classp_jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import finetune
      >>> tx = classp_jax.classp(0.1)
      >>> w = jnp.array([1.0, -2.0])
      >>> batches = [jnp.array([[1.0, 0.0], [3.0, 0.0]])]
      >>> old = finetune.gradients(lambda w, x: (x @ w).mean(), w, batches)
      >>> state = classp_jax.accumulate_importance(tx, tx.init(w), w, old)
      >>> print(classp_jax.accumulators(state))
      [2. 0.]
    """
    of_tree: Any = lambda params, batch, _: loss(params, batch)  # noqa: E731
    if _is_nnx_module(params):
        from flax import nnx

        graph, params, rest = nnx.split(params, wrt or nnx.Param, ...)

        def with_draw(variable: Any, draw: Any) -> Any:
            if not isinstance(variable, nnx.RngKey):
                return variable
            fold = jnp.vectorize(jax.random.fold_in)
            return variable.replace(fold(variable.get_value(), draw))

        def of_parts(params: Any, batch: Any, draw: Any) -> Any:
            drawn = jax.tree.map(
                lambda variable: with_draw(variable, draw),
                rest,
                is_leaf=lambda node: isinstance(node, nnx.Variable),
            )
            # A copy: in training mode a module changes its counts and statistics.
            return loss(nnx.merge(graph, params, drawn, copy=True), batch)

        of_tree = of_parts

    float_arrays(unwrapped(params), "parameter")

    def of_one(params: Any, example: Any, draw: Any) -> Any:
        return of_tree(params, jax.tree.map(lambda x: x[None], example), draw)

    if per_example:
        gradient = jax.jit(jax.vmap(jax.grad(of_one), in_axes=(None, 0, 0)))
    else:
        gradient = jax.jit(jax.grad(of_tree))
    drawn = 0
    for number, batch in enumerate(batches):
        lengths = {(*jnp.shape(x), 0)[0] for x in jax.tree.leaves(batch)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"In batch {number} the arrays have {sorted(lengths)} examples along "
                "their first axes; one number above 0 is needed."
            )
        count = lengths.pop() if per_example else 1
        draws = np.arange(drawn, drawn + count, dtype=np.uint32)
        drawn += count
        yield gradient(params, batch, draws if per_example else draws[0])


def importance_from_magnitude(params: Any) -> Any:
    r"""Importance without old data: the weights' own magnitude.

    Of each weight :math:`w_i` in ``params``, the size against the mean size of all:

    .. math::
      A_i = \frac{|w_i|}{\frac{1}{n} \sum_j |w_j|}

    over all :math:`n` weights, so that the mean is 1 and ``eps`` of
    :func:`classp_jax.protect` counts in means. It says only that large weights were
    made large for a reason. On images no difference to 1,000 old examples was found:
    -1.2 (-6.6 to +4.2) points were kept more than with these. On a language model it
    protected nothing, -41.6 (-45.3 to -38.0) hundredths of a nat a word, where ten old
    examples did almost as well as 1,000; see ``docs/finetuning.md``. Put it into a
    state with :func:`put_importance`.

    Args:
      params: the pretrained weights, a tree of real floats, or NNX's variables.

    Returns:
      A tree of arrays like ``params``, of float32 or the parameters' dtype if wider.

    Raises:
      TypeError: if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import finetune
      >>> print(finetune.importance_from_magnitude(jnp.array([1.0, -3.0, 0.0, 0.0])))
      [1. 3. 0. 0.]
    """
    params = float_arrays(unwrapped(params), "parameter", real=True)
    sizes = jax.tree.map(lambda w: jnp.abs(w).astype(working_dtype(w)), params)
    leaves = jax.tree.leaves(sizes)
    count = sum(leaf.size for leaf in leaves)
    means = [jnp.sum(leaf).astype(jnp.float32) / max(count, 1) for leaf in leaves]
    mean = sum(means, jnp.zeros([], jnp.float32))
    scale = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1.0), 0.0)
    return jax.tree.map(lambda a: a * scale.astype(a.dtype), sizes)


def put_importance(
    state: Any, importance: Any, *, strength: jax.typing.ArrayLike = 1.0
) -> Any:
    """Puts importance from elsewhere into the accumulators of an optimizer state.

    Args:
      state: any optimizer state with accumulators, also that of an ``nnx.Optimizer``
        or inside ``optax.MultiSteps``.
      importance: a tree like the parameters, such as ``accumulators(other_state)``;
        NNX's variables may stand in the arrays' places.
      strength: what it is multiplied by; a number of at least 0 or a scalar array.

    Returns:
      The state with these accumulators in place of its own, of its dtypes and on its
      devices. Nothing else changes.

    Raises:
      ValueError: if the state holds no accumulator, or if names or shapes differ from
        the parameters that the state was made for; all differences are named.

    Example:
      >>> import classp_jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import finetune
      >>> params = jnp.array([1.0, -3.0])
      >>> state = classp_jax.classp(0.1).init(params)
      >>> importance = finetune.importance_from_magnitude(params)
      >>> state = finetune.put_importance(state, importance, strength=10.0)
      >>> print(classp_jax.accumulators(state))
      [ 5. 15.]
    """
    strength = non_negative("strength", strength)
    found = by_name(importance, "importance")
    require_same(found, by_name(accumulators(state), "state"), "The importance")

    def replaced(path: Any, old: Any) -> Any:
        new = jnp.asarray(found[path_name(path)]).astype(working_dtype(old))
        new = (new * jnp.asarray(strength, new.dtype)).astype(old.dtype)
        is_placed = isinstance(old, jax.Array) and not isinstance(old, Tracer)
        return jax.device_put(new, old.sharding) if is_placed else new

    # One tree: where several transforms have a part of the weights each, every one
    # takes the leaves that it has.
    def replaced_all(sums: Any) -> Any:
        new = jax.tree_util.tree_map_with_path(replaced, unwrapped(sums))
        return wrapped_like(new, sums)

    return map_accumulators(replaced_all, state)


def save_importance(file: str | os.PathLike[str], importance: Any, params: Any) -> None:
    """Writes importance to a file that goes with a checkpoint.

    Whoever fine-tunes the checkpoint then needs no old data: :func:`load_importance`.

    Args:
      file: ``NAME.safetensors`` for one file, whose tensors are named by their paths,
        such as ``encoder/kernel``; any other name for a folder that Orbax writes, each
        process its own shards. Importance that stands there is replaced, nothing else.
      importance: an optimizer state with accumulators, or a tree like ``params``.
      params: the weights of the checkpoint. Where a state is masked, its own part of
        them is saved.

    Raises:
      ValueError: if names or shapes differ from those of ``params`` (all differences
        are named), or if a number is NaN, infinite or negative. Nothing is written.
      FileExistsError: if something else stands there, be it one file in a folder of
        importance. Nothing is written.
      FileNotFoundError: if there is no folder to write into.
      ImportError: if ``safetensors`` or ``orbax-checkpoint`` is missing.

    Example:
      >>> import tempfile
      >>> import classp_jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import finetune
      >>> params = {"w": jnp.array([1.0, -3.0])}
      >>> tx = classp_jax.classp(0.1)
      >>> state = tx.init(params)
      >>> state = classp_jax.accumulate_importance(tx, state, params, params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = f"{folder}/model.importance.safetensors"
      ...     finetune.save_importance(file, state, params)
      ...     state = finetune.load_importance(file, tx.init(params))
      >>> print(classp_jax.accumulators(state)["w"])
      [1. 3.]
    """
    tree = accumulators(importance) if accumulators_in(importance) else importance
    found, expected = by_name(tree, "importance"), by_name(params, "parameters")
    masked = tuple(f"{name}/" for name in _masked_names(tree))
    expected = {n: w for n, w in expected.items() if not f"{n}/".startswith(masked)}
    require_same(found, expected, "The importance")
    wide = {n: jnp.asarray(a).astype(working_dtype(a)) for n, a in found.items()}
    require_sums(wide, "The importance")
    target = pathlib.Path(file).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to write into.")
    if not _is_replaceable(target):
        raise FileExistsError(
            f"{target} is no importance that save_importance wrote, or holds other "
            "files too: it is left as it is. Take another name, or remove it."
        )
    # Written beside it and moved: a crash leaves what stood there.
    if target.suffix == ".safetensors":
        numpy_files = _imported("safetensors.numpy", "safetensors")
        arrays = {n: np.ascontiguousarray(a) for n, a in wide.items()}
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            numpy_files.save_file(arrays, part, metadata={"format": _FORMAT})
            part.replace(target)
        finally:
            _remove(part)
    else:
        _save_folder(target, wide)


def load_importance(
    file: str | os.PathLike[str], state: Any, *, strength: jax.typing.ArrayLike = 1.0
) -> Any:
    """Reads what :func:`save_importance` wrote into an optimizer state.

    The power of the transform should be the one that the sums were made with: a sum of
    squares is none of magnitudes.

    Args:
      file: the file or folder.
      state: a state with accumulators, such as ``tx.init(params)`` or
        ``optimizer.opt_state`` of an ``nnx.Optimizer``; see :func:`put_importance`.
      strength: what the sums are multiplied by.

    Returns:
      The state with these accumulators in place of its own.

    Raises:
      FileNotFoundError: if there is nothing of that name.
      ValueError: if the file is truncated or no such file, if it is of another network
        (all missing, unexpected and misshapen tensors are named), or if a number in it
        is NaN, infinite or negative.
      ImportError: if ``safetensors`` or ``orbax-checkpoint`` is missing.
    """
    source = pathlib.Path(file).absolute()
    if not source.exists():
        raise FileNotFoundError(f"There is no importance at {source}.")
    expected = accumulators(state)
    names = by_name(expected, "state")
    try:
        if source.is_dir():
            found = _read_orbax(source, names)
        else:
            numpy_files = _imported("safetensors.numpy", "safetensors")
            found = numpy_files.load_file(source)
    except ImportError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source} cannot be read as importance; it may be truncated, or something "
            f"else: {reason}"
        ) from error
    what = f"{source} is importance of another network: it"
    require_same(found, names, what)
    require_sums(found, f"The importance in {source}")
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: found[path_name(path)], expected
    )
    return put_importance(state, tree, strength=strength)


def _save_folder(target: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes a folder; of several processes, the first puts it in its place."""
    orbax = _imported("orbax.checkpoint", "orbax-checkpoint")
    alone = jax.process_count() == 1
    # One name for all processes.
    part = target.with_name(
        f".{target.name}.{uuid.uuid4().hex if alone else 'writing'}"
    )
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(part, arrays, force=not alone)
        if jax.process_index() == 0:
            mark = {"format": _FORMAT, "files": sorted(_files_in(part))}
            (part / _MARK).write_text(json.dumps(mark), encoding="utf-8")
            _swap(part, target)
    finally:
        if jax.process_index() == 0:
            _remove(part)
        if not alone:
            multihost_utils.sync_global_devices(f"importance in {target}")


def _read_orbax(source: pathlib.Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a folder; those that the network has as it has them, in shards."""
    orbax = _imported("orbax.checkpoint", "orbax-checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(source).item_metadata.tree
        like = {}
        for name, kind in stored.items():
            old = expected.get(name)
            placed = getattr(old, "sharding", None)
            same = old is not None and old.shape == tuple(kind.shape)
            like[name] = jax.ShapeDtypeStruct(
                tuple(kind.shape), kind.dtype, sharding=placed if same else None
            )
        return checkpointer.restore(source, like)


def by_name(tree: Any, what: str) -> dict[str, Any]:
    """The tree's arrays by their paths, such as ``encoder/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(
        float_arrays(unwrapped(tree), what, real=True)
    )
    found = {path_name(path): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"In the {what}, different leaves are named alike: {twice}.")
    return found


def _masked_names(tree: Any) -> list[str]:
    """The places that a masked transform leaves out."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    return [path_name(path) for path, leaf in leaves if is_masked(leaf)]


def require_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raises ValueError, with every difference, unless names and shapes agree."""
    shapes, needed = (
        {n: tuple(jnp.shape(a)) for n, a in d.items()} for d in (found, expected)
    )
    differences = [
        *(f"'{n}' is missing" for n in needed if n not in shapes),
        *(f"'{n}' is not in the network" for n in shapes if n not in needed),
        *(
            f"'{n}' has shape {shapes[n]}, not {shape}"
            for n, shape in needed.items()
            if shapes.get(n, shape) != shape
        ),
    ]
    if differences:
        raise ValueError(f"{what} does not fit: {'; '.join(differences)}.")


@jax.jit
def _are_sums(tree: Any) -> Any:
    return jax.tree.map(lambda a: (jnp.isfinite(a) & (a >= 0)).all(), tree)


def require_sums(found: dict[str, Any], what: str) -> None:
    """Raises ValueError, with the names, where something cannot be importance."""
    bad = [name for name, good in _are_sums(found).items() if not good]
    if bad:
        raise ValueError(
            f"{what} holds NaN, infinite or negative numbers in "
            f"{', '.join(map(repr, bad))}: it cannot be a sum of magnitudes."
        )


def _is_nnx_module(tree: Any) -> bool:
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(tree, nnx.Module)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install 'classp-jax[finetune]'."
        ) from error


def _is_replaceable(target: pathlib.Path) -> bool:
    """Whether nothing is there but what :func:`save_importance` wrote."""
    if not os.path.lexists(target):
        return True
    try:
        if target.is_dir():
            found = _files_in(target)
            if not found:
                return True
            mark = json.loads((target / _MARK).read_text(encoding="utf-8"))
            return mark["format"] == _FORMAT and found <= {_MARK, *mark["files"]}
        safetensors = _imported("safetensors", "safetensors")
        with safetensors.safe_open(target, framework="numpy") as opened:
            return (opened.metadata() or {}).get("format") == _FORMAT
    except ImportError:
        raise
    except Exception:  # Whatever a foreign file makes its reader raise.
        return False


def _files_in(folder: pathlib.Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _swap(new: pathlib.Path, target: pathlib.Path) -> None:
    """Puts the new folder in the target's place; where that fails, the old one back."""
    old = target.with_name(f"{new.name}.old")
    if os.path.lexists(target):
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        raise
    _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
