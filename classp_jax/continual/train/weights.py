"""Weights that runs start from, and those they end with, one file for each run."""

import hashlib
import io
import json
import pathlib
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from classp_jax.continual.errors import ContinualError
from classp_jax.continual.leaves import copied, is_key, named
from classp_jax.continual.models import Model
from classp_jax.continual.results.files import write_atomically


class Trained(NamedTuple):
    """What a run ends with."""

    params: Any
    """The weights."""
    state: Any
    """The method's state: the optimizer's, and what it keeps beside that."""


def file_of(
    folder: pathlib.Path, method: str, settings: Mapping[str, Any], seed: int
) -> pathlib.Path:
    """``weights/METHOD-SETTINGS-SEED.npz`` in a folder of results."""
    # Whole numbers come back from results.json as floats.
    numbers = {k: v if isinstance(v, str) else float(v) for k, v in settings.items()}
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    name = urllib.parse.quote(method, safe="+ ")
    return folder / "weights" / f"{name}-{digest[:6]}-{seed}.npz"


def save(file: pathlib.Path, trained: Trained) -> None:
    """Writes arrays named by their path in the tree, such as ``params/w``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {path: copied(leaf) for path, leaf in named(trained).items()}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(file, content.getvalue())


def load(file: pathlib.Path, like: Trained) -> Trained:
    """Reads what :func:`save` wrote.

    Args:
      file: the file.
      like: a tree of the same structure, of arrays or their shapes.

    Raises:
      ContinualError: in one line, if it is no such file.
    """
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            leaves = [
                jax.random.wrap_key_data(arrays[path])
                if is_key(leaf)
                # NumPy itself reads bfloat16 as raw bytes.
                else arrays[path].view(leaf.dtype)
                for path, leaf in named(like).items()
            ]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ContinualError(
            f"{file} is damaged: remove it, and its run is trained again"
        ) from error
    return jax.tree.structure(like).unflatten(leaves)


def starting_weights(
    model: Model, seeds: Sequence[int], given: Any
) -> tuple[Callable[[int], Any], str]:
    """The weights that each seed starts from, checked, and a hash of them.

    Args:
      model: the network.
      seeds: the seeds.
      given: a tree for all of them, or ``{seed: tree}``; a tree may be a
        :class:`Trained`.

    Raises:
      ContinualError: if a tree is not like the network's.
    """
    by_seed = isinstance(given, Mapping) and all(isinstance(k, int) for k in given)
    trees = {seed: given.get(seed) if by_seed else given for seed in seeds}
    expected = jax.eval_shape(model.init, jax.random.key(0))
    digest = hashlib.sha256()
    for seed, tree in trees.items():
        tree = trees[seed] = tree.params if isinstance(tree, Trained) else tree
        if jax.tree.structure(tree) != jax.tree.structure(expected):
            raise ContinualError(
                f"initial_weights of seed {seed} are not a tree like the network's: "
                f"{' '.join(str(jax.tree.structure(expected)).split())}"
            )
        shapes = [
            (np.shape(a), b.shape)
            for a, b in zip(
                jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
            )
        ]
        wrong = [pair for pair in shapes if pair[0] != pair[1]]
        if wrong:
            raise ContinualError(
                f"initial_weights of seed {seed} have shape {wrong[0][0]} where the "
                f"network has {wrong[0][1]}"
            )
        for leaf in jax.tree.leaves(tree):
            digest.update(np.asarray(leaf).tobytes())
    return trees.__getitem__, digest.hexdigest()[:16]
