"""What every Optax transform must hold, for every public transform of the package."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SCHEDULABLE = ("learning_rate", "threshold", "scaling", "density", "window", "frozen")
STEPS = 4


class Case(NamedTuple):
    """A public transform, hyperparameters to build it with and its fixed options."""

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    hyperparams: dict[str, Any]
    options: dict[str, Any]

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.hyperparams, **self.options, **changed})


def _case(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
    options: dict[str, Any] | None = None,
    **hyperparams: Any,
) -> tuple[Any, ...]:
    return factory, hyperparams, options or {}


_CASES = {
    "mask_by_threshold": _case(classp_jax.mask_by_threshold, threshold=1e-4),
    "mask_to_density": _case(classp_jax.mask_to_density, density=0.6, rate=0.1),
    "mask_to_density_of_tree": _case(
        classp_jax.mask_to_density, {"per_leaf": False}, density=0.6, rate=0.1
    ),
    "scale_by_generalized_adagrad": _case(
        classp_jax.scale_by_generalized_adagrad,
        power=1.5,
        eps=1e-3,
        prior=0.5,
        scaling=True,
    ),
    **{
        f"classp_{power}": _case(
            classp_jax.classp,
            learning_rate=0.5,
            threshold=threshold,
            power=power,
            eps=1e-2,
            prior=0.5,
            scaling=True,
        )
        for power, threshold in ((1.0, 0.0), (1.7, 1e-4))
    },
    "classp_in_leaf_units": _case(
        classp_jax.classp,
        {"eps_unit": "leaf"},
        learning_rate=0.5,
        threshold=1e-4,
        power=2.0,
        eps=3.0,
        prior=0.2,
        window=5.0,
        scaling=True,
    ),
    "scale_in_tree_units_excluding_current": _case(
        classp_jax.scale_by_generalized_adagrad,
        {"eps_unit": "tree", "include_current": False},
        power=1.0,
        eps=3.0,
        prior=0.5,
        window=20.0,
        scaling=True,
    ),
    "protect": _case(
        functools.partial(classp_jax.protect, optax.scale_by_rms(0.9)),
        power=1.5,
        eps=0.3,
        prior=0.5,
        window=9.0,
        frozen=False,
    ),
    "classp_published": _case(
        classp_jax.classp_published,
        learning_rate=0.2,
        threshold=0.5,
        power=2.0,
        eps=1e-2,
        scaling=True,
    ),
}
CASES = {name: Case(name, *case) for name, case in _CASES.items()}
ALGORITHM_STATES = (
    classp_jax.MaskByThresholdState,
    classp_jax.MaskToDensityState,
    classp_jax.ScaleByGeneralizedAdagradState,
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def params_tree(dtype: Any = jnp.float32) -> Any:
    return {
        "encoder": {"kernel": jnp.ones((3, 4), dtype), "bias": jnp.zeros(4, dtype)},
        "scale": jnp.asarray(2.0, dtype),
        "head": [jnp.full((3, 4), -1.0, dtype)],
    }


def gradients_tree(step: int, dtype: Any = jnp.float32) -> Any:
    """Gradients of mixed size, a good part of them exactly 0."""
    rng = np.random.default_rng(step)

    def gradient(w: jax.Array) -> jax.Array:
        size = 10.0 ** rng.uniform(-6, 1, w.shape)
        signed = size * rng.choice([-1.0, 0.0, 1.0], w.shape, p=[0.4, 0.2, 0.4])
        return jnp.asarray(signed, dtype)

    return jax.tree.map(gradient, params_tree())


def assert_close(actual: Any, desired: Any, rtol: float, atol: float = 0.0) -> None:
    """Same tree, shapes and dtypes; values close. ``rtol=0`` means the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(desired),
        strict=True,
    )
    for (path, a), d in pairs:
        name = jax.tree_util.keystr(path)
        assert jnp.result_type(a) == jnp.result_type(d), name
        wide = np.promote_types(jnp.result_type(a), jnp.float32)
        np.testing.assert_allclose(
            np.asarray(a, wide), np.asarray(d, wide), rtol=rtol, atol=atol, err_msg=name
        )


def avals(tree: Any) -> Any:
    """Shape, dtype and weak type of every leaf: what decides on a recompilation."""
    return jax.tree.map(jax.typeof, tree)


def without_weak_types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def run(
    tx: optax.GradientTransformation, params: Any, gradients: list[Any]
) -> tuple[list[Any], Any]:
    """All updates and the last state, at parameters that stay where they are."""
    state = tx.init(params)
    # Compiling takes most of this suite's time: only lax.cond outside jit, which is
    # compiled at every call, takes longer. That the jitted update equals this one is
    # a test below.
    has_cond = isinstance(state, optax.MultiStepsState) or any(
        isinstance(s, classp_jax.MaskToDensityState) for s in owned(state)
    )
    update = jax.jit(tx.update) if has_cond else tx.update
    updates = []
    for g in gradients:
        u, state = update(g, state, params)
        updates.append(u)
    return updates, state


def owned(state: Any) -> list[Any]:
    """The parts of a state that a transform of this package owns."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, ALGORITHM_STATES)

    return [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]


GRADIENTS = [gradients_tree(step) for step in range(STEPS)]


@functools.cache
def plain_run(name: str) -> tuple[list[Any], Any]:
    """What a case does with the gradients: what other ways are compared with."""
    return run(CASES[name].make(), params_tree(), GRADIENTS)


def test_the_gradients_reach_both_sides_of_the_masks():
    updates, _ = plain_run("mask_by_threshold")
    density, nonzero = (
        np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) != 0)
        for tree in (updates, GRADIENTS)
    )
    assert 0.1 < density < nonzero < 0.95


def test_unexpected_extra_args_and_a_second_call_does_not_trace_again(case: Case):
    tx = case.make()
    traces = 0

    @jax.jit
    def step(params, state, gradients, value):
        nonlocal traces
        traces += 1
        updates, state = tx.update(
            gradients, state, params, value=value, unexpected_argument=1
        )
        return optax.apply_updates(params, updates), state

    params = params_tree()
    state = tx.init(params)
    for g in GRADIENTS:
        params, state = step(params, state, g, jnp.float32(1.0))
    assert traces == 1


def with_rate(learning_rate: float, tx: optax.GradientTransformation):
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))


# The smaller the power, the longer the way counts: eps has to be large where a weight
# has far to go, or the steps die out before it arrives.
DESCENTS = {
    "mask_by_threshold": with_rate(1.5e-3, classp_jax.mask_by_threshold(1e-8)),
    "mask_to_density": with_rate(1.5e-3, classp_jax.mask_to_density(0.7)),
    "mask_to_density_of_tree": with_rate(
        1.5e-3, classp_jax.mask_to_density(0.7, per_leaf=False)
    ),
    "scale_by_generalized_adagrad": with_rate(
        0.5, classp_jax.scale_by_generalized_adagrad(2.0, 0.1)
    ),
    "scale_excluding_current": with_rate(
        0.3,
        classp_jax.scale_by_generalized_adagrad(2.0, 1000.0, include_current=False),
    ),
    **{
        f"classp_{power}": classp_jax.classp(learning_rate, 1e-8, power, eps)
        for power, learning_rate, eps in (
            (0.5, 6e4, 6e3),
            (1.0, 10.0, 1e3),
            (1.5, 0.5, 0.1),
            (1.7, 0.3, 1.0),
            (2.0, 0.5, 0.1),
            (3.0, 0.1, 1.0),
            (4.0, 0.03, 1.0),
        )
    },
    "classp_published_1": classp_jax.classp_published(10.0, power=1.0, eps=1e3),
    "classp_published_2": classp_jax.classp_published(0.1, power=2.0, eps=0.1),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_converges(name: str):
    tx = DESCENTS[name]
    start = {
        "parabola": jnp.array([-1.0, 10.0, 1.0]),
        "rosenbrock": jnp.zeros(2),
        "matrix": jnp.zeros((2, 2)),
        "mixed": (jnp.zeros(3), jnp.zeros((2, 2))),
    }
    goal = {
        "parabola": jnp.array([1.0, -1.0, 1.0]),
        "rosenbrock": jnp.ones(2),
        "matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]]),
        "mixed": (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
    }

    def loss(params):
        x, y = params["rosenbrock"]
        valley = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        squares = jax.tree.map(
            lambda w, to: jnp.sum((w - to) ** 2),
            {**params, "rosenbrock": goal["rosenbrock"]},
            goal,
        )
        return valley + optax.tree.sum(squares)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def descend(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=20_000)[0][0]

    assert_close(descend(start), goal, rtol=0.0, atol=3e-2)


HYPERPARAMS = [
    pytest.param(case, name, id=f"{key}-{name}")
    for key, case in CASES.items()
    for name in case.hyperparams
]


# The tests below compare one way to give a hyperparameter with another: they would not
# see one that is ignored.
@pytest.mark.parametrize(("case", "name"), HYPERPARAMS)
def test_every_hyperparameter_matters(case: Case, name: str):
    other = {"threshold": 1.5, "scaling": False, "frozen": True}.get(
        name, case.hyperparams[name] / 2
    )
    found = plain_run(case.name)
    different = run(case.make(**{name: other}), params_tree(), GRADIENTS)
    same = jax.tree.map(np.array_equal, found, different)
    assert not all(jax.tree.leaves(same))


def test_map_params_reaches_the_accumulator_and_not_the_count(case: Case):
    tx = case.make()
    _, state = plain_run(case.name)
    mapped: Any = optax.tree.map_params(tx, lambda v: v + jnp.ones_like(v), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for before, after in zip(owned(state), owned(mapped), strict=True):
        assert int(after.count) == int(before.count) == STEPS
        for field in set(before._fields) - {"count", "mean_square"}:
            assert_close(
                getattr(after, field),
                jax.tree.map(lambda v: v + jnp.ones_like(v), getattr(before, field)),
                rtol=0.0,
            )


def injected(case: Case, hyperparams: dict[str, Any]) -> Any:
    # A bool would be left out of the injection: it has to come as an array.
    arrays = {
        name: jnp.asarray(value, jnp.bool_ if isinstance(value, bool) else jnp.float32)
        for name, value in hyperparams.items()
    }
    return optax.inject_hyperparams(case.factory, static_args=tuple(case.options))(
        **arrays, **case.options
    )


def test_injected_hyperparameters_equal_the_plain_form(case: Case):
    updates, state = plain_run(case.name)
    tx = injected(case, case.hyperparams)
    updates_injected, state_injected = run(tx, params_tree(), GRADIENTS)
    assert set(state_injected.hyperparams) == set(case.hyperparams)
    assert_close(updates_injected, updates, rtol=1e-5)
    assert_close(state_injected.inner_state, state, rtol=1e-5)


def test_injected_hyperparameters_can_be_changed_in_the_state(case: Case):
    updates, _ = plain_run(case.name)
    other = {
        name: False if value is True else 0.9 * value
        for name, value in case.hyperparams.items()
    }
    tx = injected(case, other)
    state = tx.init(params_tree())
    traces = 0

    @jax.jit
    def update(gradients, state, params):
        nonlocal traces
        traces += 1
        return tx.update(gradients, state, params)

    different, _ = update(GRADIENTS[0], state, params_tree())
    for name, value in case.hyperparams.items():
        held = state.hyperparams[name]
        state.hyperparams[name] = jnp.asarray(value, held.dtype)
    updates_injected, _ = update(GRADIENTS[0], state, params_tree())
    assert_close(updates_injected, updates[0], rtol=1e-5)
    assert traces == 1, "hyperparameters are data: changing them compiles nothing"
    if "learning_rate" in other:
        same = jax.tree.map(jnp.array_equal, different, updates[0])
        assert not all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept(case: Case, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        params = gradients = jax.eval_shape(lambda: params_tree(dtype))
        for tx in (case.make(), injected(case, case.hyperparams)):
            state = jax.eval_shape(tx.init, params)
            updates, new_state = jax.eval_shape(tx.update, gradients, state, params)
            assert without_weak_types(updates) == without_weak_types(params)
            assert avals(new_state) == avals(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("accumulator", [None, "bfloat16", "float32", "float64"])
def test_accumulator_dtype(dtype: str, accumulator: str | None):
    wanted = accumulator or ("float64" if dtype == "float64" else "float32")
    with jax.enable_x64(True):
        params = jax.eval_shape(lambda: params_tree(dtype))
        tx = classp_jax.classp(0.1, accumulator_dtype=accumulator)
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        assert without_weak_types(updates) == without_weak_types(params)
        assert avals(new_state) == avals(state)
        (ours,) = owned(new_state)
        found = {a.dtype for a in jax.tree.leaves(ours.accumulator)}
        assert found == {jnp.dtype(wanted)}


def test_published_accumulates_in_the_parameters_dtype():
    (ours,) = owned(classp_jax.classp_published().init(params_tree(jnp.bfloat16)))
    assert {a.dtype for a in jax.tree.leaves(ours.accumulator)} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_multi_steps_equals_one_step_on_the_mean_gradient(case: Case):
    # Two dtypes at once, for the price of one compilation.
    params = layer_in_two_dtypes(params_tree)
    gradients = [layer_in_two_dtypes(gradients_tree, step) for step in range(STEPS)]
    tx = optax.MultiSteps(case.make(), every_k_schedule=STEPS)
    # MultiSteps itself mixes int32 with float32.
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = run(tx.gradient_transformation(), params, gradients)
    for u in jax.tree.leaves(updates[:-1]):
        np.testing.assert_array_equal(u, 0)
    mean = functools.reduce(
        lambda mean, g: jax.tree.map(
            lambda m, x: m + (x - m) / jnp.asarray(g[0] + 1, m.dtype), mean, g[1]
        ),
        enumerate(gradients),
        jax.tree.map(jnp.zeros_like, params),
    )
    (expected,), _ = run(case.make(), params, [mean])
    for dtype, rtol in (("bfloat16", 2e-2), ("float32", 1e-5)):
        assert_close(updates[-1][dtype], expected[dtype], rtol=rtol)


def layer_in_two_dtypes(tree: Callable[..., Any], *args: Any) -> dict[str, Any]:
    return {
        dtype: tree(*args, dtype=dtype)["encoder"] for dtype in ("bfloat16", "float32")
    }


def test_state_is_stable_under_scan_and_cond(case: Case):
    tx = case.make()
    params = params_tree()
    keep = [True, False, True, True]
    taken = [g for g, k in zip(GRADIENTS, keep, strict=True) if k]
    updates, state = run(tx, params, taken)

    def body(state, step):
        gradients, keep = step
        updates, state = jax.lax.cond(
            keep,
            lambda: tx.update(gradients, state, params),
            lambda: (jax.tree.map(jnp.zeros_like, gradients), state),
        )
        return state, updates

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *GRADIENTS)
    state_scan, updates_scan = jax.jit(
        lambda: jax.lax.scan(body, tx.init(params), (stacked, jnp.array(keep)))
    )()
    assert_close(state_scan, state, rtol=1e-6)
    indices = [i for i, k in enumerate(keep) if k]
    unstacked = [jax.tree.map(lambda u, i=i: u[i], updates_scan) for i in indices]
    assert_close(unstacked, updates, rtol=1e-6)


SCHEDULES = [
    pytest.param(case, name, id=f"{key}-{name}")
    for key, case in CASES.items()
    for name in SCHEDULABLE
    if name in case.hyperparams
]


@pytest.mark.parametrize(("case", "name"), SCHEDULES)
def test_a_schedule_equals_one_transform_taking_over_from_another(
    case: Case, name: str
):
    first = case.hyperparams[name]
    second = not first if isinstance(first, bool) else 1.3 * first + 1e-3
    before, after = case.make(), case.make(**{name: second})
    params = params_tree()
    updates, state = run(before, params, GRADIENTS[:2])
    for g in GRADIENTS[2:]:
        u, state = after.update(g, state, params)
        updates.append(u)
    schedule = case.make(**{name: lambda step: jnp.where(step < 2, first, second)})
    updates_schedule, state_schedule = run(schedule, params, GRADIENTS)
    assert_close(updates_schedule, updates, rtol=1e-6)
    assert_close(state_schedule, state, rtol=1e-6)


def test_the_state_never_depends_on_a_hyperparameters_value(case: Case):
    params = params_tree()
    reference = case.make()
    state = reference.init(params)
    wanted = avals(state), jax.tree.structure(state)
    hyper = case.hyperparams
    variants: list[dict[str, Any]] = []
    for name, value in case.hyperparams.items():
        other = not value if isinstance(value, bool) else 0.5 * value
        variants += [{name: other}, {name: jnp.asarray(other)}]
        if name in SCHEDULABLE:
            variants.append({name: lambda step, other=other: jnp.asarray(other)})
        if name in ("threshold", "prior") or (name == "eps" and "frozen" not in hyper):
            variants.append({name: 0.0})
        if name == "power":
            variants += [{name: power} for power in (1, 2.2)]
    for changed in variants:
        tx = case.make(**changed)
        state = tx.init(params)
        assert (avals(state), jax.tree.structure(state)) == wanted, changed
        _, state = jax.eval_shape(tx.update, GRADIENTS[0], state, params)
        assert jax.tree.structure(state) == wanted[1], changed
        assert without_weak_types(state) == without_weak_types(wanted[0]), changed


def test_masked_leaves_the_rest_alone(case: Case):
    mask = {"encoder": True, "scale": False, "head": True}
    updates, state = run(optax.masked(case.make(), mask), params_tree(), GRADIENTS)

    def inside(tree):
        return {name: tree[name] for name in ("encoder", "head")}

    expected, alone = run(
        case.make(), inside(params_tree()), [inside(g) for g in GRADIENTS]
    )
    assert_close([inside(u) for u in updates], expected, rtol=1e-6)
    for u, g in zip(updates, GRADIENTS, strict=True):
        assert_close(u["scale"], g["scale"], rtol=0.0)
    # No memory for the leaves outside.
    assert optax.tree.size(state) == optax.tree.size(alone)


def test_partition_gives_each_layer_its_own_hyperparameter(case: Case):
    name = next(
        iter(n for n in ("threshold", "density", "power") if n in case.hyperparams)
    )
    value = case.hyperparams[name]
    transforms = {
        "encoder": case.make(),
        "head": case.make(**{name: 0.5 * value + 0.1}),
    }
    tx = optax.partition(
        {**transforms, "frozen": optax.set_to_zero()},
        {"encoder": "encoder", "scale": "frozen", "head": "head"},
    )
    params = params_tree()
    updates, state = run(tx, params, GRADIENTS)
    sizes = 0
    for layer, transform in transforms.items():
        expected, alone = run(transform, params[layer], [g[layer] for g in GRADIENTS])
        assert_close([u[layer] for u in updates], expected, rtol=1e-6)
        sizes += optax.tree.size(alone)
    assert optax.tree.size(state) == sizes
    for u in updates:
        assert_close(u["scale"], jnp.zeros_like(params["scale"]), rtol=0.0)
    assert float(jnp.abs(GRADIENTS[0]["scale"])) > 0, "the frozen leaf has a gradient"


def test_abstract_parameters_are_enough(case: Case):
    tx = case.make()
    params = params_tree()
    abstract = jax.eval_shape(lambda: params)
    state = tx.init(params)
    assert avals(jax.eval_shape(tx.init, abstract)) == avals(state)
    updates, new_state = jax.eval_shape(tx.update, abstract, state, abstract)
    assert without_weak_types(updates) == without_weak_types(params)
    assert without_weak_types(new_state) == without_weak_types(state)


def test_init_accepts_shape_dtype_structs(case: Case):
    params = params_tree()
    state = case.make().init(jax.eval_shape(lambda: params))
    assert avals(state) == avals(case.make().init(params))


def test_vmap_over_hyperparameters_equals_a_loop(case: Case):
    params = params_tree()["encoder"]
    first, second = (g["encoder"] for g in GRADIENTS[:2])
    variants = [
        case.hyperparams,
        {
            name: not value if isinstance(value, bool) else 0.8 * value + 1e-3
            for name, value in case.hyperparams.items()
        },
    ]

    def two_updates(hyperparams):
        tx = case.make(**hyperparams)
        updates, state = tx.update(first, tx.init(params), params)
        return updates, *tx.update(second, state, params)

    batch = {name: jnp.array([v[name] for v in variants]) for name in variants[0]}
    together = jax.jit(jax.vmap(two_updates))(batch)
    alone = jax.jit(two_updates)
    for i in range(len(variants)):
        expected = alone({name: values[i] for name, values in batch.items()})
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), expected, rtol=1e-5)


def test_no_tracer_leaks(case: Case):
    params = params_tree()["encoder"]
    gradients = GRADIENTS[0]["encoder"]

    def update(hyperparams):
        tx = case.make(**hyperparams)
        return tx.update(gradients, tx.init(params), params)

    arrays = jax.tree.map(jnp.asarray, case.hyperparams)
    tx = injected(case, case.hyperparams)
    with jax.checking_leaks():
        jax.eval_shape(lambda: update({}))
        jax.eval_shape(update, arrays)
        jax.eval_shape(lambda: tx.update(gradients, tx.init(params), params))


def test_the_update_lowers_for_every_platform(case: Case):
    both, full = layer_in_two_dtypes(params_tree), params_tree()["encoder"]
    for tx, params in (
        (case.make(), both),
        (injected(case, case.hyperparams), full),
    ):
        state = jax.eval_shape(tx.init, params)
        exported = jax.export.export(jax.jit(tx.update), platforms=PLATFORMS)(
            params, state, params
        )
        assert exported.platforms == PLATFORMS


@pytest.mark.parametrize("name", ["mask_to_density", "classp_1.7"])
def test_the_exported_update_gives_the_same_bits(name: str):
    tx = CASES[name].make()
    params = params_tree()
    state = tx.init(params)
    exported = jax.export.export(jax.jit(tx.update), platforms=PLATFORMS)(
        GRADIENTS[0], state, params
    )
    assert_close(
        exported.call(GRADIENTS[0], state, params),
        jax.jit(tx.update)(GRADIENTS[0], state, params),
        rtol=0.0,
    )
