"""The networks: shapes, purity, dropout, padding, and pooling against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax.continual import models
from classp_jax.continual.models import MODELS, make_model

SHAPES = {"mlp": (8, 8, 1), "cnn": (28, 28, 1), "transformer": (30,)}


def _inputs(name, n=3):
    if name == "transformer":
        tokens = np.arange(n * 30, dtype=np.int32).reshape(n, 30) % 50 + 1
        tokens[:, 12:] = 0
        return jnp.asarray(tokens)
    return jax.random.normal(jax.random.key(7), (n, *SHAPES[name]))


def _model(name):
    return make_model(name, SHAPES[name], 10, vocabulary_size=60)


@pytest.mark.parametrize("name", MODELS)
def test_pure_functions_of_plain_arrays(name):
    model = _model(name)
    params = jax.jit(model.init)(jax.random.key(0))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert all(type(node) is dict for node in (params, *params.values()))
    logits = jax.jit(model.apply)(params, _inputs(name), None)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(
        logits, jax.jit(model.apply)(params, _inputs(name), None)
    )
    other = model.init(jax.random.key(1))
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_dropout_follows_the_key_and_only_in_training(name):
    model = _model(name)
    params = model.init(jax.random.key(0))
    x = _inputs(name)
    one = model.apply(params, x, jax.random.key(1))
    np.testing.assert_array_equal(one, model.apply(params, x, jax.random.key(1)))
    assert not np.array_equal(one, model.apply(params, x, jax.random.key(2)))
    assert not np.array_equal(one, model.apply(params, x, None))


def test_mlp_is_the_textbook_formula():
    model = make_model("mlp", (2, 3, 1), 4, hidden=(5,))
    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(7, 2, 3, 1)).astype(np.float32)
    first, second = (
        {k: np.asarray(v, np.float64) for k, v in params["layers"][i].items()}
        for i in (0, 1)
    )
    hidden = np.maximum(x.reshape(7, 6) @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(x), None), expected, rtol=1e-5, atol=1e-6
    )


def test_max_pool_and_its_gradient_are_torch_s():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(2, 3, 3, 3)).astype(np.float32)
    value, gradient = jax.value_and_grad(
        lambda a: jnp.sum(models._max_pool_2x2(a) * weight)
    )(jnp.asarray(x))
    t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(t, 2)
    expected = (pooled * torch.tensor(weight.transpose(0, 3, 1, 2))).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(
        gradient, t.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-6
    )


def test_cnn_has_the_paper_s_parameters():
    params = _model("cnn").init(jax.random.key(0))
    # conv 1->32, conv 32->64, dense 9216->128, dense 128->10, with biases
    assert sum(p.size for p in jax.tree.leaves(params)) == (
        (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9216 * 128 + 128) + (128 * 10 + 10)
    )


def test_transformer_ignores_padding():
    model = _model("transformer")
    params = model.init(jax.random.key(0))
    x = _inputs("transformer")
    before = model.apply(params, x, None)
    # A position behind the text changes nothing, whatever its embedding holds.
    params["positions"]["embedding"] = (
        params["positions"]["embedding"].at[12:, 0].add(100.0)
    )
    np.testing.assert_allclose(before, model.apply(params, x, None), atol=1e-5)
    params["positions"]["embedding"] = (
        params["positions"]["embedding"].at[3, 0].add(5.0)
    )
    assert not np.allclose(before, model.apply(params, x, None), atol=1e-3)


def test_text_without_tokens_gives_finite_logits():
    model = _model("transformer")
    params = model.init(jax.random.key(0))
    logits = model.apply(params, jnp.zeros((1, 30), jnp.int32), None)
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mpl", (8, 8, 1), "did you mean 'mlp'"),
        ("transformer", (8, 8, 1), "reads text"),
        ("mlp", (30,), "reads images"),
        ("cnn", (5, 5, 1), "at least 6x6"),
    ],
)
def test_bad_models(name, shape, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, shape, 10)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="not a multiple of heads 5"):
        make_model("transformer", (30,), 3, vocabulary_size=9, width=64, heads=5)


def test_pytorch_s_initialisation():
    torch = pytest.importorskip("torch")
    model = make_model("cnn", (28, 28, 1), 10, initialisation="pytorch")
    params = model.init(jax.random.key(0))
    with torch.random.fork_rng():
        theirs = {
            "first": torch.nn.Conv2d(1, 32, 3),
            "second": torch.nn.Conv2d(32, 64, 3),
            "hidden": torch.nn.Linear(9216, 128),
            "output": torch.nn.Linear(128, 10),
        }
    for name, layer in theirs.items():
        for ours, reference in (("kernel", layer.weight), ("bias", layer.bias)):
            values = np.asarray(params[name][ours])
            reference = reference.detach().numpy()
            assert values.size == reference.size
            if values.size < 200:
                continue
            assert values.std() == pytest.approx(reference.std(), rel=0.15)
            assert np.abs(values).max() == pytest.approx(
                np.abs(reference).max(), rel=0.05
            )
    first, other = (model.init(jax.random.key(k)) for k in (0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, params))
    assert not np.array_equal(first["hidden"]["kernel"], other["hidden"]["kernel"])


def test_initialisations_that_cannot_be():
    with pytest.raises(ValueError, match="unknown initialisation 'torch'"):
        make_model("mlp", (8, 8, 1), 10, initialisation="torch")
    with pytest.raises(ValueError, match="for the models 'mlp' and 'cnn'"):
        make_model("transformer", (30,), 3, vocabulary_size=9, initialisation="pytorch")
