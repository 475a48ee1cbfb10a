"""Networks: by name, the user's own, and convolutions as products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from classp_jax.continual.convolution import convolution
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.models import MODELS, as_model, make_model
from classp_jax.continual.networks import max_pool_2x2

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"mlp": (8, 8, 1), "cnn": (12, 11, 1), "transformer": (30,)}
IMAGE = jax.ShapeDtypeStruct((6, 5, 1), jnp.uint8)


def _inputs(name, n=3):
    if name == "transformer":
        tokens = np.arange(n * 30, dtype=np.int32).reshape(n, 30) % 50 + 1
        tokens[:, 12:] = 0
        return jnp.asarray(tokens)
    return jax.random.normal(jax.random.key(7), (n, *SHAPES[name]))


@functools.cache
def _model(name):
    return make_model(name, SHAPES[name], 10, vocabulary_size=60)


@pytest.mark.parametrize("name", MODELS)
def test_pure_functions_of_plain_arrays(name):
    model, x = _model(name), _inputs(name)
    params = jax.jit(model.init)(jax.random.key(0))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert all(type(node) is dict for node in (params, *params.values()))
    apply = jax.jit(model.apply)
    logits = apply(params, x, None)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32
    other = jax.jit(model.init)(jax.random.key(1))
    assert not jnp.array_equal(apply(other, x, None), logits)
    first, again, second = (apply(params, x, jax.random.key(k)) for k in (1, 1, 2))
    assert jnp.array_equal(first, again)
    # Only the MLP has no dropout.
    assert jnp.array_equal(first, second) == (name == "mlp")
    assert jnp.array_equal(first, logits) == (name == "mlp")


def test_mlp_is_the_textbook_formula():
    model = make_model("mlp", (6,), 4, hidden=(5,))
    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    first, second = (
        {k: np.asarray(v, np.float64) for k, v in params["layers"][i].items()}
        for i in (0, 1)
    )
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(x), None), expected, rtol=1e-5, atol=1e-6
    )


def test_max_pool_and_its_gradient_are_torch_s():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(2, 3, 3, 3)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda a: jnp.sum(max_pool_2x2(a) * weight))(
        jnp.asarray(x)
    )
    t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(t, 2)
    expected = (pooled * torch.tensor(weight.transpose(0, 3, 1, 2))).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(
        gradient, t.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-6
    )


def _convolved(x, w, cotangent):
    """A convolution and its gradients in float64, one shift at a time."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    for i, j in np.ndindex(w.shape[:2]):
        here = np.s_[:, i : i + g.shape[1], j : j + g.shape[2]]
        y += x[here] @ w[i, j]
        dx[here] += g @ w[i, j].T
        dw[i, j] = np.einsum("nijc,nijf->cf", x[here], g)
    return y, dx, dw


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 14, 11, 8), (3, 3, 8, 5)),  # tiles, some of them cut off
        ((2, 6, 3, 16), (3, 3, 16, 4)),  # less than one tile
        ((2, 9, 8, 8), (5, 2, 8, 5)),  # patches
    ],
)
def test_convolutions_as_products(shape, kernel):
    """Forwards and backwards, with a batch of kernels as seeds side by side have."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *shape))
    w = jax.random.normal(keys[1], (2, *kernel)) / np.prod(kernel[:3]) ** 0.5
    output = (2, 2, shape[1] - kernel[0] + 1, shape[2] - kernel[1] + 1, kernel[3])
    cotangent = jax.random.normal(keys[2], output)

    @jax.jit
    @jax.vmap
    def ours(x, w, cotangent):
        f = functools.partial(convolution, window_strides=(1, 1), padding="VALID")
        y, pullback = jax.vjp(f, x, w)
        return y, *pullback(cotangent)

    assert "convolution" not in ours.lower(x, w, cotangent).as_text()
    found = ours(x, w, cotangent)
    for i in range(2):
        expected = _convolved(x[i], w[i], cotangent[i])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("channels", "options", "product"),
    [
        (1, {"padding": "VALID"}, True),
        (8, {"padding": "VALID"}, True),
        (8, {"padding": "VALID", "strides": 2}, False),
        (8, {"padding": "SAME"}, False),
    ],
)
def test_layers_give_what_nnx_gives(channels, options, product):
    layer = functools.partial(nnx.Conv, channels, 4, (3, 3), **options)
    plain = layer(rngs=nnx.Rngs(0))
    ours = layer(rngs=nnx.Rngs(0), conv_general_dilated=convolution)
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, channels))
    traced = jax.jit(lambda x: (ours(x), plain(x))).lower(x)
    np.testing.assert_allclose(*traced.compile()(x), atol=2e-5)
    # One of the two is the plain layer's.
    assert traced.as_text().count("stablehlo.convolution") == 2 - product


def test_cnn_has_the_paper_s_parameters():
    model = make_model("cnn", (28, 28, 1), 10)
    params = jax.eval_shape(model.init, jax.random.key(0))
    # conv 1->32, conv 32->64, dense 9216->128, dense 128->10, with biases
    assert sum(p.size for p in jax.tree.leaves(params)) == (
        (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9216 * 128 + 128) + (128 * 10 + 10)
    )


def test_transformer_ignores_padding():
    model = _model("transformer")
    apply = jax.jit(model.apply)
    params = jax.jit(model.init)(jax.random.key(0))
    x = _inputs("transformer")
    before = apply(params, x, None)
    # A position behind the text changes nothing, whatever its embedding holds.
    positions = params["positions"]["embedding"]
    params["positions"]["embedding"] = positions.at[12:, 0].add(100.0)
    np.testing.assert_allclose(before, apply(params, x, None), atol=1e-5)
    params["positions"]["embedding"] = positions.at[3, 0].add(5.0)
    assert not np.allclose(before, apply(params, x, None), atol=1e-3)
    empty = apply(params, jnp.zeros((1, 30), jnp.int32), None)
    assert np.all(np.isfinite(empty))


def test_pytorch_s_initialisation():
    torch = pytest.importorskip("torch")
    model = make_model("cnn", (28, 28, 1), 10, initialisation="pytorch")
    params = model.init(jax.random.key(0))
    with torch.random.fork_rng():
        theirs = {
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
    other = model.init(jax.random.key(1))
    assert not np.array_equal(params["hidden"]["kernel"], other["hidden"]["kernel"])


class OwnRngs(nnx.Module):
    """Dropout with its own random streams; a table that is no parameter."""

    def __init__(self, *, rngs, classes=4, norm=None):
        self.table = jnp.arange(30.0)
        self.layer = nnx.Linear(30, classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = norm and norm(30, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(x.reshape(x.shape[0], -1) + self.table)
        return self.layer(self.norm(x) if self.norm else x)


class PassedRngs(nnx.Module):
    """Dropout that is told at each call."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(30, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, deterministic, rngs):
        x = x.reshape(x.shape[0], -1)
        return self.layer(self.dropout(x, deterministic=deterministic, rngs=rngs))


class Linen(linen.Module):
    """A Linen module that is told with ``train``."""

    batch_norm: bool = False

    @linen.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        if self.batch_norm:
            x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(4)(linen.Dropout(0.5, deterministic=not train)(x))


def _init(key):
    return jax.random.normal(key, (30, 4))


def _pair_with_key(params, x, key):
    x = x.reshape(x.shape[0], -1)
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
    return x @ params


@pytest.mark.parametrize(
    "model",
    [
        lambda rngs: OwnRngs(rngs=rngs),
        lambda r: OwnRngs(rngs=r, norm=nnx.LayerNorm),
        PassedRngs,
        Linen(),
        (_init, _pair_with_key),
    ],
)
def test_own_networks_train_with_dropout_and_are_evaluated_without(model):
    model = as_model(model, IMAGE, 4, name="mine")
    assert model.name == "mine"
    params = jax.jit(model.init)(jax.random.key(0))
    assert not jax.tree.all(
        jax.tree.map(jnp.array_equal, params, model.init(jax.random.key(1)))
    )
    apply = jax.jit(model.apply)
    x = jax.random.normal(jax.random.key(2), (2, 6, 5, 1))
    evaluated, first, again, second = (
        apply(params, x, None if key is None else jax.random.key(key))
        for key in (None, 1, 1, 2)
    )
    assert jnp.array_equal(first, again)
    assert not jnp.array_equal(first, second)
    assert not jnp.array_equal(evaluated, first)
    gradient = jax.grad(lambda p: jnp.sum(apply(p, x, jax.random.key(1)) ** 2))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_evaluation_is_the_layer_alone():
    model = as_model(lambda rngs: OwnRngs(rngs=rngs), IMAGE, 4)
    params = model.init(jax.random.key(0))
    assert set(params) == {"layer"}  # The table is not trained.
    x = jax.random.normal(jax.random.key(2), (2, 6, 5, 1))
    kernel, bias = params["layer"]["kernel"], params["layer"]["bias"]
    expected = (x.reshape(2, 30) + np.arange(30, dtype=np.float32)) @ kernel + bias
    np.testing.assert_allclose(model.apply(params, x, None), expected, rtol=1e-5)


def test_pair_without_a_key():
    model = as_model((_init, lambda p, x: x.reshape(-1, 30) @ p), IMAGE, 4)
    params = model.init(jax.random.key(0))
    assert model.apply(params, jnp.ones((2, 6, 5, 1)), jax.random.key(0)).shape == (
        2,
        4,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda rngs: OwnRngs(rngs=rngs, classes=7), "7 logits .* 4 classes"),
        (lambda rngs: OwnRngs(rngs=rngs, norm=nnx.BatchNorm), r"\(BatchStat\)"),
        (Linen(batch_norm=True), r"'Linen' changes state .*\(batch_stats\)"),
        (lambda rngs: nnx.Linear(30, 4, rngs=rngs), r"fails on .*\[batch, 6, 5, 1\]"),
        (lambda rngs: nnx.Linear(1, 4, rngs=rngs), r"\[batch, 6, 5, 4\].*\[batch, 4\]"),
        (lambda rngs: 3, "must return an nnx.Module, it returned int"),
        (PassedRngs(nnx.Rngs(0)), "pass a function that makes one"),
        ((_init, lambda p, x: jnp.zeros((4, 4))), r"\[4, 4\] for a batch of 3"),
        ((_init, lambda p, x: (x, p)), "returns a tuple, not an array"),
        ((lambda key: jnp.ones((30, 4), jnp.int32), _pair_with_key), "int32 .*floats"),
        ((lambda key: {}, lambda p, x: x), "0 parameters"),
        (3, "a model is a name, .* got int"),
        ("mpl", "did you mean 'mlp'"),
        ("transformer", "reads text, the data is images"),
        ("cnn", "at least 6x6"),
    ],
)
def test_networks_that_do_not_fit(model, message):
    with pytest.raises(ContinualError, match=message) as caught:
        as_model(model, IMAGE, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hidden": (10**9,)}, "hidden must be between 1 and .* got 1000000000"),
        ("mlp", {"hidden": (0,)}, "hidden must be between 1"),
        ("mlp", {"hidden": (10**6, 10**6)}, "at most 1,000,000,000 can be trained"),
        ("mlp", {"initialisation": "torch"}, "unknown initialisation 'torch'"),
        ("transformer", {"initialisation": "pytorch"}, "for the models 'mlp' and"),
        ("transformer", {}, "vocabulary_size must be between 1"),
        ("transformer", {"vocabulary_size": 9, "heads": 5}, "multiple of heads 5"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ContinualError, match=message):
        make_model(name, SHAPES[name], 10, **options)


def test_tokens_are_not_images():
    tokens = jax.ShapeDtypeStruct((30,), jnp.int32)
    with pytest.raises(ContinualError, match="reads images, the data is text"):
        as_model("mlp", tokens, 3)


def test_an_mlp_may_be_sparse_and_have_dropout():
    model = make_model("mlp", (4,), 3, hidden=(50,), activation="hard-ash", dropout=0.5)
    params = model.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    first, last = params["layers"][0], params["layers"][1]
    z = np.asarray(x, np.float64) @ first["kernel"] + first["bias"]
    gate = z - z.mean(1, keepdims=True) - 2.3 * z.std(1, keepdims=True)
    h = np.clip(z, 0, 2) * np.clip(3 * gate / 6 + 0.5, 0, 1)
    assert 0.02 < np.mean(h > 0) < 0.5
    expected = h @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(model.apply(params, x, None), expected, atol=1e-5)
    trained = model.apply(params, x, jax.random.key(1))
    assert not np.allclose(trained, expected, atol=1e-3)
