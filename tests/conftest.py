"""Settings for every test: eight virtual CPU devices, strict dtypes."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder with prepared real data sets; skips where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the prepared data sets in {SHARED_DATA}")
    return SHARED_DATA
