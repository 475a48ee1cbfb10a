"""The user's own network on the command line: what a factory may be, its settings."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from classp_jax.continual import own
from classp_jax.continual.config import ConfigError
from classp_jax.continual.methods.protocol import Setting
from classp_jax.continual.models import as_model


class Module(nnx.Module):
    """As most are written: with rngs as a keyword, and last."""

    def __init__(self, width=32, *, rngs):
        self.hidden = nnx.Linear(6, width, rngs=rngs)
        self.output = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.output(self.hidden(x))


class LinenModule(linen.Module):
    width: int = 16

    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.Dense(self.width)(x))


WIDTH = Setting(8, 2, 64, integer=True)


def linen_of(width: Any = WIDTH):
    return LinenModule(width)


def pair_of(scale=0.5, activation="relu"):
    del activation
    return (lambda key: jnp.full((6, 4), scale)), (lambda params, x: x @ params)


def with_rngs(rngs=None, width=3):
    return Module(width, rngs=rngs)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    module = types.ModuleType("mine")
    vars(module).update(globals())
    monkeypatch.setitem(sys.modules, "mine", module)


def parameters(made):
    model = as_model(made, jax.ShapeDtypeStruct((6,), jnp.float32), 4)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "settings", "width"),
    [
        ("Module", {}, 32),
        ("Module", {"width": 5.0}, 5),
        ("with_rngs", {"width": 5.0}, 5),
        ("LinenModule", {}, 16),
        ("LinenModule", {"width": 5.0}, 5),
        ("linen_of", {}, 8),
        ("linen_of", {"width": 5.0}, 5),
    ],
)
def test_a_factory_and_its_settings(name, settings, width):
    found = parameters(own.model(f"mine:{name}", settings))
    assert found == 6 * width + width + 4 * width + 4


def test_a_factory_of_a_pair():
    init, _ = own.model("mine:pair_of", {"scale": 2.0})
    assert init(jax.random.key(0))[0, 0] == 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Module", {"depth": 2.0}, "no setting 'depth'; did you mean 'width'"),
        ("Module", {"width": 2.5}, "model.width must be a whole number: 2.5"),
        ("linen_of", {"width": 2.5}, "model.width must be a whole number: 2.5"),
        ("pair_of", {"activation": 1.0}, "no setting 'activation'"),
        ("jnp", {"width": 1.0}, "no setting 'width'; it has none"),
    ],
)
def test_a_wrong_setting_is_one_line(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        own.model(f"mine:{name}", settings)
