"""Compiled once for each program, not for each function object."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

_PLACES = (jax.sharding.Mesh, jax.sharding.Sharding)


class _Program:
    """A traced function, equal to every other one that reads the same."""

    def __init__(self, closed: ClosedJaxpr, out_tree: Any):
        # Without its constants, which are arguments: they may change, and may be large.
        self.jaxpr, self.out_tree = closed.jaxpr, out_tree
        # The text names a mesh's axes, not its devices.
        placed = tuple(p for p in _parameters(closed.jaxpr) if isinstance(p, _PLACES))
        self._key = (str(closed.jaxpr), out_tree, placed)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self._key == other._key

    def __call__(self, constants: Any, arguments: Any) -> Any:
        run = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, constants))
        return self.out_tree.unflatten(run(*jax.tree.leaves(arguments)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run(program: _Program, donated: Any, constants: Any, others: Any) -> Any:
    return program(constants, (donated, *others))


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """``function``, compiled for arguments like these; the first one is donated.

    ``jax.jit`` keeps what it compiled by the function's identity. It compiles a closure
    again whenever it is made again, and takes an old one for unchanged when what it
    captured has changed. Here the function is traced on every call of this one, which
    takes milliseconds, and compiled if no program that reads the same has been. Nothing
    that the function captured is kept.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    if _hides_something(closed.jaxpr):
        return jax.jit(function, donate_argnums=0)
    program = _Program(closed, jax.tree.structure(shapes))
    return lambda first, *others: _run(program, first, closed.consts, others)


def _hides_something(jaxpr: Jaxpr) -> bool:
    """Whether the program holds arrays or functions, which its text does not show."""

    def hides(value: Any) -> bool:
        if isinstance(value, ClosedJaxpr):
            return bool(value.consts)
        is_shown = isinstance(value, type | jax.sharding.Mesh)
        is_array = isinstance(value, jax.Array | np.ndarray)
        return is_array or (callable(value) and not is_shown)

    return any(map(hides, _parameters(jaxpr)))


def _parameters(jaxpr: Jaxpr) -> Iterator[Any]:
    """What every operation of the program, also of those inside it, is given."""

    def is_program(value: Any) -> bool:
        return isinstance(value, ClosedJaxpr | Jaxpr)

    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=is_program):
            yield value
            if is_program(value):
                yield from _parameters(getattr(value, "jaxpr", value))
