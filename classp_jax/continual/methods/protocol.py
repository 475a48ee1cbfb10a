"""What a method of continual learning is: a few pure functions and their settings."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Setting(NamedTuple):
    """A number that a method can be given: its default, and what tuning may draw.

    Tuning draws from ``choices`` if there are any, else log-uniformly from ``low`` to
    ``high``; with neither it leaves the default alone.
    """

    default: float
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    """What tuning draws from. Such a setting is compiled into the step: ``make`` is
    given a plain number rather than a traced one."""
    integer: bool = False
    """Whether only whole numbers will do. They are compiled in too, so that they may
    decide a shape."""
    least: float = 0.0
    """The smallest value allowed."""

    @property
    def compiled(self) -> bool:
        """Whether each value of it is compiled on its own."""
        return bool(self.choices) or self.integer


class Batch(NamedTuple):
    """Examples for one step."""

    x: jax.Array
    """``[b, ...]``, in the dtype in which the data is stored; :class:`Problem` scales
    it, so a method that keeps examples keeps them small."""
    y: jax.Array
    """Labels, int32 ``[b]``."""
    task: jax.Array
    """The task that each example is from, int32 ``[b]``."""
    classes: jax.Array
    """Which outputs may win, bool ``[b, num_classes]``."""
    weight: jax.Array
    """How much each example counts in the loss, float32 ``[b]``; 0 is not at all."""
    counted: jax.Array | None = None
    """Outputs that the loss counts, bool ``[b, num_classes]``, of those that may win;
    None: all of these. The logits that the loss returns do not depend on it."""


class Problem(NamedTuple):
    """What a method is built for: the network, the loss and what is known of the data.

    The functions already know the run's own scale of the inputs.
    """

    loss: Callable[..., tuple[jax.Array, jax.Array]]
    """``loss(params, batch, key=None)``: the weighted mean cross-entropy and the
    logits. With a key the network trains (dropout), without it is evaluated."""
    logits: Callable[..., jax.Array]
    """``logits(params, batch, key=None)``: ``[b, num_classes]``, hugely negative where
    an output may not win."""
    init: Callable[[jax.Array], Any]
    """``init(key)``: fresh weights of the same network."""
    example: jax.ShapeDtypeStruct
    """Shape and dtype of one stored input."""
    num_classes: int
    batch_size: int
    classes: jax.Array
    """Which outputs may win in each task, bool ``[tasks, num_classes]``; traced."""
    train_sizes: jax.Array
    """Training examples of each task, int32 ``[tasks]``; traced."""
    steps_per_pass: jax.Array
    """Steps of one pass over each task's data, int32 ``[tasks]``; traced."""
    fisher: str
    """How to take the Fisher information: exact, sampled or empirical."""


class Metrics(NamedTuple):
    """What a step tells of itself; the loop adds it up."""

    loss: jax.Array
    """Before the step, of the whole batch."""
    logits: jax.Array
    """Before the step, ``[b, num_classes]``, those of the new examples first: they
    give the on-line accuracy."""
    update_density: jax.Array
    """Share of the weights whose update is not 0."""


class Functions(NamedTuple):
    """A method's pure functions, each for one run.

    They are traced: no Python ``if`` on an array, and shapes that do not change.
    """

    init: Callable[[Any, jax.Array], Any]
    """``init(params, key)``: the state before the first step."""
    step: Callable[[Any, Any, Batch, jax.Array], tuple[Any, Any, Metrics]]
    """``step(params, state, batch, key)``: new weights and state, and metrics."""
    end_of_task: Callable[[Any, Any, Batch, jax.Array], tuple[Any, Any]] | None = None
    """``end_of_task(params, state, sample, key)``: new weights and state, between two
    tasks. ``sample`` holds random examples of the one that ended. None: nothing happens
    there."""


class Method(NamedTuple):
    """A method: what it is called, what can be set, and how its functions are made."""

    name: str
    summary: str
    settings: Mapping[str, Setting]
    make: Callable[[Mapping[str, Any], Problem], Functions]
    """``make(settings, problem)``: called while the step is traced. Settings are traced
    scalars, but for those that are compiled in."""
    task_boundary_known: bool = False
    """Whether it is told where a task ends."""
    stored_data: bool = False
    """Whether it keeps training examples."""
    plan: Callable[[Any], Any] | None = None
    """``plan(plan)``: another plan of training, such as all tasks' data at once."""
    parts: tuple[str, ...] = ()
    """Of a method named ``a+b``, the names whose settings it shares."""
    fingerprint: Callable[[Any], str] | None = None
    """``fingerprint(params)``: what tells it from another of the same name, where its
    settings do not, for weights of these shapes. Results store it as a setting."""
