"""Methods of continual learning: what one is, and those that have a name."""

from classp_jax.continual.methods.compose import (
    Hooks,
    Part,
    TaskEnd,
    compose,
    from_optax,
)
from classp_jax.continual.methods.optimizers import OPTIMIZERS
from classp_jax.continual.methods.protocol import (
    Batch,
    Functions,
    Method,
    Metrics,
    Problem,
    Setting,
)
from classp_jax.continual.methods.registry import (
    ADDITIONS,
    METHODS,
    as_methods,
    method,
    resolve_settings,
    settings_of,
)

__all__ = [
    "ADDITIONS",
    "METHODS",
    "OPTIMIZERS",
    "Batch",
    "Functions",
    "Hooks",
    "Method",
    "Metrics",
    "Part",
    "Problem",
    "Setting",
    "TaskEnd",
    "as_methods",
    "compose",
    "from_optax",
    "method",
    "resolve_settings",
    "settings_of",
]
