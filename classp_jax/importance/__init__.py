"""What accumulators hold: filled from old data, and read.

The functions are public as ``classp_jax.accumulate_importance`` and so on.
"""

from classp_jax.importance._filling import accumulate_importance
from classp_jax.importance._reading import (
    accumulators,
    free_fraction,
    mean_accumulator,
    update_density,
)

__all__ = [
    "accumulate_importance",
    "accumulators",
    "free_fraction",
    "mean_accumulator",
    "update_density",
]
