"""Bayesian gradient descent and MESU with ten samples per step, as in their papers."""

import functools

from classp_jax import continual, rivals
from classp_jax.continual.methods.compose import compose
from classp_jax.continual.methods.optimizers import OPTIMIZERS


def _with_ten_samples(name: str) -> continual.Method:
    expected = functools.partial(rivals.value_and_expected_gradients, samples=10)
    optimizer = OPTIMIZERS[name]._replace(differentiate=expected)
    return compose(f"ten-samples+{name}", optimizer, [], (name,))


SAMPLES = {f"ten-samples+{name}": _with_ten_samples(name) for name in ("bgd", "mesu")}
