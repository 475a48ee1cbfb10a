"""What the study fine-tunes: networks, old and new data, pretraining, scores."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


class Data(NamedTuple):
    """Examples of one task, in three parts; each a tree of arrays."""

    train: Any
    validation: Any
    test: Any


class Problem(NamedTuple):
    """Something pretrained on old data that is to learn new data."""

    name: str
    network: str
    """Problems with networks of one name share what is pretrained."""
    init: Callable[[int], Any]
    """Untrained weights of a seed."""
    loss: Callable[[Any, Any], jax.Array]
    """The mean loss of a batch."""
    logits: Callable[[Any, Any], jax.Array]
    """What is predicted for a batch, ``[..., classes]``."""
    score: Callable[[Any, Any], jax.Array]
    """What is reported, higher is better: accuracy, or minus the loss per token."""
    old: Data
    new: Data
    proxy: Any
    """Examples that stand in for old data where there are none."""
    seeds: dict[int, int]
    """Which pretrained network each seed of fine-tuning begins with."""
    pretraining: dict[str, Any]
    batch: int
    checkpoints: tuple[int, ...]
    """After how many steps of fine-tuning it is scored."""
    fisher_kind: str


def picked(arrays: Any, which: Any) -> Any:
    """Some examples of a tree of arrays."""
    return jax.tree.map(lambda a: a[which], arrays)


def cut(arrays: Any, *sizes: int, seed: int = 0) -> list[Any]:
    """Disjoint random parts of some sizes."""
    count = len(jax.tree.leaves(arrays)[0])
    order = np.random.default_rng(seed).permutation(count)
    ends = np.cumsum(sizes)
    return [picked(arrays, part) for part in np.split(order[: ends[-1]], ends[:-1])]


# Images


WIDTH, DEPTH, HEADS, PATCH = 48, 2, 4, 7


def init_vit(seed: int) -> dict[str, Any]:
    """A vision transformer for 28 x 28 pixels and ten classes."""
    rng = np.random.default_rng([seed, 1])

    def linear(m: int, n: int, scale: float = 1.0) -> dict[str, jax.Array]:
        kernel = rng.normal(0, scale / m**0.5, (m, n))
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(n)}

    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    blocks = {
        f"block_{k}": {
            "norm_1": norm,
            "query_key_value": linear(WIDTH, 3 * WIDTH),
            "out": linear(WIDTH, WIDTH, 0.5),
            "norm_2": norm,
            "up": linear(WIDTH, 4 * WIDTH),
            "down": linear(4 * WIDTH, WIDTH, 0.5),
        }
        for k in range(DEPTH)
    }
    positions = jnp.asarray(
        rng.normal(0, 0.5, ((28 // PATCH) ** 2, WIDTH)), jnp.float32
    )
    return {
        "patches": linear(PATCH**2, WIDTH),
        "positions": positions,
        **blocks,
        "norm": norm,
        "head": linear(WIDTH, 10),
    }


def _linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _norm(p: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return (
        x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"]
        + p["bias"]
    )


def vit(params: Any, batch: Any) -> jax.Array:
    """Scores ``[n, 10]`` for uint8 images ``[n, 28, 28]``."""
    images, _ = batch
    side = 28 // PATCH
    x = images.astype(jnp.float32) / 255.0 - 0.3
    x = x.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    x = _linear(params["patches"], x.reshape(len(images), side**2, -1))
    x = x + params["positions"]
    for k in range(DEPTH):
        p = params[f"block_{k}"]
        qkv = _linear(p["query_key_value"], _norm(p["norm_1"], x))
        qkv = qkv.reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + _linear(p["out"], mixed.reshape(x.shape))
        x = x + _linear(p["down"], jax.nn.gelu(_linear(p["up"], _norm(p["norm_2"], x))))
    return _linear(params["head"], _norm(params["norm"], x).mean(1))


def image_loss(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(vit(params, batch), batch[1]).mean()


def accuracy(params: Any, batch: Any) -> jax.Array:
    """The share of images that are recognised, a hundred at a time: that is quicker."""
    parts = jax.tree.map(lambda a: a.reshape(-1, 100, *a.shape[1:]), batch)

    def of_part(part: Any) -> jax.Array:
        return (vit(params, part).argmax(-1) == part[1]).mean()

    return jax.lax.map(of_part, parts).mean()


def _tfds(name: str, data_dir: pathlib.Path, cache: pathlib.Path) -> Any:
    """All of a prepared image data set: ``(train, test)``, kept as one file."""
    file = cache / f"{name}.npz"
    if not file.exists():
        from classp_jax.continual.data.readers.tfds import read_tfds

        source = read_tfds(name, data_dir)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            allow_pickle=False,
            **{
                f"{part}_{key}": np.asarray(getattr(getattr(source, part), key))
                for part in ("train", "test")
                for key in "xy"
            },
        )
    found = np.load(file)
    return [
        (found[f"{p}_x"].reshape(-1, 28, 28), found[f"{p}_y"].astype(np.int32))
        for p in ("train", "test")
    ]


def _digits() -> Any:
    """scikit-learn's 8 x 8 digits, enlarged to 24 x 24 within 28 x 28."""
    found: Any = load_digits()
    images = np.kron(found.images * (255 / 16), np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    return images, found.target.astype(np.int32)


def images(new: str, data_dir: pathlib.Path, cache: pathlib.Path) -> Problem:
    """MNIST, then Fashion-MNIST or scikit-learn's digits."""
    train, test = _tfds("mnist", data_dir, cache)
    old = Data(*cut(train, 59_000, 600), *cut(test, 2_000))
    digits = _digits()
    if new == "fashion":
        train, test = _tfds("fashion_mnist", data_dir, cache)
        data = Data(*cut(train, 59_000, 600), *cut(test, 2_000))
    else:
        data = Data(*cut(digits, 997, 300, 500))
    return Problem(
        name=new,
        network="vit",
        init=init_vit,
        loss=image_loss,
        logits=vit,
        score=accuracy,
        old=old,
        new=data,
        proxy=digits,
        seeds={seed: seed for seed in (1000, *range(5))},
        pretraining={"steps": 2_000, "batch": 64, "learning_rate": 2e-3},
        batch=32,
        checkpoints=(3, 6, 10, 15, 22, 32, 45, 65, 90, 125, 175, 250),
        fisher_kind="exact",
    )


# Pretraining, for all


def pretrained(problem: Problem, seed: int, cache: pathlib.Path) -> Any:
    """The weights after pretraining on the old data, kept as one file."""
    options = problem.pretraining
    number = problem.seeds[seed]
    file = cache / f"pretrained-{problem.network}-{number}.npz"
    params = problem.init(number)
    leaves, tree = jax.tree.flatten(params)
    if file.exists():
        found = np.load(file)
        return tree.unflatten([jnp.asarray(found[str(k)]) for k in range(len(leaves))])
    steps, batch = options["steps"], options["batch"]
    schedule = optax.cosine_onecycle_schedule(steps, options["learning_rate"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(problem.loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, rng = tx.init(params), np.random.default_rng([number, 2])
    count = len(jax.tree.leaves(problem.old.train)[0])
    for k in range(steps):
        chosen = rng.integers(0, count, batch)
        examples = picked(problem.old.train, chosen)
        params, state, value = step(params, state, examples)
        if k % 100 == 0:
            print(f"{problem.name} {number}: pretraining {k}, {value:.3f}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    arrays = {str(k): np.asarray(a) for k, a in enumerate(jax.tree.leaves(params))}
    np.savez(file, allow_pickle=False, **arrays)
    return params
