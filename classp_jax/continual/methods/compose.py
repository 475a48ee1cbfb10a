"""Methods put together: an optimizer, and what stands in front of it."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import classp_jax
from classp_jax.continual._programs import program_hash
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.methods.protocol import (
    Batch,
    Functions,
    Method,
    Metrics,
    Problem,
    Setting,
)


class TaskEnd(NamedTuple):
    """What an addition may change where a task ends."""

    params: Any
    optimizer_state: Any
    new_optimizer_state: Any
    """What the optimizer would begin with at these weights."""


class Hooks(NamedTuple):
    """What an addition does in a step and at a task's end; None: nothing."""

    init: Callable[[Any, jax.Array], Any] = lambda params, key: ()
    """``init(params, key)``: the addition's own state."""
    settings: Callable[[jax.Array], Mapping[str, Any]] | None = None
    """``settings(tasks_done)``: settings of the optimizer in place of its own."""
    batch: Callable[[Any, Batch, jax.Array], tuple[Any, Batch]] | None = None
    """``batch(state, batch, key)``: the new state and the batch to learn from, which
    begins with the new examples."""
    gradients: Callable[..., tuple[Any, Any]] | None = None
    """``gradients(state, gradients, params, batch, key)``: the new state and the
    gradients for the optimizer. ``batch`` holds the new examples only."""
    updates: Callable[..., tuple[Any, Any]] | None = None
    """``updates(state, updates, params, key)``: the new state and the updates to apply,
    from the optimizer's."""
    end_of_task: Callable[..., tuple[Any, TaskEnd]] | None = None
    """``end_of_task(state, end, sample, key)``: the new state and task end."""


class Part(NamedTuple):
    """An optimizer, or an addition to stand in front of one."""

    summary: str
    settings: Mapping[str, Setting]
    make: Callable[..., Any]
    """Of an optimizer, ``make(**settings)``: a gradient transformation. Of an addition,
    ``make(settings, problem)``: its :class:`Hooks`."""
    task_boundary_known: bool = False
    stored_data: bool = False
    plan: Callable[[Any], Any] | None = None
    replaces_gradient: bool = False
    """Whether it is a regularizer: only one of these goes into a method."""
    differentiate: Callable[..., tuple[Any, Any]] | None = None
    """Of an optimizer that takes its gradients elsewhere than at the weights,
    ``differentiate(loss, params, state, key)`` with ``loss(params)``: what
    ``jax.value_and_grad(loss, has_aux=True)(params)`` returns for others."""


_OWN_KEY = 1 << 20
"""Folded into a step's key for the optimizer; the keys of hooks are split from it."""


class _State(NamedTuple):
    optimizer: Any
    additions: tuple[Any, ...]
    tasks_done: jax.Array


def from_optax(
    make: Callable[..., optax.GradientTransformation] | optax.GradientTransformation,
    settings: Mapping[str, Setting | float] | None = None,
    *,
    name: str = "optimizer",
    summary: str = "",
) -> Method:
    """A method that is an optimizer and nothing more.

    Args:
      make: ``make(**settings)`` returns a gradient transformation. It is called with
        traced numbers while the step is compiled. Or a ready transformation, whose
        numbers are fixed then. Results and trials tell either from others of its name
        by what it computes.
      settings: the numbers that ``make`` takes, each a :class:`Setting` (with a range,
        so that it can be tuned) or a plain default.
      name: what results call the method.
      summary: one line about it.

    Returns:
      A :class:`Method`, not told where a task ends.

    Raises:
      ContinualError: if ``make`` has no argument of a setting's name.

    Example:
      >>> import optax
      >>> from classp_jax import continual
      >>> method = continual.from_optax(
      ...     optax.sgd, {"learning_rate": continual.Setting(0.1, 1e-3, 1.0)}
      ... )
      >>> method.settings["learning_rate"].default
      0.1
    """
    if isinstance(make, optax.GradientTransformation):
        if settings:
            raise ContinualError(
                f"method {name!r}: a ready transformation has no settings; pass a "
                "function that makes it"
            )
        ready = make
        make = lambda: ready  # noqa: E731
    described = {
        key: value if isinstance(value, Setting) else Setting(float(value))
        for key, value in (settings or {}).items()
    }
    try:
        inspect.signature(make).bind(**described)
    except TypeError as error:
        raise ContinualError(f"method {name!r}: {error}") from error
    composed = compose(name, Part(summary, described, make), ())
    return composed._replace(
        fingerprint=functools.partial(_fingerprint, make, described)
    )


def _fingerprint(
    make: Callable[..., optax.GradientTransformation],
    settings: Mapping[str, Setting],
    params: Any,
) -> str:
    """A hash of what it computes from gradients; empty if it wants more than them."""
    fixed = {name: s.default for name, s in settings.items() if s.compiled}
    traced = {name: np.float32(1) for name in settings if name not in fixed}

    def first_update(traced: Any, gradients: Any, params: Any) -> Any:
        tx = make(**fixed, **traced)
        return tx.update(gradients, tx.init(params), params)

    try:
        return program_hash(first_update, traced, params, params)
    except Exception:
        return ""  # Training will say what is wrong.


def compose(
    name: str,
    optimizer: Part,
    additions: Sequence[Part],
    parts: tuple[str, ...] = (),
) -> Method:
    """A method of one optimizer and any additions, which act in the given order.

    In each step the additions' ``settings``, then ``batch`` hooks act, the gradient of
    the loss is taken, then come the ``gradients`` hooks, the optimizer and the
    ``updates`` hooks. The extra arguments of the optimizer's update are a new ``key``
    for one that is random, and ``value``, ``grad`` and ``value_fn``, as Optax names
    them, for one that searches along a line.
    """
    settings = dict(optimizer.settings)
    for addition in additions:
        settings |= addition.settings

    def make(values: Mapping[str, Any], problem: Problem) -> Functions:
        hooks = [addition.make(values, problem) for addition in additions]
        return _functions(optimizer, hooks, values, problem)

    plans = [addition.plan for addition in additions if addition.plan is not None]
    return Method(
        name=name,
        summary=", ".join(p.summary for p in (*additions, optimizer) if p.summary),
        settings=settings,
        make=make,
        task_boundary_known=any(a.task_boundary_known for a in additions),
        stored_data=any(a.stored_data for a in additions),
        plan=plans[0] if plans else None,
        parts=parts or (name,),
    )


def _functions(
    optimizer: Part, hooks: Sequence[Hooks], values: Mapping[str, Any], problem: Problem
) -> Functions:
    def transform(tasks_done: Any) -> optax.GradientTransformationExtraArgs:
        own = {name: values[name] for name in optimizer.settings}
        for hook in hooks:
            if hook.settings is not None:
                own |= hook.settings(tasks_done)
        return optax.with_extra_args_support(optimizer.make(**own))

    def init(params: Any, key: jax.Array) -> _State:
        started = jnp.zeros([], jnp.int32)
        return _State(
            transform(started).init(params),
            tuple(
                hook.init(params, jax.random.fold_in(key, i))
                for i, hook in enumerate(hooks)
            ),
            started,
        )

    def step(
        params: Any, state: _State, batch: Batch, key: jax.Array
    ) -> tuple[Any, _State, Metrics]:
        dropout_key, *keys = jax.random.split(key, 1 + 2 * len(hooks))
        own, learned = list(state.additions), batch
        for i, hook in enumerate(hooks):
            if hook.batch is not None:
                own[i], learned = hook.batch(own[i], learned, keys[2 * i])

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            return problem.loss(params, learned, dropout_key)

        own_key = jax.random.fold_in(key, _OWN_KEY)
        if optimizer.differentiate is None:
            taken = jax.value_and_grad(loss_of, has_aux=True)(params)
        else:
            taken = optimizer.differentiate(loss_of, params, state.optimizer, own_key)
        (loss, logits), gradients = taken
        for i, hook in enumerate(hooks):
            if hook.gradients is not None:
                own[i], gradients = hook.gradients(
                    own[i], gradients, params, batch, keys[2 * i + 1]
                )
        updates, optimizer_state = transform(state.tasks_done).update(
            gradients,
            state.optimizer,
            params,
            key=own_key,
            value=loss,
            grad=gradients,
            # Optax hands it every extra argument that it names, and refuses others.
            value_fn=lambda params, key=None: loss_of(params)[0],
        )
        for i, hook in enumerate(hooks):
            if hook.updates is not None:
                hook_key = jax.random.fold_in(own_key, i)
                own[i], updates = hook.updates(own[i], updates, params, hook_key)
        metrics = Metrics(loss, logits, classp_jax.update_density(updates))
        params = optax.apply_updates(params, updates)
        return params, _State(optimizer_state, tuple(own), state.tasks_done), metrics

    def end_of_task(
        params: Any, state: _State, sample: Batch, key: jax.Array
    ) -> tuple[Any, _State]:
        own = list(state.additions)
        tasks_done = state.tasks_done + 1
        end = TaskEnd(params, state.optimizer, transform(tasks_done).init(params))
        for i, hook in enumerate(hooks):
            if hook.end_of_task is not None:
                own[i], end = hook.end_of_task(
                    own[i], end, sample, jax.random.fold_in(key, i)
                )
        return end.params, _State(end.optimizer_state, tuple(own), tasks_done)

    at_end = any(h.end_of_task is not None or h.settings is not None for h in hooks)
    return Functions(init, step, end_of_task if at_end else None)
