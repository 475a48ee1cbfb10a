"""Compiles for machines that are not here, and counts what the result does.

A target is ``cpu``, ``tpu:SLICE`` such as ``tpu:v5e:2x2`` (needs ``libtpu``: the extra
``tpu-compiler``) or ``cuda:GPU`` for a description in ``gpus/`` such as ``cuda:a100``
(needs ``jax-cuda12-plugin[with-cuda]``). Nothing is run; neither TPU nor GPU is needed.
"""

import datetime
import importlib.metadata
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "chips"
_GPUS = pathlib.Path(__file__).parent / "gpus"
_GPUS_A_NODE = 4
# libtpu looks for the machine that it runs on, and locks it; it runs on none.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_PACKAGES = ("jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# These name arrays or hand them on; none of them reads or writes memory.
_NO_KERNELS = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
)
# It puts neighbouring slices into one name.
_BITCAST = 'custom_call_target="ConcatBitcast"'
_PREFETCHES = ("copy-start", "slice-start")
_CALLS = ("call", "conditional", "while")


class UnknownTargetError(ValueError):
    """No compiler for this target is here; says what would help."""


def mesh(target: str) -> Mesh:
    """All chips of a target as a mesh of one axis.

    Raises:
      UnknownTargetError: if there is no such target, or no compiler for it here.
    """
    kind, _, which = target.partition(":")
    if kind == "cpu":
        devices = jax.devices("cpu")[:1]
    elif kind == "tpu":
        if not _version("libtpu"):
            raise UnknownTargetError(
                f"{target} needs libtpu: pip install -e '.[tpu-compiler]', in an "
                "environment of its own, as it prints wherever JAX starts."
            )
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=which
        ).devices
    elif kind == "cuda" and (_GPUS / f"{which}.txtpb").exists():
        if not _version("jax-cuda12-plugin"):
            raise UnknownTargetError(
                f"{target} needs CUDA's compiler (3 GB): "
                "pip install 'jax-cuda12-plugin[with-cuda]'."
            )
        # It looks for a driver otherwise, and there is none without the machine.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        devices = topologies.get_topology_desc(
            which,
            "cuda",
            target_config=(_GPUS / f"{which}.txtpb").read_text(encoding="utf-8"),
            topology=f"1x1x{_GPUS_A_NODE}",
        ).devices
    else:
        known = ", ".join(f"cuda:{path.stem}" for path in sorted(_GPUS.iterdir()))
        raise UnknownTargetError(
            f"There is no target {target!r}; there are cpu, tpu:SLICE such as "
            f"tpu:v5e:2x2, {known}."
        )
    return Mesh(np.array(devices), (AXIS,))


def placed(tree: Any, params: Any, shardings: Any, chips: Mesh) -> Any:
    """Abstract arrays with shardings: a parameter's where one has the same shape.

    Other arrays, such as step counts, are kept whole on every chip.
    """
    known = {
        x.shape: sharding
        for x, sharding in zip(
            jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
        )
    }
    whole = NamedSharding(chips, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=known.get(x.shape, whole)
        ),
        tree,
    )


class Kernel(NamedTuple):
    """One instruction of a compiled module that reads or writes memory."""

    opcode: str
    arrays: tuple[int, ...]
    """Bytes of each array that it reads or writes."""
    in_main_memory: int
    """Bytes that it reads from and writes to main memory; TPUs also have a fast one."""

    @property
    def copies_only(self) -> bool:
        """Whether it moves an array beside the arithmetic, as prefetches do."""
        return self.opcode.endswith("-start")


def kernels(compiled: Any) -> list[Kernel]:
    """What the compiled module starts, in order.

    Every instruction of the entry computation counts that is not a mere name for an
    array, and those of computations that it calls: a loop's body and condition once,
    of a conditional's branches the one that moves most.
    """
    computations = dict(_computations(compiled.as_text()))
    (entry,) = [name for name in computations if name.startswith("ENTRY ")]
    return _kernels(entry, computations)


def _kernels(name: str, computations: dict[str, list[str]]) -> list[Kernel]:
    known: dict[str, list[_Array]] = {}
    found: list[Kernel] = []
    for line in computations[name]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)", line)
        if match is None:
            continue
        result, shape, opcode, rest = match.groups()
        known[result] = list(_arrays(shape))
        operands, _, attributes = rest.partition(")")
        if opcode in _NO_KERNELS or opcode.endswith("-done") or _BITCAST in attributes:
            continue
        if opcode in _CALLS:
            called = [
                _kernels(inner, computations)
                for inner in re.findall(r"%([\w.-]+)", attributes)
                if inner in computations
            ]
            if opcode == "conditional":
                called = [
                    max(called, key=lambda one: sum(k.in_main_memory for k in one))
                ]
            found += [kernel for one in called for kernel in one]
            continue
        arrays = known[result] + [
            array
            for operand in re.findall(r"%([\w.-]+)", operands)
            for array in known.get(operand, ())
        ]
        if opcode in _PREFETCHES:
            # Its result names where from and where to; a slice is less than its source.
            there = [array for array in known[result] if not array.is_scalar]
            moved = min(array.bytes for array in there)
            arrays = [array._replace(bytes=moved) for array in there]
        found.append(
            Kernel(
                opcode,
                tuple(array.bytes for array in arrays),
                sum(array.bytes for array in arrays if not array.in_fast_memory),
            )
        )
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The computations of a module's text: name, lines of the body."""
    for head, body in re.findall(
        r"^((?:ENTRY )?%[\w.-]+) .*?\{\n(.*?)^\}", text, flags=re.M | re.S
    ):
        yield head if head.startswith("ENTRY ") else head[1:], body.splitlines()


class _Array(NamedTuple):
    bytes: int
    is_scalar: bool
    in_fast_memory: bool


def _arrays(shape: str) -> Iterator[_Array]:
    """The arrays in a shape's text, such as ``(f32[8,2]{1,0:S(1)}, pred[])``."""
    pattern = r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?"
    for kind, dimensions, layout in re.findall(pattern, shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        count = math.prod(int(n) for n in dimensions.split(",") if n)
        yield _Array(count * bits // 8, not dimensions, "S(" in layout)


def compiled_with_text(lowered: Any) -> tuple[Any, str]:
    """Compiles, and also returns what the compiler itself writes of the module.

    JAX cannot read every module that libtpu makes for several chips; libtpu can.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        return compiled, written.read_text(encoding="utf-8")


def collectives(module: str) -> dict[str, int]:
    """How many communications of each kind a module's text has, without those of none.

    The TPU compiler splits one into steps that share a channel: they count as one.
    """
    names = "|".join(_COLLECTIVES)
    found = re.findall(rf" ({names})(?:-start)?\(.*?channel_id=(\d+)", module)
    channels = sorted(set(found))
    return {
        name: number
        for name in _COLLECTIVES
        if (number := sum(kind == name for kind, _ in channels))
    }


def provenance() -> dict[str, str]:
    """When, and with which versions."""
    found = {name: _version(name) for name in _PACKAGES}
    return {"date": datetime.date.today().isoformat()} | {
        name: version for name, version in found.items() if version
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
