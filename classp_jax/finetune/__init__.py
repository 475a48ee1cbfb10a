"""Fine-tuning pretrained networks without forgetting.

Measure what matters to the old data, or load it from a file beside the checkpoint, and
fine-tune with an optimizer that holds on to it::

  tx = classp_jax.protect(optax.adamw(3e-5))
  old = finetune.gradients(loss, params, old_batches)
  state = classp_jax.accumulate_importance(tx, tx.init(params), params, old)

Networks and their weights are in modules of their own, such as
``classp_jax.finetune.llama``. All of it needs ``pip install 'classp-jax[finetune]'``.
"""

from classp_jax.finetune.importance import (
    gradients,
    importance_from_magnitude,
    load_importance,
    put_importance,
    save_importance,
)
from classp_jax.finetune.merging import merge

__all__ = [
    "gradients",
    "importance_from_magnitude",
    "load_importance",
    "merge",
    "put_importance",
    "save_importance",
]
