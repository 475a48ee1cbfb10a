"""Bad input: refused where it enters, with a message that says what is allowed."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["0.1", None, [0.1], (), {}, 1j, True, object]
NO_SCALARS = [np.ones(3), jnp.ones(1), np.ones((2, 2))]
NO_REALS = [jnp.asarray(1j), np.asarray("a")]

# Each public builder by its arguments that are numbers: the bad numbers for each, the
# words for the allowed ones, and whether a schedule is allowed.
NON_NEGATIVE = ([-1.0, -1e-30, -1, np.float32(-2), NAN, INF, -INF], ">= 0")
POSITIVE = ([0.0, 0, -0.5, np.float64(-1), np.int32(0), NAN, INF, -INF], "> 0")
FINITE = ([NAN, INF, -INF, np.float32("nan")], "finite")
DENSITY = ([0.0, 0, -0.1, 1.0001, 2, NAN, INF, np.float32(1.5)], "in (0, 1]")
WINDOW = ([0.0, 0.5, 0, -1, NAN, INF], ">= 1, or None")
SWITCH = ([0.5, 2, -1, NAN, INF], "a bool, 0 or 1")


def protect_sgd(**arguments: Any) -> Any:
    return classp_jax.protect(optax.sgd(0.1), **arguments)


ARGUMENTS = {
    classp_jax.mask_by_threshold: {"threshold": (NON_NEGATIVE, True)},
    classp_jax.mask_to_density: {
        "density": (DENSITY, True),
        "rate": (POSITIVE, False),
    },
    classp_jax.scale_by_generalized_adagrad: {
        "power": (POSITIVE, False),
        "eps": (NON_NEGATIVE, False),
        "prior": (NON_NEGATIVE, False),
        "window": (WINDOW, True),
        "scaling": (SWITCH, True),
    },
    protect_sgd: {
        "power": (POSITIVE, False),
        "eps": (POSITIVE, False),
        "prior": (NON_NEGATIVE, False),
        "window": (WINDOW, True),
        "frozen": (SWITCH, True),
    },
    classp_jax.classp: {
        "learning_rate": (NON_NEGATIVE, True),
        "threshold": (NON_NEGATIVE, True),
        "power": (POSITIVE, False),
        "eps": (NON_NEGATIVE, False),
        "prior": (NON_NEGATIVE, False),
        "window": (WINDOW, True),
        "scaling": (SWITCH, True),
    },
    classp_jax.classp_published: {
        "learning_rate": (NON_NEGATIVE, True),
        "threshold": (FINITE, True),
        "power": (POSITIVE, False),
        "eps": (NON_NEGATIVE, False),
        "scaling": (SWITCH, True),
    },
}
REQUIRED = {
    classp_jax.mask_by_threshold: {"threshold": 0.1},
    classp_jax.mask_to_density: {"density": 0.1},
    classp_jax.scale_by_generalized_adagrad: {},
    protect_sgd: {},
    classp_jax.classp: {"learning_rate": 0.1},
    classp_jax.classp_published: {},
}
CASES = [
    (build, name, *rest)
    for build, arguments in ARGUMENTS.items()
    for name, rest in arguments.items()
]
BUILDERS = list(ARGUMENTS)
WITH_STATE_LIKE_PARAMETERS = [
    classp_jax.scale_by_generalized_adagrad,
    classp_jax.classp,
    classp_jax.classp_published,
    classp_jax.mask_to_density,
    protect_sgd,
]


def call(build: Callable[..., Any], **arguments: Any) -> Any:
    return build(**{**REQUIRED[build], **arguments})


def says(*parts: Any) -> Callable[[pytest.ExceptionInfo], None]:
    """Checks that an error names every part."""

    def check(info: pytest.ExceptionInfo) -> None:
        for part in parts:
            assert str(part) in str(info.value)

    return check


def name_of(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize(("build", "name", "numbers", "schedule"), CASES, ids=name_of)
def test_numbers_out_of_range(build, name, numbers, schedule):
    bad, allowed = numbers
    for value in bad:
        with pytest.raises(ValueError) as info:
            call(build, **{name: value})
        says(name, repr(value), allowed)(info)


@pytest.mark.parametrize(("build", "name", "numbers", "schedule"), CASES, ids=name_of)
def test_what_is_no_number(build, name, numbers, schedule):
    for value in NO_NUMBERS:
        if (value is True and numbers is SWITCH) or (
            value is None and numbers is WINDOW
        ):
            continue
        # A class is callable, and so passes for a schedule where one is allowed.
        if value is object and schedule:
            continue
        with pytest.raises(TypeError) as info:
            call(build, **{name: value})
        says(name, repr(value), numbers[1])(info)
    for value in NO_REALS:
        with pytest.raises(TypeError, match=name) as info:
            call(build, **{name: value})
        says(value.dtype)(info)
    for value in NO_SCALARS:
        with pytest.raises(ValueError, match=name) as info:
            call(build, **{name: value})
        says(value.shape)(info)
    if not schedule:
        with pytest.raises(TypeError, match=f"{name} must be a number or a scalar"):
            call(build, **{name: lambda step: 0.1})


@pytest.mark.parametrize(("build", "name", "numbers", "schedule"), CASES, ids=name_of)
def test_what_is_allowed_is_not_refused(build, name, numbers, schedule):
    good: list[Any] = [1, 1.0, np.float32(1), np.int64(1), jnp.float32(1), np.ones(())]
    if numbers is NON_NEGATIVE or numbers is SWITCH:
        good += [0, 0.0]
    if numbers is FINITE:
        good += [-1e9, -0.1, 0]
    if numbers is SWITCH:
        good += [True, False, np.bool_(True), jnp.asarray(False)]
    if schedule:
        good.append(lambda step: jnp.float32(1))
    g = jnp.asarray([1.0, -2.0])
    for value in good:
        tx = call(build, **{name: value})
        updates, _ = tx.update(g, tx.init(g))
        assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("build", BUILDERS, ids=name_of)
def test_tracers_pass(build):
    g = jnp.asarray([1.0, -2.0])
    for name in ARGUMENTS[build]:
        if name == "rate":
            continue

        def update(value: jax.Array, build=build, name=name) -> jax.Array:
            tx = call(build, **{name: value})
            return tx.update(g, tx.init(g))[0]

        assert jnp.isfinite(jax.jit(update)(jnp.float32(1))).all()


@pytest.mark.parametrize(
    "build",
    [classp_jax.scale_by_generalized_adagrad, classp_jax.classp, protect_sgd],
    ids=name_of,
)
@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("int32", "int32"),
        (jnp.int8, "int8"),
        (bool, "bool"),
        (jnp.complex64, "complex64"),
        # Sums in them would stall, leave the range, or both.
        (jnp.float16, "float16"),
        (jnp.float8_e4m3fn, "float8_e4m3fn"),
        ("no dtype", "'no dtype'"),
        (object, "object"),
    ],
)
def test_accumulator_dtype(build, dtype, named):
    with pytest.raises(TypeError) as info:
        call(build, accumulator_dtype=dtype)
    says("accumulator_dtype must be bfloat16, float32 or float64", named)(info)


@pytest.mark.parametrize("value", ["layer", "", 1, True])
def test_units_of_epsilon(value):
    for build in (
        classp_jax.scale_by_generalized_adagrad,
        classp_jax.classp,
        protect_sgd,
    ):
        with pytest.raises(ValueError, match=re.escape(repr(value))) as info:
            call(build, eps_unit=value)
        says("eps_unit", "'leaf'", "'tree'")(info)


def test_injected_numbers():
    injected: Any = classp_jax.inject_hyperparams(classp_jax.classp)
    with pytest.raises(ValueError, match="power must be finite and > 0"):
        injected(0.1, power=0.0).init(PARAMS)
    with pytest.raises(TypeError, match=r"'0\.1'"):
        injected(0.1, power="0.1").init(PARAMS)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_flags(value):
    with pytest.raises(TypeError, match=re.escape(repr(value))) as info:
        classp_jax.scale_by_generalized_adagrad(include_current=value)
    says("include_current", "bool")(info)
    with pytest.raises(TypeError, match=re.escape(repr(value))) as info:
        classp_jax.mask_to_density(0.1, per_leaf=value)
    says("per_leaf", "bool")(info)


@pytest.mark.parametrize("inner", [0.1, optax.sgd, None, {}])
def test_what_is_no_optimizer_cannot_be_braked(inner):
    with pytest.raises(
        TypeError, match=r"inner must be .*such as optax\.sgd\("
    ) as info:
        classp_jax.protect(inner)
    says(repr(inner))(info)


@pytest.mark.parametrize("bad", [0.0, 0, 0.5, -1.0, NAN, INF])
@pytest.mark.parametrize(
    "build",
    [classp_jax.scale_by_generalized_adagrad, classp_jax.classp, protect_sgd],
    ids=name_of,
)
def test_a_schedule_of_windows_that_gives_a_bad_number(build, bad):
    tx = call(build, window=lambda count: bad)
    g = jnp.asarray([1.0, -2.0])
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match="window must be finite and >= 1") as info:
            update(g, tx.init(g))
        says(repr(bad))(info)


# Trees.


@pytest.mark.parametrize("build", BUILDERS, ids=name_of)
@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (np.arange(3), "int"),
        (jnp.arange(3), "int32"),
        (jnp.ones(3, bool), "bool"),
        (jnp.ones(3, jnp.uint8), "uint8"),
        (3, "int32"),
        (np.asarray(["a"]), "<U1"),
    ],
    ids=["numpy int", "int", "bool", "uint8", "python int", "strings"],
)
def test_leaves_that_are_no_floats(build, leaf, dtype):
    tx = call(build)
    good = {"net": {"w": jnp.ones(3), "steps": jnp.ones(3)}}
    bad = {"net": {"w": jnp.ones(3), "steps": leaf}}
    with pytest.raises(TypeError) as info:
        tx.init(bad)
    says("parameter", "'net/steps'", dtype, "floating-point", "optax.masked")(info)
    with pytest.raises(TypeError) as info:
        tx.update(bad, tx.init(good))
    says("gradient", "'net/steps'", dtype, "floating-point")(info)


def test_a_bare_array_has_no_name():
    tx = classp_jax.classp(0.1)
    state = tx.init(jnp.ones(2))
    with pytest.raises(TypeError, match="In the parameter tree, the array is of type"):
        tx.init(jnp.arange(3))
    with pytest.raises(ValueError, match=r"In the gradients, the array has shape \(3,"):
        tx.update(jnp.ones(3), state)
    with pytest.raises(ValueError, match="two accumulators for the array:"):
        classp_jax.accumulators((state, state))
    with pytest.raises(ValueError, match="NaN or infinity, in the array"):
        classp_jax.accumulate_importance(tx, state, jnp.ones(2), jnp.full(2, NAN))


@pytest.mark.parametrize("build", BUILDERS, ids=name_of)
def test_the_way_out_that_the_message_names(build):
    """Integer leaves beside the optimizer, under optax.masked."""
    params = {"w": jnp.ones(3), "steps": jnp.arange(3)}
    tx = optax.masked(call(build), {"w": True, "steps": False})
    _, state = tx.update(params, tx.init(params))
    assert jax.tree.leaves(state)
    if optax.tree.get_all_with_path(state, "accumulator"):
        grad = jax.grad(lambda p: p["w"].sum(), allow_int=True)
        for gradients in (params, grad(params)):
            assert classp_jax.accumulate_importance(tx, state, params, gradients)


PARAMS = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": jnp.ones(())}
OTHER_TREES = {
    "a leaf missing": {"a": {"w": jnp.ones((2, 3))}, "c": jnp.ones(())},
    "a leaf too many": PARAMS | {"d": jnp.ones(2)},
    "another name": {"a": PARAMS["a"], "C": PARAMS["c"]},
    "a list": [PARAMS["a"], PARAMS["c"]],
    "one array": jnp.ones((2, 3)),
    "deeper": PARAMS | {"c": {"c": jnp.ones(())}},
    "a None": PARAMS | {"c": None},
}
OTHER_SHAPES = {
    "transposed": (3, 2),
    "a row": (3,),
    "broadcastable": (1, 3),
    "empty": (0, 3),
    "a scalar": (),
}


def assert_state_unharmed(tx: Any, state: Any, before: list[bytes]) -> None:
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state)] == before
    updates, after = tx.update(PARAMS, state)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def after_one_step(tx: Any) -> tuple[Any, list[bytes]]:
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    return state, [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("tree", OTHER_TREES)
@pytest.mark.parametrize("build", WITH_STATE_LIKE_PARAMETERS, ids=name_of)
def test_gradients_of_another_tree(build, tree, jit):
    tx = call(build)
    state, before = after_one_step(tx)
    # Donated as in a real step: it must not be given up before the check.
    update = jax.jit(tx.update, donate_argnums=1) if jit else tx.update
    with pytest.raises(ValueError, match="do not have the tree") as info:
        update(OTHER_TREES[tree], state)
    found = jax.tree.structure(OTHER_TREES[tree])
    says(found, jax.tree.structure(PARAMS))(info)
    assert_state_unharmed(tx, state, before)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", OTHER_SHAPES)
@pytest.mark.parametrize(
    "build",
    [b for b in WITH_STATE_LIKE_PARAMETERS if b != classp_jax.mask_to_density],
    ids=name_of,
)
def test_gradients_of_another_shape(build, shape, jit):
    tx = call(build)
    state, before = after_one_step(tx)
    update = jax.jit(tx.update, donate_argnums=1) if jit else tx.update
    shape = OTHER_SHAPES[shape]
    gradients = PARAMS | {"a": PARAMS["a"] | {"w": jnp.ones(shape)}}
    with pytest.raises(ValueError) as info:
        update(gradients, state)
    says("'a/w'", shape, (2, 3))(info)
    assert_state_unharmed(tx, state, before)


@pytest.mark.parametrize("build", [*BUILDERS], ids=name_of)
def test_the_state_of_another_transform(build):
    tx = call(build)
    for state in (optax.adam(0.1).init(PARAMS), (), optax.EmptyState(), None):
        with pytest.raises(TypeError, match="state of another transform") as info:
            tx.update(PARAMS, state)
        says(type(state).__name__)(info)


def test_accumulate_importance_raises_as_the_update():
    tx = classp_jax.classp(0.1)
    state, before = after_one_step(tx)
    add = functools.partial(classp_jax.accumulate_importance, tx, state, PARAMS)
    with pytest.raises(ValueError, match="do not have the tree"):
        add(OTHER_TREES["a leaf missing"])
    with pytest.raises(TypeError, match="floating-point"):
        add(jax.tree.map(lambda w: w.astype(int), PARAMS))
    assert_state_unharmed(tx, state, before)
