"""Methods: their names, their settings, and that each follows the protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax
from classp_jax import continual
from classp_jax.continual.methods import (
    ADDITIONS,
    METHODS,
    OPTIMIZERS,
    Functions,
    Problem,
    Setting,
    as_methods,
    from_optax,
    method,
    resolve_settings,
    settings_of,
)
from classp_jax.continual.methods.replay import Reservoir, add
from tests.continual import agem

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _problem():
    def logits(params, batch, key=None):
        return batch.x @ params["w"]

    def loss(params, batch, key=None):
        found = logits(params, batch)
        errors = optax.softmax_cross_entropy_with_integer_labels(found, batch.y)
        return jnp.sum(errors * batch.weight) / jnp.sum(batch.weight), found

    return Problem(
        loss=loss,
        logits=logits,
        init=lambda key: {"w": jax.random.normal(key, (4, 3))},
        example=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_classes=3,
        batch_size=8,
        classes=jnp.ones((2, 3), bool),
        train_sizes=jnp.array([16, 16], jnp.int32),
        steps_per_pass=jnp.array([2, 2], jnp.int32),
        fisher="exact",
    )


def _batch(seed):
    rng = np.random.default_rng(seed)
    return continual.Batch(
        jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 8), jnp.int32),
        jnp.zeros(8, jnp.int32),
        jnp.ones((8, 3), bool),
        jnp.ones(8),
    )


RANDOM_WEIGHTS = ("bgd", "mesu")
"""Methods whose gradients are not those at the weights."""


@pytest.fixture
def standard_promotion():
    """Optax's Adam itself mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", [*METHODS, "replay+ewc+classp", "a-gem", "optax"])
def test_every_method_follows_the_protocol(name):
    """Traced settings; state, weights and metrics keep tree, shapes and dtypes."""
    own = {"a-gem": agem.METHOD, "optax": from_optax(optax.adam(0.1), name="optax")}
    found = own[name] if name in own else method(name)
    assert found.summary or name == "optax"
    settings = resolve_settings(found)
    static = {n: v for n, v in settings.items() if found.settings[n].compiled}
    numbers = {n: jnp.float32(v) for n, v in settings.items() if n not in static}
    problem, key = _problem(), jax.random.key(0)
    params = problem.init(key)

    def functions(numbers) -> Functions:
        return found.make({**static, **numbers}, problem)

    state = jax.jit(lambda n: functions(n).init(params, key))(numbers)
    step = jax.jit(lambda n, *carry: functions(n).step(*carry))
    before = jax.tree.map(lambda a: (a.shape, a.dtype), (params, state))
    moved, new_state, metrics = step(numbers, params, state, _batch(1), key)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), (moved, new_state)) == before
    assert metrics.logits.shape[0] >= 8
    if name not in RANDOM_WEIGHTS:
        shown = _batch(1).x @ params["w"]
        np.testing.assert_allclose(metrics.logits[:8], shown, rtol=1e-5)
    assert metrics.loss.shape == metrics.update_density.shape == ()
    if "leaf" in name:
        # The first step measures epsilon's unit.
        moved, new_state, metrics = step(numbers, moved, new_state, _batch(1), key)
    # Every optimizer goes down; without a threshold it moves all weights.
    assert problem.loss(moved, _batch(1))[0] < problem.loss(params, _batch(1))[0]
    assert (float(metrics.update_density) == 1) == ("density" not in name)
    ending = functions(numbers).end_of_task
    assert (ending is not None) or not found.task_boundary_known or "published" in name
    if ending is not None:
        ended = jax.jit(ending)(moved, new_state, _batch(2), key)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), ended) == before


def test_which_methods_know_the_boundary_and_which_store_data():
    def those(what):
        return {name for name in METHODS if getattr(method(name), what)}

    assert those("task_boundary_known") == {
        "ewc",
        "online-ewc",
        "implicit-ewc",
        "si",
        "mas",
        "lwf",
        "ewc-published",
        "lower-rate-later",
        "scale-later",
        "reset-optimizer",
    }
    assert those("stored_data") == {"replay", "joint"}
    assert method("reset-optimizer+adagrad").task_boundary_known


def test_an_addition_alone_stands_on_sgd_and_scale_later_on_classp():
    for addition in ADDITIONS:
        expected = "classp" if addition == "scale-later" else "sgd"
        assert method(addition).parts[0] == expected
    names = set(method("lower-rate-later").settings)
    assert names == {"learning_rate", "later_learning_rate"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clasp", "did you mean 'classp'"),
        ("ewc+sdg", "did you mean 'sgd'"),
        ("sgd+adam", "more than one optimizer"),
        ("ewc+si", "more than one regularizer"),
        ("replay+joint", "do not go together"),
        ("replay+replay", "do not go together"),
        ("lower-rate", "did you mean 'lower-rate-later'"),
        ("scale-later+sgd", "scale-later goes with classp,"),
        ("scale-later+classp-density", "scale-later goes with classp,"),
        ("", "unknown method"),
        (3, "named by text, got 3"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(continual.ContinualError, match=message):
        method(name)


def test_settings_come_in_layers_and_by_part():
    settings = resolve_settings(
        method("ewc+classp"),
        {"classp": {"learning_rate": 0.3, "eps": 0.2}, "ewc": {"strength": 5.0}},
        {"ewc+classp": {"strength": 7.0}, "ewc": {"strength": 6.0}},
        {"classp": {"eps": 0.1}},
    )
    assert settings["learning_rate"] == 0.3
    assert settings["eps"] == 0.1
    assert settings["strength"] == 7.0
    assert settings["power"] == 1.0


def test_the_learning_rate_of_ewc_alone_is_that_of_its_sgd():
    layer = {"ewc": {"learning_rate": 0.9, "strength": 3.0}}
    assert resolve_settings(method("ewc"), layer)["learning_rate"] == 0.9
    assert settings_of(method("ewc+classp"), layer) == {"strength": 3.0}


def test_methods_of_your_own_name():
    found = as_methods({"mine": "ewc", "sgd": optax.sgd(0.1), "other": agem.METHOD})
    assert [m.name for m in found.values()] == ["mine", "sgd", "other"]
    layer = {"mine": {"strength": 3.0}, "other": {"learning_rate": 0.7}}
    assert resolve_settings(found["mine"], layer)["strength"] == 3.0
    assert resolve_settings(found["other"], layer)["learning_rate"] == 0.7
    assert resolve_settings(found["sgd"], layer) == {}


def test_an_optimizer_that_searches_along_a_line_finds_the_loss():
    stream = continual.permuted("digits", tasks=2, max_train=64)
    options = {"seeds": [0], "epochs": 5, "batch_size": 32}
    results = continual.run(
        stream, "mlp", {"slow": optax.sgd(1e-3), "lbfgs": optax.lbfgs()}, **options
    )
    slow, lbfgs = (run.matrix[-1][-1] for run in results.runs)
    assert lbfgs > slow + 0.3


def test_from_optax_refuses_settings_that_do_not_fit():
    with pytest.raises(continual.ContinualError, match="momentun"):
        from_optax(
            lambda learning_rate: optax.sgd(learning_rate),
            {"learning_rate": 0.1, "momentun": 0.9},
        )
    with pytest.raises(continual.ContinualError, match="has no settings"):
        from_optax(optax.sgd(0.1), {"learning_rate": Setting(0.1)})


def test_defaults_are_the_library_s():
    assert method("classp").settings["eps"].default == 0.1
    for part in OPTIMIZERS.values():
        part.make(**{name: s.default for name, s in part.settings.items()})


def test_classp_exclusive_leaves_the_current_gradient_out():
    numbers = {"learning_rate": 0.3, "threshold": 0.1, "power": 1.5, "eps": 0.2}
    transform = OPTIMIZERS["classp-exclusive"].make(**numbers)
    sums, state = np.zeros(5), transform.init(jnp.zeros(5))
    rng, frozen = np.random.default_rng(0), 0
    for _ in range(4):
        g = rng.normal(size=5).astype(np.float32)
        updates, state = transform.update(jnp.asarray(g), state)
        g = np.where(g.astype(np.float64) ** 2 > 0.1, g, 0)
        expected = -0.3 * g / (0.2 + sums) ** (1 / 1.5)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
        sums += np.abs(g) ** 1.5
        frozen += np.sum(g == 0)
    assert 0 < frozen < 20


def test_classp_density_moves_the_share_it_is_told():
    transform = OPTIMIZERS["classp-density"].make(0.3, 0.2, 0.2, 1.5)
    params, shares = jnp.zeros(500), []
    state, rng = transform.init(params), np.random.default_rng(0)
    update = jax.jit(transform.update)
    for _ in range(200):
        g = jnp.asarray(rng.normal(size=500), jnp.float32)
        updates, state = update(g, state, params)
        shares.append(float(classp_jax.update_density(updates)))
    assert 0.17 < np.mean(shares[50:]) < 0.23


def test_reservoir_holds_a_uniform_sample():
    size, seen, batch = 20, 200, 8

    def fill(key):
        empty = jnp.full(size, -1, jnp.int32)
        reservoir = Reservoir(
            jnp.zeros((size, 1)), empty, 0 * empty, jnp.zeros([], jnp.int32)
        )

        def body(reservoir, item):
            i, key = item
            y = i * batch + jnp.arange(batch, dtype=jnp.int32)
            x = y[:, None].astype(jnp.float32)
            return add(reservoir, x, y, y * 0, key), None

        items = (
            jnp.arange(seen // batch, dtype=jnp.int32),
            jax.random.split(key, seen // batch),
        )
        return jax.lax.scan(body, reservoir, items)[0]

    filled = jax.jit(jax.vmap(fill))(jax.random.split(jax.random.key(0), 2000))
    kept = np.asarray(filled.y)
    np.testing.assert_array_equal(kept, np.asarray(filled.x)[..., 0])
    assert kept.min() >= 0
    counts = np.bincount(kept.ravel(), minlength=seen) / len(kept)
    # Each of 200 examples is kept with probability 1/10; 5 standard errors either way.
    assert np.all(np.abs(counts - size / seen) < 5 * np.sqrt(0.1 * 0.9 / 2000) + 0.005)


def test_mas_measures_the_outputs_of_the_task_that_ended():
    """With an output per class, those that may not win have no part in it."""
    stream = continual.split(
        "digits", tasks=2, scenario="task-incremental", shuffle_classes=False
    )
    linear = (
        lambda key: {"w": jnp.zeros((64, 10)) + 0.01},
        lambda params, x: x.reshape(len(x), -1) @ params["w"],
    )
    results = continual.run(
        stream, linear, ["mas"], seeds=[0], epochs=1, save_weights=True
    )
    (trained,) = results.params.values()
    of_size = [a for a in jax.tree.leaves(trained.state) if np.shape(a) == (64, 10)]
    importance = max(of_size, key=lambda a: np.count_nonzero(np.all(a == 0, axis=0)))
    assert [bool(np.any(importance[:, c])) for c in range(10)] == [True] * 5 + [
        False
    ] * 5
