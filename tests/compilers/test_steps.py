"""What the compilers of TPU and GPU make of a step; neither machine is needed.

The TPU's compiler comes with ``pip install -e '.[tpu-compiler]'``, in an environment of
its own; that of CUDA (3 GB) with ``pip install 'jax-cuda12-plugin[with-cuda]'``.
"""

import importlib.metadata
from collections.abc import Iterator

import ahead
import jax
import pytest
import step
from transforms import BASELINE, transforms

TPU, GPU = "tpu:v5e:2x2", "cuda:a100"
PACKAGES = {TPU: "libtpu", GPU: "jax-cuda12-plugin"}
# Bytes a parameter, room for scalars and for a reduction's partial sums.
ROOM = 0.01
CLASSP = [
    name for name in transforms() if name.startswith("classp,") and "bfloat" not in name
]


@pytest.fixture(autouse=True)
def _nothing_from_a_cache() -> Iterator[None]:
    """A program for a machine that is not here cannot be read from JAX's cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(params=[TPU, GPU])
def target(request: pytest.FixtureRequest) -> str:
    """A target whose compiler is installed; skips where it is not."""
    try:
        importlib.metadata.version(PACKAGES[request.param])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the compiler of {PACKAGES[request.param]}")
    return request.param


def count(name: str, target: str, shape: tuple[int, int]) -> step.Count:
    # optax.inject_hyperparams mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return step.count(name, target, transforms()[name], shape)


def check_limit(counted: step.Count, bytes_per_parameter: int) -> None:
    assert counted.traffic <= bytes_per_parameter + ROOM
    # Two counts that know nothing of each other: the compiler's, and ours of kernels.
    assert counted.main_memory == pytest.approx(counted.traffic, abs=ROOM)
    assert counted.temporary <= ROOM


@pytest.mark.parametrize("name", CLASSP)
def test_classp_is_one_kernel_a_leaf_at_the_limit(name: str, target: str):
    counted = count(name, target, step.LARGE_LEAF)
    check_limit(counted, step.LIMIT)
    assert counted.kernels <= 1


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("classp, bfloat16 sums", 16),
        ("protect(sgd)", 20),
        ("protect(adamw)", 36),
        ("classp_published", 24),
        ("mask_to_density, scaling", 24),
        ("l2_to_anchor, classp", 24),
        ("ewc, classp", 28),
        ("online_ewc, classp", 28),
        ("sgd, implicit_ewc", 20),
        ("streaming_importance, sgd", 28),
        ("bayesian_gradient_descent", 20),
    ],
)
def test_bytes_of_the_others(name: str, bytes_per_parameter: int, target: str):
    counted = count(name, target, step.LARGE_LEAF)
    check_limit(counted, bytes_per_parameter)


def test_a_kernel_reads_and_writes_five_arrays_of_the_leaf(target: str):
    compiled = step.compiled_for(target, transforms()["classp, power 1"], (1024, 4096))
    leaf = 1024 * 4096
    kernels = [
        [size for size in kernel.arrays if size >= leaf]
        for kernel in ahead.kernels(compiled)
        if not kernel.copies_only and max(kernel.arrays) >= leaf
    ]
    # g, A, w in; A, w out; a quarter of 1024 x 4096 float32 weights on each chip.
    assert kernels == step.LEAVES * [5 * [leaf]]


def test_small_leaves_are_no_worse_than_adagrads(target: str):
    adagrad, classp = (
        count(name, target, step.SMALL_LEAF) for name in (BASELINE, "classp, power 1")
    )
    # The TPU compiler moves them through its fast memory and counts that, too.
    assert classp.traffic <= adagrad.traffic + 0.1
    for counted in (adagrad, classp):
        assert counted.main_memory == pytest.approx(step.LIMIT, abs=ROOM)
