"""Where runs train: each on one device, or on several that share its batch."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from classp_jax.continual.errors import ContinualError, check_count
from classp_jax.continual.train.plan import Examples

_BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices that train one run at a time, or several side by side on one device.

    Over several devices each one takes a part of every batch, and JAX adds the parts'
    gradients up.
    """

    devices: tuple[Any, ...]
    """Of JAX."""
    parameter_shapes: frozenset[tuple[int, ...]] = frozenset()
    """Arrays of these shapes are cut into a piece for each device: parameters, and all
    state that is as large. The others are on every device."""

    @property
    def is_shared(self) -> bool:
        """Whether devices share a run."""
        return len(self.devices) > 1

    @property
    def is_here(self) -> bool:
        """Whether this process has one of the devices."""
        return any(d.process_index == jax.process_index() for d in self.devices)

    @property
    def processes(self) -> tuple[int, ...]:
        """Those that have one of the devices."""
        return tuple(dict.fromkeys(device.process_index for device in self.devices))

    @property
    def share(self) -> tuple[int, int]:
        """Which part of a run's examples this process reads, of how many.

        Raises:
          ContinualError: if the processes have not all as many of the devices.
        """
        owners = [device.process_index for device in self.devices]
        if len({owners.count(process) for process in self.processes}) > 1:
            raise ContinualError(
                f"the {len(owners)} devices of a run lie unevenly in its processes, so "
                "these cannot read equal shares of the batches"
            )
        return self.processes.index(jax.process_index()), len(self.processes)

    @property
    def reports(self) -> bool:
        """Whether this process is the one that tells of the runs."""
        return self.processes[0] == jax.process_index()

    @functools.cached_property
    def whole(self) -> Sharding:
        """How an array lies that is whole on each of the devices."""
        if not self.is_shared:
            return SingleDeviceSharding(self.devices[0])
        mesh = Mesh(np.array(self.devices), (_BATCH,), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec())

    def _cut(self, axis: int) -> Sharding:
        assert isinstance(self.whole, NamedSharding)
        spec = PartitionSpec(*[None] * axis, _BATCH)
        return NamedSharding(self.whole.mesh, spec)

    def shardings(self, tree: Any) -> Any:
        """How the leaves of a function's arguments or results lie on the devices.

        Examples are cut along the batch, their last axis but for the inputs' own.
        """
        if not self.is_shared:
            return jax.tree.map(lambda leaf: self.whole, tree)
        return jax.tree.map(
            lambda part: (
                self._of_examples(part)
                if isinstance(part, Examples)
                else self._of_array(part)
            ),
            tree,
            is_leaf=lambda part: isinstance(part, Examples),
        )

    def _of_examples(self, examples: Examples) -> Any:
        axis = len(examples.y.shape) - 1
        divides = examples.y.shape[axis] % len(self.devices) == 0
        sharding = self._cut(axis) if divides else self.whole
        return jax.tree.map(lambda leaf: sharding, examples)

    def _of_array(self, leaf: Any) -> Sharding:
        if np.shape(leaf) not in self.parameter_shapes:
            return self.whole
        shape = np.shape(leaf)
        axes = [k for k, n in enumerate(shape) if n and n % len(self.devices) == 0]
        largest = max(axes, key=lambda k: shape[k], default=None)
        return self.whole if largest is None else self._cut(largest)

    def put(self, tree: Any) -> Any:
        """The tree on the devices; what is there already stays as it is."""
        if not self.is_shared and self.is_here:
            return self._put_whole(tree)
        return jax.tree.map(_put, tree, self.shardings(tree))

    def put_shares(self, examples: Examples) -> Examples:
        """Examples of which each process has a share, as :meth:`share` deals them."""
        axis, count = len(examples.y.shape) - 1, len(self.processes)

        def put(leaf: Any) -> jax.Array:
            shape = list(leaf.shape)
            shape[axis] *= count
            return jax.make_array_from_process_local_data(
                self._cut(axis), leaf, tuple(shape)
            )

        return jax.tree.map(put, examples)

    def _put_whole(self, tree: Any) -> Any:
        """On one device: all that is not there yet at once, which costs far less."""
        leaves, structure = jax.tree.flatten(tree)
        away = [k for k, leaf in enumerate(leaves) if not _lies(leaf, self.whole)]
        moved = jax.device_put([leaves[k] for k in away], self.whole)
        for k, leaf in zip(away, moved, strict=True):
            leaves[k] = leaf
        return structure.unflatten(leaves)

    def everywhere(self, tree: Any) -> Any:
        """The tree, whole on each of the devices."""
        return jax.tree.map(lambda leaf: _put(leaf, self.whole), tree)


def _lies(leaf: Any, sharding: Sharding) -> bool:
    return isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == sharding


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if _lies(leaf, sharding):
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Every process has the whole array, and gives its own devices their part.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def places_of(
    devices: int | None,
    devices_per_run: int,
    shard_parameters: bool,
    mesh: Mesh | None,
    batch_size: int,
    shapes: Iterable[tuple[int, ...]],
) -> tuple[Place, ...]:
    """The places that were asked for, checked.

    Args:
      devices: how many to use; None: one, or with several processes all.
      devices_per_run: how many share each run.
      shard_parameters: whether parameters and state are cut into pieces.
      mesh: in place of the first two: its axes are ``"runs"``, ``"batch"`` or both.
      batch_size: what the devices of a run share.
      shapes: those of the parameters.

    Raises:
      ContinualError: for what JAX does not have, or what does not divide.
    """
    if devices is not None:
        check_count("devices", devices, 1)
    check_count("devices_per_run", devices_per_run, 1)
    if mesh is not None:
        grid = _grid_of(mesh, devices, devices_per_run)
    else:
        grid = _grid(devices, devices_per_run)
    per_run = grid.shape[1]
    if batch_size % per_run:
        raise ContinualError(
            f"batch_size {batch_size} does not divide among the {per_run} devices of "
            "a run"
        )
    if shard_parameters and per_run == 1:
        raise ContinualError(
            "shard_parameters needs several devices per run: give devices_per_run"
        )
    cut = frozenset(shape for shape in shapes if shape) if shard_parameters else ()
    return tuple(Place(tuple(row), frozenset(cut)) for row in grid)


def _grid(devices: int | None, per_run: int) -> np.ndarray:
    found = jax.devices()
    if devices is None:
        devices = len(found) if jax.process_count() > 1 else per_run
    if devices > len(found):
        hint = (
            f"; for a trial JAX_NUM_CPU_DEVICES={devices} makes several of a CPU"
            if found[0].platform == "cpu"
            else ""
        )
        raise ContinualError(
            f"{devices} devices are asked for, JAX has {len(found)} "
            f"({found[0].platform}){hint}"
        )
    if devices % per_run:
        raise ContinualError(
            f"{devices} devices do not divide into runs of {per_run} devices"
        )
    if jax.process_count() > 1 and devices < len(found):
        raise ContinualError(
            f"with several processes all {len(found)} devices are used, not {devices}"
        )
    return np.array(found[:devices]).reshape(-1, per_run)


def _grid_of(mesh: Mesh, devices: int | None, per_run: int) -> np.ndarray:
    if devices is not None or per_run != 1:
        raise ContinualError("give a mesh or numbers of devices, not both")
    if not isinstance(mesh, Mesh):
        raise ContinualError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if not mesh.axis_names or not set(mesh.axis_names) <= {"runs", _BATCH}:
        raise ContinualError(
            f"mesh has the axes {', '.join(map(str, mesh.axis_names))}: they must be "
            "runs, batch or both"
        )
    order = [mesh.axis_names.index(n) for n in ("runs", _BATCH) if n in mesh.shape]
    per_run = mesh.shape.get(_BATCH, 1)
    return mesh.devices.transpose(order).reshape(-1, per_run)


def share_of(count: int, places: int, width: int) -> int:
    """How many of so many runs go to a place before the next place gets some."""
    return max(1, min(width, math.ceil(count / places)))
