"""Settings for every test: eight virtual CPU devices, strict dtypes.

Programs that took long to compile are shared by all workers and child processes of one
run of pytest, in a folder that goes with it.
"""

import atexit
import importlib.util
import os
import pathlib
import shutil
import tempfile
import types
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Not beside the TPU compiler: programs for machines that are not there stay unstored.
if (
    "PYTEST_XDIST_WORKER" not in os.environ
    and importlib.util.find_spec("libtpu") is None
):
    _programs = tempfile.mkdtemp(prefix="classp-jax-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

# JAX has no public way to give options to all compilations of a while.
from jax._src import compiler

FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA makes slower code in half the time.

    For files that train or check many forms, not those that count bytes or digits.
    """
    make_options = compiler.get_compile_options

    def without_fusion_emitters(*args: Any, **kwargs: Any) -> Any:
        options = make_options(*args, **kwargs)
        overrides = options.env_option_overrides
        options.env_option_overrides = [*overrides, (FUSION_EMITTERS, "False")]
        return options

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(compiler, "get_compile_options", without_fusion_emitters)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder with prepared real data sets; skips where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the prepared data sets in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def script():
    """Loads a script of the repository as a module, by its path from the root."""

    def load(path: str) -> types.ModuleType:
        file = pathlib.Path(__file__).parents[1] / path
        name = "_".join(file.with_suffix("").parts[-2:])
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as context:
            context.syspath_prepend(file.parent)
            spec.loader.exec_module(module)
        return module

    return load
