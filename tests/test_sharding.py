"""Eight devices give what one device gives, and keep the state where it belongs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import classp_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES = 8
STEPS = 6
OPTIMIZERS = {
    "mask_by_threshold": optax.chain(
        classp_jax.mask_by_threshold(3e-4), optax.scale_by_learning_rate(0.1)
    ),
    "mask_to_density": optax.chain(
        classp_jax.mask_to_density(0.3),
        classp_jax.scale_by_generalized_adagrad(),
        optax.scale_by_learning_rate(0.1),
    ),
    "mask_to_density_of_tree": optax.chain(
        classp_jax.mask_to_density(0.3, per_leaf=False),
        classp_jax.scale_by_generalized_adagrad(),
        optax.scale_by_learning_rate(0.1),
    ),
    "classp": classp_jax.classp(0.1, 3e-4, 1.5, 0.01),
    "classp_general_power": classp_jax.classp(0.1, 3e-4, 1.7, 0.01),
    "classp_published": classp_jax.classp_published(0.1),
}
IN_LAYOUT = {"kernel": P(None, "x"), "bias": P("x"), "temperature": P()}


@pytest.fixture(params=OPTIMIZERS)
def tx(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


@pytest.fixture(scope="module", autouse=True)
def _eight_devices():
    assert jax.device_count() == DEVICES, "tests/conftest.py asks for eight"


def initial_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(np.float32(rng.normal(size=(12, 16)) / 4)),
        "bias": jnp.zeros(16, jnp.float32),
        "temperature": jnp.float32(1.0),
    }


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [steps, batch, 12] and targets [steps, batch, 16]."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, 4 * DEVICES, 12)).astype(np.float32)
    y = rng.normal(size=(STEPS, 4 * DEVICES, 16)).astype(np.float32)
    return x, y


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    predictions = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean((params["temperature"] * predictions - y) ** 2)


@functools.cache
def descend_on_one_device(tx: Any) -> tuple[Any, Any]:
    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = initial_params()
    state = tx.init(params)
    for x, y in zip(*batches(), strict=True):
        params, state = step(params, state, x, y)
    return params, state


def test_the_descent_moves_some_weights_and_leaves_others():
    params, state = descend_on_one_device(OPTIMIZERS["classp"])
    free = np.concatenate([np.ravel(a == 0) for a in state.accumulator.values()])
    assert 0.05 < np.mean(free) < 0.95
    moved = jax.tree.map(lambda w, start: w != start, params, initial_params())
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(m) for m in jax.tree.leaves(moved)]), ~free
    )


def assert_close(actual: Any, desired: Any, rtol: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(a, d, rtol=rtol, atol=1e-7),
        actual,
        desired,
    )


def assert_same_on_every_device(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == DEVICES
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])


def test_data_parallel_jit_equals_one_device(tx: Any):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    split = NamedSharding(mesh, P("data"))

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(initial_params(), everywhere)
    state = jax.device_put(tx.init(params), everywhere)
    for x, y in zip(*batches(), strict=True):
        params, state = step(
            params, state, jax.device_put(x, split), jax.device_put(y, split)
        )
    assert_same_on_every_device((params, state))
    assert_close((params, state), descend_on_one_device(tx), rtol=1e-4)


def test_pmap_equals_one_device(tx: Any):
    def step(params, state, x, y):
        gradients = jax.lax.pmean(jax.grad(loss)(params, x, y), "data")
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    parallel_step = jax.pmap(step, axis_name="data", in_axes=(0, 0, 0, 0))
    params = jax.tree.map(lambda w: jnp.stack([w] * DEVICES), initial_params())
    state = jax.pmap(tx.init)(params)
    for x, y in zip(*batches(), strict=True):
        params, state = parallel_step(
            params,
            state,
            x.reshape(DEVICES, -1, *x.shape[1:]),
            y.reshape(DEVICES, -1, *y.shape[1:]),
        )
    for leaf in jax.tree.leaves((params, state)):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[0], copies.shape))
    one = jax.tree.map(lambda leaf: leaf[0], (params, state))
    assert_close(one, descend_on_one_device(tx), rtol=1e-4)


def test_sharded_parameters_equal_one_device(tx: Any):
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    layout = {name: NamedSharding(mesh, spec) for name, spec in IN_LAYOUT.items()}

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(initial_params(), layout)
    state = jax.jit(tx.init)(params)
    for x, y in zip(*batches(), strict=True):
        params, state = step(params, state, x, y)
        for name, sharding in layout.items():
            assert params[name].sharding.is_equivalent_to(sharding, params[name].ndim)
    assert_close((params, state), descend_on_one_device(tx), rtol=1e-4)


def test_the_accumulator_is_sharded_as_the_parameters_are():
    tx: Any = classp_jax.classp(0.1, 1e-4)
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    layout = {name: NamedSharding(mesh, spec) for name, spec in IN_LAYOUT.items()}
    params = jax.device_put(initial_params(), layout)
    # Both ways to make a state; neither may gather a leaf on one device.
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        for _ in range(2):
            _, state = jax.jit(tx.update)(params, state, params)
            accumulator = state.accumulator
            for name, sharding in layout.items():
                leaf = accumulator[name]
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), name
            pieces = accumulator["kernel"].addressable_shards
            assert {piece.data.shape for piece in pieces} == {(12, 2)}


def test_the_update_of_sharded_parameters_needs_no_communication():
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    layout = {name: NamedSharding(mesh, spec) for name, spec in IN_LAYOUT.items()}
    params = jax.device_put(initial_params(), layout)

    def collectives(tx: Any) -> set[str]:
        compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        return {name for name in names if name in str(compiled.as_text())}

    assert collectives(classp_jax.classp(0.1, 1e-4)) == set()
    # The share of moving weights is a sum over all devices; the weights stay put.
    assert collectives(classp_jax.mask_to_density(0.3)) == {"all-reduce"}


def test_sharding_in_types_is_stable(tx: Any):
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(w, NamedSharding(mesh, IN_LAYOUT[name]))
            for name, w in initial_params().items()
        }
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        for update in (tx.update, jax.jit(tx.update)):
            updates, new_state = update(params, state, params)
            assert jax.tree.map(jax.typeof, new_state) == types
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


def test_density_thresholds_follow_the_mean_gradient_not_a_device():
    # Devices that see different data must still move the same weights.
    tx: Any = classp_jax.mask_to_density(0.25)
    rng = np.random.default_rng(2)
    local = jnp.asarray(rng.normal(size=(STEPS, DEVICES, 64)), jnp.float32)
    update = jax.pmap(
        lambda g, state: tx.update(jax.lax.pmean(g, "data"), state), axis_name="data"
    )
    state = jax.pmap(tx.init)(local[0])
    alone = tx.init(local[0, 0])
    for g in local:
        updates, state = update(g, state)
        expected, alone = tx.update(jnp.mean(g, axis=0), alone)
        thresholds = np.asarray(state.level)
        assert np.all(thresholds == thresholds[0])
        np.testing.assert_allclose(thresholds[0], alone.level, rtol=1e-6)
        np.testing.assert_allclose(updates[0], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(updates, np.stack([updates[0]] * DEVICES))


# Laid out as data, as layers split over devices, and both.
FISHER_LAYOUTS = {
    "data": {"x": P("x"), "first": P(), "second": P()},
    "columns": {"x": P(), "first": P(None, "x"), "second": P(None, "x")},
    "both": {"x": P("x"), "first": P(), "second": P(None, "x")},
}


def fisher_arguments() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    params = {"first": rng.normal(size=(6, 16)), "second": rng.normal(size=(16, 8))}
    params = {name: w.astype(np.float32) for name, w in params.items()}
    x = rng.normal(size=(16, 6)).astype(np.float32)
    return params, x, np.arange(16, dtype=np.int32) % 8


@functools.cache
def fisher_on_one_device(kind: Any) -> Any:
    def logits(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["first"]) @ params["second"]

    @jax.jit
    def fisher(params: Any, x: Any, y: Any) -> Any:
        return classp_jax.regularizers.fisher_diagonal(
            logits, params, x, y, kind=kind, batch_size=5, key=jax.random.key(0)
        )

    return fisher(*fisher_arguments())


# Every pair of values.
@pytest.mark.parametrize(
    ("axis_type", "layout", "jit"),
    [
        (AxisType.Auto, "data", False),
        (AxisType.Explicit, "data", True),
        (AxisType.Auto, "columns", True),
        (AxisType.Explicit, "columns", False),
        (AxisType.Auto, "both", False),
        (AxisType.Explicit, "both", False),
        (AxisType.Explicit, "both", True),
    ],
)
def test_fisher_of_sharded_examples_and_parameters(axis_type, layout, jit):
    params, x, y = fisher_arguments()
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(axis_type,))
    specs = FISHER_LAYOUTS[layout]

    def logits(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["first"])
        if axis_type == AxisType.Explicit:
            hidden = jax.sharding.reshard(hidden, P())
        return hidden @ params["second"]

    def placed(tree: Any, spec: Any) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    all_kinds = layout == "both" and not jit
    for kind in ("exact", "sampled", "empirical") if all_kinds else ("exact",):
        expected = fisher_on_one_device(kind)
        fisher = functools.partial(
            classp_jax.regularizers.fisher_diagonal, logits, kind=kind, batch_size=5
        )
        key = jax.random.key(0)
        with jax.set_mesh(mesh):
            sharded = {name: placed(w, specs[name]) for name, w in params.items()}
            arguments = (sharded, placed(x, specs["x"]), placed(y, specs["x"]))
            actual = (jax.jit(fisher) if jit else fisher)(*arguments, key=key)
        for name, spec in specs.items():
            if name != "x":
                np.testing.assert_allclose(
                    actual[name], expected[name], rtol=1e-4, atol=1e-7
                )
                if axis_type == AxisType.Explicit or not jit:
                    sharding = NamedSharding(mesh, spec)
                    assert actual[name].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("place", ["constraint", "shard_map"])
def test_fisher_on_another_mesh_that_reads_the_same(place):
    params, x, _ = fisher_arguments()
    expected = fisher_on_one_device("exact")
    for devices in np.split(np.asarray(jax.devices()), 2):
        mesh = jax.sharding.Mesh(devices, ("x",))
        everywhere = NamedSharding(mesh, P())

        def logits(params: Any, x: Any, mesh: Any = mesh) -> Any:
            def network(params: Any, x: Any) -> Any:
                return jnp.tanh(x @ params["first"]) @ params["second"]

            if place == "shard_map":
                return jax.shard_map(network, mesh=mesh, in_specs=P(), out_specs=P())(
                    params, x
                )
            sharding = NamedSharding(mesh, P())
            return jax.lax.with_sharding_constraint(network(params, x), sharding)

        actual = classp_jax.regularizers.fisher_diagonal(
            logits, *jax.device_put((params, x), everywhere), batch_size=5
        )
        for name, f in actual.items():
            assert f.sharding.device_set == set(devices)
            np.testing.assert_allclose(f, expected[name], rtol=1e-4, atol=1e-7)


# What needs a mean over a whole leaf, or an optimizer inside.
ACCUMULATING = {
    "leaf": classp_jax.classp(0.1, 3e-4, eps=4.0, eps_unit="leaf"),
    "tree": classp_jax.classp(0.1, 3e-4, 2.0, eps=4.0, eps_unit="tree"),
    "window_tree": classp_jax.classp(0.1, eps_unit="tree", window=9.0, prior=0.5),
    "protect_leaf": classp_jax.protect(optax.sgd(0.1), eps=4.0, eps_unit="leaf"),
    "protect_tree": classp_jax.protect(
        optax.trace(0.9), 2.0, eps_unit="tree", window=9.0
    ),
}


def units_gradients() -> list[dict[str, np.ndarray]]:
    """Shards of very different scale, beside a leaf that every device has."""
    rng = np.random.default_rng(4)
    w = rng.normal(size=(3, 16, 5)) * np.exp(np.arange(16.0))[:, None]
    b = 100 * rng.normal(size=(3, 7))
    return [
        {"w": w[t].astype(np.float32), "b": b[t].astype(np.float32)} for t in range(3)
    ]


@functools.cache
def units_on_one_device(name: str) -> list[Any]:
    """The state at the start, and the updates and the state after each step."""
    tx: Any = ACCUMULATING[name]
    gradients, update = units_gradients(), jax.jit(tx.update)
    start = jax.jit(tx.init)(gradients[0])
    found, state = [start], start
    for g in gradients:
        updates, state = update(g, state)
        found.append((updates, state))
    return found


@pytest.mark.parametrize("place", ["jit", "explicit", "shard_map"])
@pytest.mark.parametrize("name", ACCUMULATING)
def test_units_are_of_the_whole_leaf(name: str, place: str):
    tx: Any = ACCUMULATING[name]
    kind = AxisType.Auto if place == "jit" else AxisType.Explicit
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(kind,))
    layout = {"w": P("x"), "b": P()}
    start, *expected = units_on_one_device(name)
    specs = jax.tree.map(
        lambda leaf: layout["w"] if leaf.shape == (16, 5) else P(), start
    )
    update = tx.update
    if place == "shard_map":
        update = jax.shard_map(
            tx.update, mesh=mesh, in_specs=(layout, specs), out_specs=(layout, specs)
        )
    update = jax.jit(update)

    def put(tree: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
        )

    state = put(start, specs)
    for gradients, after in zip(units_gradients(), expected, strict=True):
        with jax.set_mesh(mesh):
            updates, state = update(put(gradients, layout), state)
        assert_close((updates, state), after, rtol=1e-5)
        assert updates["w"].sharding.spec[0] == "x"
