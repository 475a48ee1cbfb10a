"""Methods: their names, their settings, their transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax.continual.methods import (
    ADDITIONS,
    OPTIMIZERS,
    make_transform,
    parse_method,
    resolve_settings,
)


@pytest.mark.parametrize(
    "name",
    [
        *OPTIMIZERS,
        *ADDITIONS,
        *(f"{a}+{o}" for a in ADDITIONS for o in OPTIMIZERS),
        "replay+ewc+classp",
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
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        assert np.all(np.sign(u) == -np.sign(g))


def test_who_is_told_the_boundary():
    told = {
        name for name in (*OPTIMIZERS, *ADDITIONS) if parse_method(name).told_boundary
    }
    assert told == {"ewc", "online-ewc", "si"}
    assert parse_method("ewc+classp").needs_fisher
    assert not parse_method("si").needs_fisher


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
