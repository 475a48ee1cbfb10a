"""Code that one test has compiled is not compiled again by the next."""

import atexit
import shutil
import tempfile

import jax

_FOLDER = tempfile.mkdtemp(prefix="classp-jax-tests-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _FOLDER)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
