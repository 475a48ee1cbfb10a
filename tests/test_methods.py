"""Methods: their names, their settings, their transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax
from classp_jax.continual.methods import (
    ADDITIONS,
    OPTIMIZERS,
    make_transform,
    parse_method,
    resolve_settings,
)

SCALED_LATER = ("classp", "classp-published")


@pytest.mark.parametrize(
    "name",
    [
        *OPTIMIZERS,
        *ADDITIONS,
        *(
            f"{a}+{o}"
            for a in ADDITIONS
            for o in OPTIMIZERS
            if a != "scale-later" or o in SCALED_LATER
        ),
        "replay+ewc+classp",
        "second-rate+scale-later+reset+ewc-published+classp",
    ],
)
def test_every_method_takes_a_finite_step(name):
    method = parse_method(name)
    tx = make_transform(method, resolve_settings(method))
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    gradients = jax.tree.map(lambda w: 0.1 * w, params)
    state, updates = tx.init(params), params
    # Optax's Adam itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            updates, state = tx.update(gradients, state, params)
    u, g = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (updates, gradients)
    )
    moved = u != 0
    assert np.all(np.isfinite(u))
    assert np.all(np.sign(u[moved]) == -np.sign(g[moved]))
    # A share of three weights moves, or else all do.
    assert moved.any() if method.optimizer == "classp-density" else moved.all()


def test_who_is_told_the_boundary():
    def those(what):
        names = (*OPTIMIZERS, *ADDITIONS)
        return {name for name in names if getattr(parse_method(name), what)}

    assert those("consolidates") == {"ewc", "online-ewc", "si"}
    assert those("as_published") == {"ewc-published"}
    assert those("changes_later") == {"second-rate", "scale-later"}
    assert those("resets") == {"reset"}
    assert those("told_boundary") == {
        "ewc",
        "online-ewc",
        "si",
        "ewc-published",
        "second-rate",
        "scale-later",
        "reset",
    }
    assert parse_method("reset+adagrad").told_boundary
    assert parse_method("ewc+classp").needs_fisher
    assert not parse_method("si").needs_fisher
    assert not parse_method("ewc-published").needs_fisher


def test_an_addition_alone_stands_on_sgd_and_scale_later_on_classp():
    for addition in ADDITIONS:
        expected = "classp" if addition == "scale-later" else "sgd"
        assert parse_method(addition).optimizer == expected
    assert parse_method("scale-later+ewc").optimizer == "classp"
    assert parse_method("second-rate+scale-later").optimizer == "classp"
    assert set(parse_method("second-rate").settings) == {"learning_rate", "second_rate"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clasp", "did you mean 'classp'"),
        ("ewc+sdg", "did you mean 'sgd'"),
        ("sgd+adam", "more than one optimizer"),
        ("ewc+si", "more than one regularizer"),
        ("replay+joint", "do not go together"),
        ("ewc+ewc", "more than one regularizer"),
        ("replay+replay", "do not go together"),
        ("reset+reset", "do not go together"),
        ("ewc-published+ewc", "more than one regularizer"),
        ("second-rte", "did you mean 'second-rate'"),
        ("scale-later+sgd", "scale-later goes with classp,"),
        ("adagrad+scale-later", "scale-later goes with classp,"),
        ("scale-later+classp-density", "scale-later goes with classp,"),
        ("scale-later+classp-exclusive", "scale-later goes with classp,"),
        ("", "unknown method"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


def test_settings_come_in_layers_and_by_part():
    method = parse_method("ewc+classp")
    settings = resolve_settings(
        method,
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
    assert resolve_settings(parse_method("ewc"), layer)["learning_rate"] == 0.9
    both = resolve_settings(parse_method("ewc+classp"), layer)
    assert both["learning_rate"] != 0.9
    assert both["strength"] == 3.0


def test_unknown_setting():
    with pytest.raises(ValueError, match="no setting 'epsilon'; did you mean 'eps'"):
        resolve_settings(parse_method("classp"), {"classp": {"epsilon": 1.0}})


PARAMS = {"w": jnp.array([[1.0, -2.0], [0.3, 0.0]]), "b": jnp.array([0.5])}
GRADIENTS = [
    {
        "w": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=1), jnp.float32),
    }
    for rng in map(np.random.default_rng, range(4))
]


def _updates(transforms):
    """What each step's transform gives, all on one state, which the first begins."""
    state, found = transforms[0].init(PARAMS), []
    # Optax's Adam itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        for tx, g in zip(transforms, GRADIENTS, strict=True):
            updates, state = tx.update(g, state, PARAMS)
            found.append(updates)
    return found


def _assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def _classp(optimizer=classp_jax.classp, first=True, second=True, rates=(0.3, 0.3)):
    return [
        optimizer(rate, threshold=0.01, power=1.5, eps=0.2, scaling=scaling)
        for rate, scaling in zip(rates, (first, second), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("second-rate", [optax.sgd(0.3), optax.sgd(0.07)]),
        ("second-rate+adam", [optax.adam(0.3), optax.adam(0.07)]),
        ("second-rate+classp", _classp(rates=(0.3, 0.07))),
        ("scale-later", _classp(first=False)),
        (
            "scale-later+classp-published",
            _classp(classp_jax.classp_published, first=False),
        ),
        ("scale-later+second-rate", _classp(first=False, rates=(0.3, 0.07))),
        # These take no notice.
        ("classp", _classp()),
        ("reset+classp", _classp()),
    ],
)
def test_what_changes_later_is_the_plain_transform_with_other_numbers(name, plain):
    method = parse_method(name)
    ours = {"learning_rate": 0.3, "second_rate": 0.07}
    ours |= {"threshold": 0.01, "power": 1.5, "eps": 0.2}
    settings = {key: ours[key] for key in method.settings}
    before, after = (make_transform(method, settings, later=b) for b in (False, True))
    tree = jax.eval_shape(before.init, PARAMS)
    assert jax.eval_shape(after.init, PARAMS) == tree
    state = before.init(PARAMS)
    _assert_close(state, after.init(PARAMS))

    for order in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1)):
        found = _updates([(before, after)[i] for i in order])
        for a, b in zip(found, _updates([plain[i] for i in order]), strict=True):
            _assert_close(a, b)

    @jax.jit
    def traced(later, state):
        tx = make_transform(method, settings, later=later)
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(GRADIENTS[0], state, PARAMS)

    for later, tx in ((False, before), (True, after)):
        with jax.numpy_dtype_promotion("standard"):
            updates, new_state = tx.update(GRADIENTS[0], state, PARAMS)
        found, found_state = traced(jnp.asarray(later), state)
        _assert_close(found, updates)
        assert jax.tree.structure(found_state) == jax.tree.structure(new_state)


def test_classp_exclusive_leaves_the_current_gradient_out():
    method = parse_method("classp-exclusive")
    numbers = {"learning_rate": 0.3, "threshold": 0.1, "power": 1.5, "eps": 0.2}
    tx = make_transform(method, numbers)
    sums = {name: np.zeros(w.shape) for name, w in PARAMS.items()}
    frozen = 0
    for updates, gradients in zip(_updates([tx] * 4), GRADIENTS, strict=True):
        for name, g in gradients.items():
            g = np.asarray(g, np.float64)
            g = np.where(g**2 > 0.1, g, 0)
            expected = -0.3 * g / (0.2 + sums[name]) ** (1 / 1.5)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-5)
            sums[name] += np.abs(g) ** 1.5
            frozen += np.sum(g == 0)
    assert 0 < frozen < 20


def test_classp_density_moves_the_share_it_is_told():
    method = parse_method("classp-density")
    numbers = {"learning_rate": 0.3, "power": 1.5, "eps": 0.2}
    # All weights: no threshold at all.
    full = make_transform(method, numbers | {"density": 1.0})
    plain = classp_jax.classp(0.3, threshold=0.0, power=1.5, eps=0.2)
    for a, b in zip(_updates([full] * 4), _updates([plain] * 4), strict=True):
        _assert_close(a, b)

    tx = make_transform(method, numbers | {"density": 0.2})
    params = jnp.zeros(500)
    state, rng, shares = tx.init(params), np.random.default_rng(0), []
    update = jax.jit(tx.update)
    for _ in range(200):
        g = jnp.asarray(rng.normal(size=500), jnp.float32)
        updates, state = update(g, state, params)
        shares.append(float(jnp.mean((updates != 0).astype(jnp.float32))))
    assert 0.17 < np.mean(shares[50:]) < 0.23
