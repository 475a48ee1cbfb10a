"""CLASSP for JAX: continual learning inside the optimizer, as Optax transforms."""

from classp_jax import regularizers
from classp_jax._accumulate import (
    ScaleByGeneralizedAdagradState,
    scale_by_generalized_adagrad,
)
from classp_jax._classp import classp
from classp_jax._density import MaskToDensityState, mask_to_density
from classp_jax._hyperparams import inject_hyperparams
from classp_jax._masks import MaskByThresholdState, mask_by_threshold
from classp_jax._protect import ProtectState, protect
from classp_jax._published import classp_published
from classp_jax.importance import (
    accumulate_importance,
    accumulators,
    free_fraction,
    mean_accumulator,
    update_density,
)

__version__ = "0.1.0"

__all__ = [
    "MaskByThresholdState",
    "MaskToDensityState",
    "ProtectState",
    "ScaleByGeneralizedAdagradState",
    "accumulate_importance",
    "accumulators",
    "classp",
    "classp_published",
    "free_fraction",
    "inject_hyperparams",
    "mask_by_threshold",
    "mask_to_density",
    "mean_accumulator",
    "protect",
    "regularizers",
    "scale_by_generalized_adagrad",
    "update_density",
]
