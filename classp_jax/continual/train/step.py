"""The compiled functions of one method, each for one run.

A run is one seed with one group of settings. On a CPU each run is compiled alone:
XLA vectorises the step of one run well, nothing is gained by more, and its bits cannot
depend on who trains beside it. On accelerators :data:`WIDTH` runs, always that many,
go through one vectorised function.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax.continual.methods import Batch, Functions, Method, Problem
from classp_jax.continual.models import Model
from classp_jax.continual.train.moments import Moments
from classp_jax.continual.train.places import Place
from classp_jax.continual.train.plan import Examples, Training
from classp_jax.continual.train.precision import (
    LossScale,
    narrowed,
    unless_broken,
    widened,
)

WIDTH = 8
"""How many runs an accelerator trains side by side."""
CHUNK = 256
"""Examples evaluated at once."""


class RunData(NamedTuple):
    """What one run knows of its data in all tasks; traced."""

    mean: Any
    deviation: Any
    pixels: Any
    classes: Any
    train_sizes: Any
    steps_per_pass: Any


class Tally(NamedTuple):
    """Sums over the steps of a task."""

    loss: Any
    correct: Any
    density: Any
    last_loss: Any
    taken: Any
    """Steps that are in these sums: all, but for those that were undone."""


class State(NamedTuple):
    """Everything a run carries: stored, it could go on from here at any step."""

    params: Any
    method: Any
    key: Any
    total: Any
    """Steps of all tasks so far; with the key it gives each step's randomness."""
    step: Any
    """Steps of this task so far."""
    ended: Any
    """Whether the task's loss is low enough, so that no more steps are taken."""
    finite: Any
    """Whether every loss was, and the parameters are, finite."""
    tally: Tally
    scale: Any = ()
    """The loss scale of float16."""
    moments: Any = ()
    """The inputs' running :class:`Moments`, where these are asked for."""


class Compiled(NamedTuple):
    """A method's functions as executables; each takes lists of runs' arguments."""

    init: Callable[..., Any]
    advance: Callable[..., Any]
    end_of_task: Callable[..., Any] | None
    seconds: float


def inputs_of(stored: jax.Array, run: RunData, rows: Any, task: Any) -> jax.Array:
    """Examples as their task shows them, in the dtype of the stored data.

    In place of rows of the stored data it takes examples that are not stored.
    """
    x = stored[rows] if rows.ndim == 1 else rows
    if run.pixels is None:
        return x
    order = run.pixels[task]
    by_pixel = x.reshape(*order.shape, -1)
    shown = jnp.take_along_axis(by_pixel, order[..., None], axis=1)
    return shown.reshape(x.shape)


def scaled(x: jax.Array, run: RunData, moments: Any = ()) -> jax.Array:
    """What the network is given."""
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        return x
    x = (x.astype(jnp.float32) - run.mean) / run.deviation
    return moments.standardised(x) if moments else x


def make_problem(
    model: Model,
    run: RunData,
    example: Any,
    training: Training,
    masked: bool,
    scale: Any = None,
    moments: Any = (),
) -> Problem:
    """The problem of one run, inside its traced functions.

    Args:
      model: the network.
      run: what the run knows of its data.
      example: shape and dtype of one stored input.
      training: batch size, precision and the like.
      masked: whether some outputs may not win.
      scale: the loss scale of float16.
      moments: what the inputs are standardised by, where these run.
    """
    dtype = jnp.dtype(training.compute_dtype)

    def logits(params: Any, batch: Batch, key: Any = None) -> jax.Array:
        x = scaled(batch.x, run, moments)
        if dtype != jnp.float32:
            params = narrowed(params, dtype, scale)
            x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        found = model.apply(params, x, key)
        if dtype != jnp.float32:
            found = widened(found, scale)
        return jnp.where(batch.classes, found, -1e9) if masked else found

    def loss(params: Any, batch: Batch, key: Any = None) -> tuple[Any, Any]:
        found = logits(params, batch, key)
        counted = found
        if batch.counted is not None:
            counted = jnp.where(batch.counted, found, -1e9)
        errors = optax.softmax_cross_entropy_with_integer_labels(counted, batch.y)
        return jnp.sum(errors * batch.weight) / jnp.sum(batch.weight), found

    return Problem(
        loss=loss,
        logits=logits,
        init=model.init,
        example=example,
        num_classes=run.classes.shape[-1],
        batch_size=training.batch_size,
        classes=run.classes,
        train_sizes=run.train_sizes,
        steps_per_pass=run.steps_per_pass,
        fisher=training.fisher,
    )


class Traced(NamedTuple):
    """A method's functions of one run, to be compiled."""

    method: Method
    static: Mapping[str, Any]
    """Settings that are compiled in; the others come with each call."""
    problem_of: Callable[..., Problem]
    """The problem of a run, given the loss scale and running moments."""
    training: Training
    """The precision, and what a step that is not finite leads to."""

    @property
    def has_scale(self) -> bool:
        """Whether the loss is scaled."""
        return self.training.compute_dtype == "float16"

    @property
    def has_moments(self) -> bool:
        """Whether the inputs are standardised as they come."""
        return self.training.moments == "running"

    @property
    def undoes(self) -> bool:
        """Whether a step that is not finite is undone."""
        return self.has_scale or self.training.nonfinite == "skip"

    def functions(
        self,
        run: RunData,
        settings: Mapping[str, Any],
        scale: Any = (),
        moments: Any = (),
    ) -> Functions:
        """The method's own functions, of one run and one group of settings."""
        problem = self.problem_of(run, scale.value if scale else None, moments)
        return self.method.make({**self.static, **settings}, problem)

    def init(
        self, stored: Any, run: RunData, settings: Any, params: Any, keys: Any
    ) -> State:
        """The state before the first step."""
        zero, none = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
        return State(
            params=params,
            method=self.functions(run, settings).init(params, keys[0]),
            key=keys[1],
            total=none,
            step=none,
            ended=jnp.zeros([], bool),
            finite=jnp.ones([], bool),
            tally=Tally(zero, none, zero, zero, none),
            scale=LossScale.first() if self.has_scale else (),
            moments=Moments.none(stored.shape[1:]) if self.has_moments else (),
        )

    def advance(
        self,
        stored: Any,
        run: RunData,
        settings: Any,
        schedule: Examples,
        target: Any,
        steps_per_pass: Any,
        stop: Any,
        state: State,
    ) -> State:
        """Takes the steps of a task up to ``stop``."""
        length = schedule.y.shape[0]
        in_blocks = schedule.rows.ndim > schedule.y.ndim

        def body(s: State) -> State:
            here = s.step % length if in_blocks else s.step
            examples = Examples(*(a[here] for a in schedule))
            s, loss = self.step(stored, run, settings, examples, s)
            end_of_pass = s.step % steps_per_pass == 0
            return s._replace(ended=end_of_pass & (loss < target))

        state = jax.lax.while_loop(lambda s: (s.step < stop) & ~s.ended, body, state)
        leaves = jax.tree.leaves(state.params)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
        return state._replace(finite=state.finite & jnp.all(jnp.stack(finite)))

    def step(
        self, stored: Any, run: RunData, settings: Any, examples: Examples, s: State
    ) -> tuple[State, jax.Array]:
        """One step, with what it adds to the sums of the task, and its loss."""
        batch = _batch_of(stored, run, examples)
        key = jax.random.fold_in(s.key, s.total)
        moments = s.moments
        if self.has_moments:
            moments = moments.after(scaled(batch.x, run))
        step = self.functions(run, settings, s.scale, moments).step
        params, own, metrics = step(s.params, s.method, batch, key)
        guess = jnp.argmax(metrics.logits[: batch.y.shape[0]], axis=1)
        correct = jnp.sum(guess.astype(jnp.int32) == batch.y, dtype=jnp.int32)
        tally = Tally(
            s.tally.loss + metrics.loss,
            s.tally.correct + correct,
            s.tally.density + metrics.update_density,
            metrics.loss,
            s.tally.taken + 1,
        )
        scale = s.scale
        if self.undoes:
            (params, own, moments, tally), fine = unless_broken(
                (params, own, moments, tally),
                (s.params, s.method, s.moments, s.tally),
                metrics.loss,
            )
            scale = s.scale.after(fine) if self.has_scale else s.scale
        s = s._replace(
            params=params,
            method=own,
            total=s.total + 1,
            step=s.step + 1,
            finite=s.finite & (jnp.isfinite(metrics.loss) | self.undoes),
            tally=tally,
            scale=scale,
            moments=moments,
        )
        return s, metrics.loss

    def end_of_task(
        self,
        stored: Any,
        run: RunData,
        settings: Any,
        sample: Examples,
        key: Any,
        state: State,
    ) -> State:
        """What the method does when a task ends."""
        ending = self.functions(run, settings, state.scale, state.moments).end_of_task
        assert ending is not None
        key = jax.random.fold_in(key, state.total)
        batch = _batch_of(stored, run, sample)
        params, own = ending(state.params, state.method, batch, key)
        return state._replace(params=params, method=own)


def _batch_of(stored: Any, run: RunData, examples: Examples) -> Batch:
    return Batch(
        inputs_of(stored, run, examples.rows, examples.task),
        jnp.asarray(examples.y),
        jnp.asarray(examples.task),
        run.classes[examples.task],
        jnp.ones(examples.y.shape, jnp.float32),
    )


def next_task(state: State) -> State:
    """The state at the start of the next task."""
    return state._replace(
        step=np.int32(0),
        ended=np.bool_(False),
        tally=Tally(
            np.float32(0), np.int32(0), np.float32(0), np.float32(0), np.int32(0)
        ),
    )


def make_evaluate(model: Model) -> Callable[..., jax.Array]:
    """A function that counts the right answers of one run on each task."""

    def evaluate(
        stored: Any,
        run: RunData,
        examples: Examples,
        chunks: Any,
        key: Any,
        params: Any,
        moments: Any,
    ) -> jax.Array:
        """Examples are ``[all chunks, CHUNK]``; padding has the label -1."""
        tasks = run.classes.shape[0]

        def body(i: Any, counts: jax.Array) -> jax.Array:
            rows, y, task = (a[i] for a in examples)
            x = scaled(inputs_of(stored, run, rows, task), run, moments)
            own = None if key is None else jax.random.fold_in(key, i)
            logits = model.apply(params, x, own)
            logits = jnp.where(run.classes[task], logits, -jnp.inf)
            right = jnp.argmax(logits, axis=1).astype(jnp.int32) == y
            return counts.at[task].add(right.astype(jnp.int32))

        counts = jnp.zeros(tasks, jnp.int32)
        return jax.lax.fori_loop(0, chunks, body, counts)

    return evaluate


def width() -> int:
    """How many runs go through one compiled function."""
    return 1 if jax.default_backend() == "cpu" else WIDTH


def compiled(
    function: Callable[..., Any],
    stored: Any,
    arguments: Any,
    width: int,
    *,
    donate: bool,
    place: Place,
) -> tuple[Callable[[Sequence[Any]], list[Any]], float]:
    """Compiles a function of one run, vectorised if ``width`` is above 1.

    Args:
      function: ``function(stored, *arguments)``.
      stored: the data that all runs share.
      arguments: those of one run; their shapes and dtypes are enough.
      width: how many runs go through it at once.
      donate: whether the last argument, a run's state, is given up.
      place: where it runs; ``stored`` is there already.

    Returns:
      A function from a list of at most ``width`` runs' arguments to a list of their
      results, and the seconds that compiling took.
    """
    began = time.perf_counter()
    lifted, arguments = function, jax.eval_shape(lambda a: a, arguments)
    if place.is_shared:
        width = 1  # All its devices are busy with one run.
    if width > 1:
        lifted = jax.vmap(function, in_axes=(None, *(0 for _ in arguments)))
        arguments = jax.eval_shape(lambda a: _stacked([a] * width), arguments)
    donated = (len(arguments),) if donate else ()
    results = jax.eval_shape(lifted, stored, *arguments)
    executable = (
        jax.jit(
            lifted,
            donate_argnums=donated,
            in_shardings=(stored.sharding, *place.shardings(arguments)),
            out_shardings=place.shardings(results),
        )
        .lower(stored, *arguments)
        .compile()
    )

    def call(runs: Sequence[Any]) -> list[Any]:
        if width == 1:
            return [executable(stored, *place.put(runs[0]))]
        # The last group is filled up with copies, whose results are dropped.
        filled = [*runs, *[runs[0]] * (width - len(runs))]
        results = executable(stored, *place.put(_stacked(filled)))
        return [jax.tree.map(lambda a, i=i: a[i], results) for i in range(len(runs))]

    return call, time.perf_counter() - began


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
