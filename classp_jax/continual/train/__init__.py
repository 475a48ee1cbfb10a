"""Training: a plan per seed, one compiled step per method, a short loop."""

from classp_jax.continual.train.experiment import Experiment, prepare
from classp_jax.continual.train.loop import train
from classp_jax.continual.train.plan import Plan, Training
from classp_jax.continual.train.progress import Progress

__all__ = ["Experiment", "Plan", "Progress", "Training", "prepare", "train"]
