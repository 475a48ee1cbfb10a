"""Importance from a loss and batches, and as a file beside a checkpoint."""

import pathlib
import re
from typing import Any

import chex
import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import classp_jax
from classp_jax import finetune

pytestmark = pytest.mark.usefixtures("quick_compilation")

fill: Any = classp_jax.accumulate_importance

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32)
Y = RNG.normal(size=(6, 3)).astype(np.float32)
WEIGHTS = RNG.normal(size=(4, 3)).astype(np.float32)
BIAS = RNG.normal(size=3).astype(np.float32)
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def mean_square(outputs: Any, y: Any) -> Any:
    return ((outputs - y) ** 2).sum(axis=-1).mean()


def reference(per_example: bool) -> dict[str, np.ndarray]:
    """The sums of ``|g|`` of a linear layer, by hand in float64."""
    w, b = WEIGHTS.astype(np.float64), BIAS.astype(np.float64)
    sums = {"w": np.zeros_like(w), "b": np.zeros_like(b)}
    for x, y in BATCHES:
        error = 2 * (x.astype(np.float64) @ w + b - y)
        of_w, of_b = x[:, :, None] * error[:, None], error
        if not per_example:
            of_w, of_b = of_w.mean(0, keepdims=True), of_b.mean(0, keepdims=True)
        sums["w"] += abs(of_w).sum(0)
        sums["b"] += abs(of_b).sum(0)
    return sums


PARAMS = {"w": jnp.asarray(WEIGHTS), "b": jnp.asarray(BIAS)}


def loss(params: Any, batch: Any) -> Any:
    x, y = batch
    return mean_square(x @ params["w"] + params["b"], y)


def filled(tx: Any, per_example: bool = True) -> Any:
    old = finetune.gradients(loss, PARAMS, BATCHES, per_example=per_example)
    return fill(tx, tx.init(PARAMS), PARAMS, old, per_example=per_example)


def protected() -> Any:
    return classp_jax.protect(optax.sgd(1e-2, momentum=0.9), frozen=True)


# From a loss and batches, with every library


@pytest.mark.parametrize("per_example", [False, True])
def test_plain_trees(per_example):
    found = classp_jax.accumulators(filled(protected(), per_example))
    chex.assert_trees_all_close(found, reference(per_example), rtol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_flax_nnx(per_example):
    model: Any = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = PARAMS["w"], PARAMS["b"]
    optimizer = nnx.Optimizer(model, protected(), wrt=nnx.Param)
    old = finetune.gradients(
        lambda model, batch: mean_square(model(batch[0]), batch[1]),
        model,
        BATCHES,
        per_example=per_example,
    )
    params = nnx.state(model, nnx.Param)
    optimizer.opt_state = fill(
        optimizer.tx, optimizer.opt_state, params, old, per_example=per_example
    )
    found = classp_jax.accumulators(optimizer.opt_state)
    want = reference(per_example)
    np.testing.assert_allclose(found["kernel"], want["w"], rtol=1e-5)
    np.testing.assert_allclose(found["bias"], want["b"], rtol=1e-5)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda m: mean_square(m(X), Y))(model)
        optimizer.update(model, gradient)

    step(model, optimizer)  # the state still fits its optimizer
    chex.assert_trees_all_equal(classp_jax.accumulators(optimizer.opt_state), found)


def test_flax_nnx_lora():
    """Only the factors are differentiated, filled and trained."""
    model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, protected(), wrt=nnx.LoRAParam)
    old = finetune.gradients(
        lambda model, batch: mean_square(model(batch[0]), batch[1]),
        model,
        BATCHES,
        wrt=nnx.LoRAParam,
    )
    factors = nnx.state(model, nnx.LoRAParam)
    optimizer.opt_state = fill(optimizer.tx, optimizer.opt_state, factors, old)
    leaves = jax.tree.leaves(classp_jax.accumulators(optimizer.opt_state))
    assert sorted(leaf.shape for leaf in leaves) == [(2, 3), (4, 2)]
    assert sum(float(leaf.sum()) for leaf in leaves) > 0


class InTraining(nnx.Module):
    """What changes in training: dropout's counts and running statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(self.dropout(self.norm(self.first(x))))


@pytest.mark.parametrize("per_example", [False, True])
def test_flax_nnx_in_training_mode(per_example):
    model: Any = InTraining(nnx.Rngs(0))
    model.norm.bias[...] = jnp.ones(16)  # all that is left of a single example
    before = jax.tree.map(str, nnx.to_pure_dict(nnx.state(model)))
    first, again, _ = found = list(
        finetune.gradients(
            lambda model, batch: mean_square(model(batch[0]), batch[1]),
            model,
            [BATCHES[0], BATCHES[0], BATCHES[1]],
            per_example=per_example,
        )
    )
    kernels = np.concatenate([np.atleast_3d(g.second.kernel[...]) for g in found])
    assert np.isfinite(kernels).all()
    # What was dropped in one batch or example is not in the others.
    assert not np.array_equal(first.second.kernel[...], again.second.kernel[...])
    if per_example:
        drops = (kernels == 0).all(-1)
        assert len({tuple(drop) for drop in drops}) == len(drops) == 10
    # The module's statistics and counts stay what they were.
    assert jax.tree.map(str, nnx.to_pure_dict(nnx.state(model))) == before


def test_flax_linen():
    model = nn.Dense(3)
    state = TrainState.create(
        apply_fn=model.apply,
        params={"kernel": PARAMS["w"], "bias": PARAMS["b"]},
        tx=protected(),
    )

    def loss(params: Any, batch: Any) -> Any:
        return mean_square(state.apply_fn({"params": params}, batch[0]), batch[1])

    old = finetune.gradients(loss, state.params, BATCHES)
    opt_state = fill(state.tx, state.opt_state, state.params, old)
    state = state.replace(opt_state=opt_state)
    found = classp_jax.accumulators(state)
    np.testing.assert_allclose(found["kernel"], reference(False)["w"], rtol=1e-5)
    state.apply_gradients(grads=state.params)


def test_equinox(tmp_path):
    model = equinox.nn.Linear(4, 3, key=jax.random.key(0))
    model = equinox.tree_at(
        lambda m: (m.weight, m.bias), model, (PARAMS["w"].T, PARAMS["b"])
    )
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def loss(params: Any, batch: Any) -> Any:
        outputs = jax.vmap(equinox.combine(params, rest))(batch[0])
        return mean_square(outputs, batch[1])

    tx = protected()
    old = finetune.gradients(loss, params, BATCHES, per_example=True)
    state = fill(tx, tx.init(params), params, old, per_example=True)
    found: Any = classp_jax.accumulators(state)
    np.testing.assert_allclose(found.weight.T, reference(True)["w"], rtol=1e-5)
    file = tmp_path / "model.safetensors"
    finetune.save_importance(file, state, params)
    assert load_file(file).keys() == {"weight", "bias"}
    again = finetune.load_importance(file, tx.init(params))
    chex.assert_trees_all_equal(again, state)


@pytest.fixture
def lenient():
    """AdamW and MultiSteps do not keep to strict dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("lenient")
def test_gradient_accumulation_goes_around():
    """What is loaded into ``MultiSteps`` brakes the mean of its gradients."""
    tx: Any = optax.MultiSteps(protected(), 2).gradient_transformation()
    importance = classp_jax.accumulators(filled(protected()))
    state = finetune.put_importance(tx.init(PARAMS), importance)
    chex.assert_trees_all_equal(classp_jax.accumulators(state), importance)
    alone = finetune.put_importance(protected().init(PARAMS), importance)
    gradient = jax.jit(jax.grad(loss))
    first, second = (gradient(PARAMS, (X[k : k + 3], Y[k : k + 3])) for k in (0, 3))
    update = jax.jit(tx.update)
    _, state = update(first, state, PARAMS)
    updates, _ = update(second, state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = protected().update(mean, alone, PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.usefixtures("lenient")
def test_the_optimizer_inside_gradient_accumulation_is_filled():
    """As docs/your-own-loop.md shows: the same as put in from outside."""
    tx: Any = optax.MultiSteps(protected(), 2).gradient_transformation()
    state = tx.init(PARAMS)._replace(inner_opt_state=filled(protected()))
    importance = classp_jax.accumulators(filled(protected()))
    chex.assert_trees_all_equal(
        state, finetune.put_importance(tx.init(PARAMS), importance)
    )


@pytest.mark.usefixtures("lenient")
def test_it_holds_weights_back_in_training():
    """The point of it: after fine-tuning the old loss has hardly grown."""
    shifted = [(X, Y + 1.0)]

    def after(tx: Any, state: Any) -> list[float]:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            gradient = jax.grad(loss)(params, shifted[0])
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params: Any = PARAMS
        for _ in range(40):
            params, state = step(params, state)
        return [float(abs(params[k] - PARAMS[k]).max()) for k in ("w", "b")]

    tx = classp_jax.protect(optax.adamw(1e-2), eps=1e-3, frozen=True)
    importance = {"w": jnp.full((4, 3), 1.0), "b": jnp.zeros(3)}
    held, free = after(tx, finetune.put_importance(tx.init(PARAMS), importance))
    assert held < 1e-3
    assert free > 0.1


# Bad gradients


def test_an_empty_generator_is_refused():
    tx = protected()
    spent = finetune.gradients(loss, PARAMS, BATCHES)
    list(spent)
    for empty in (spent, iter([]), finetune.gradients(loss, PARAMS, [])):
        with pytest.raises(ValueError, match="The iterator of gradients is empty"):
            fill(tx, tx.init(PARAMS), PARAMS, empty)


@pytest.mark.parametrize("per_example", [False, True])
def test_bad_numbers_name_the_batch_and_change_nothing(per_example):
    tx = protected()
    state = fill(tx, tx.init(PARAMS), PARAMS, PARAMS)
    before = jax.tree.map(np.array, state)
    x = X[4:].copy()
    x[1, 2] = np.nan
    batches = [BATCHES[0], (x, Y[4:])]
    old = finetune.gradients(loss, PARAMS, batches, per_example=per_example)
    with pytest.raises(ValueError, match=r"Batch 1 of the old.*in 'b', 'w'"):
        fill(tx, state, PARAMS, old, per_example=per_example)
    chex.assert_trees_all_equal(state, before)
    # And the leaf alone that has them.
    bad = iter([PARAMS | {"b": PARAMS["b"].at[0].set(np.inf)}])
    with pytest.raises(ValueError, match=r"Batch 0 of the old.*in 'b'\."):
        fill(tx, state, PARAMS, bad)


def test_gradients_of_another_tree():
    tx = protected()
    old = finetune.gradients(lambda p, _: p["other"].sum(), {"other": X}, BATCHES)
    with pytest.raises(ValueError, match="do not have the tree that is needed"):
        fill(tx, tx.init(PARAMS), PARAMS, old)


def test_batches_whose_arrays_differ_in_length_or_are_empty():
    old = finetune.gradients(loss, PARAMS, [BATCHES[0], (X[:3], Y[:2])])
    next(old)
    with pytest.raises(ValueError, match=r"In batch 1 .* \[2, 3\] examples"):
        next(old)
    # Their gradients would be 0: nothing measured, and nothing said.
    for per_example in (False, True):
        empty = finetune.gradients(
            loss, PARAMS, [(X[:0], Y[:0])], per_example=per_example
        )
        with pytest.raises(ValueError, match=r"In batch 0 .* \[0\] examples"):
            next(empty)


# Files


@pytest.fixture(params=["model.importance.safetensors", "importance"])
def file(tmp_path: pathlib.Path, request: Any) -> pathlib.Path:
    return tmp_path / request.param


def test_what_is_saved_is_loaded(file):
    tx = protected()
    state = filled(tx)
    for importance in (PARAMS, state):  # the second replaces the first
        positive = jax.tree.map(jnp.abs, importance)
        finetune.save_importance(file, positive, PARAMS)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    chex.assert_trees_all_equal(finetune.load_importance(file, tx.init(PARAMS)), state)
    # Into another transform, with its own dtype, stronger; nothing else changes.
    other: Any = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
    _, started = other.update(PARAMS, other.init(PARAMS), PARAMS)
    loaded = finetune.load_importance(file, started, strength=2.0)
    want = jax.tree.map(
        lambda a: (2 * a).astype(jnp.bfloat16), classp_jax.accumulators(state)
    )
    chex.assert_trees_all_equal(classp_jax.accumulators(loaded), want)
    assert int(loaded.count) == 1


def test_names_in_the_file_are_paths(tmp_path):
    tx = protected()
    params = {"encoder": [PARAMS, {"kernel": jnp.ones([2, 2], jnp.bfloat16)}]}
    file = tmp_path / "a.safetensors"
    finetune.save_importance(file, tx.init(params), params)
    found = load_file(file)
    assert found.keys() == {"encoder/0/w", "encoder/0/b", "encoder/1/kernel"}
    assert found["encoder/1/kernel"].dtype == np.float32


def test_shards_stay_where_they_are(file):
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    placed = NamedSharding(mesh, P("x"))
    params = jax.device_put({"w": jnp.arange(32.0).reshape(8, 4)}, placed)
    tx = protected()
    finetune.save_importance(file, params, params)
    state = finetune.load_importance(file, tx.init(params))
    (found,) = jax.tree.leaves(classp_jax.accumulators(state))
    assert found.sharding == placed
    np.testing.assert_array_equal(found, params["w"])


def test_flax_nnx_state_to_and_from_a_file(file):
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, protected(), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    importance = finetune.importance_from_magnitude(params)
    finetune.save_importance(file, importance, params)
    before = jax.tree.structure(optimizer.opt_state)
    optimizer.opt_state = finetune.load_importance(file, optimizer.opt_state)
    assert jax.tree.structure(optimizer.opt_state) == before
    found = classp_jax.accumulators(optimizer.opt_state)
    chex.assert_trees_all_equal(found, importance)


def test_partitioned_states_are_put_together():
    tx = optax.partition(
        {"a": classp_jax.classp(0.1), "b": classp_jax.classp(0.2)},
        {"w": "a", "b": "b"},
    )
    state = finetune.put_importance(tx.init(PARAMS), jax.tree.map(jnp.abs, PARAMS))
    chex.assert_trees_all_equal(
        classp_jax.accumulators(state), jax.tree.map(jnp.abs, PARAMS)
    )


def test_a_masked_state_saves_and_loads_its_part(file):
    tx = optax.masked(classp_jax.classp(0.1), {"w": True, "b": False})
    state = fill(tx, tx.init(PARAMS), PARAMS, PARAMS)
    finetune.save_importance(file, state, PARAMS)
    chex.assert_trees_all_equal(finetune.load_importance(file, tx.init(PARAMS)), state)


def test_importance_of_another_network_names_every_difference(file):
    tx = protected()
    finetune.save_importance(file, filled(tx), PARAMS)
    other = {"w": jnp.ones((4, 5)), "scale": jnp.ones(3), "norm": {"b": jnp.ones(1)}}
    with pytest.raises(ValueError) as raised:
        finetune.load_importance(file, tx.init(other))
    message = str(raised.value)
    assert "\n" not in message
    assert "is importance of another network" in message
    for part in (
        "'scale' is missing",
        "'norm/b' is missing",
        "'b' is not in the network",
        "'w' has shape (4, 3), not (4, 5)",
    ):
        assert part in message
    with pytest.raises(ValueError, match="'scale' is missing"):
        finetune.save_importance(file, filled(tx), other | {"w": 1.0, "b": 2.0})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_sum_is_neither_written_nor_read(tmp_path, bad):
    file = tmp_path / "a.safetensors"
    broken = {"w": np.ones((4, 3), np.float32), "b": np.array([0, bad, 1], np.float32)}
    with pytest.raises(ValueError, match=r"The importance holds NaN.* in 'b'"):
        finetune.save_importance(file, broken, PARAMS)
    assert not list(tmp_path.iterdir())
    save_file(broken, file)
    with pytest.raises(ValueError, match=r"The importance in .*safetensors holds NaN"):
        finetune.load_importance(file, protected().init(PARAMS))


def test_truncated_and_foreign_files(file):
    tx = protected()
    finetune.save_importance(file, filled(tx), PARAMS)
    if file.is_dir():
        for part in file.rglob("*"):
            if part.is_file():
                part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    else:
        file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read as importance") as raised:
        finetune.load_importance(file, tx.init(PARAMS))
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="There is no importance at"):
        finetune.load_importance(file.with_name("none"), tx.init(PARAMS))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        finetune.save_importance(file.parent / "none" / "a", tx.init(PARAMS), PARAMS)


def test_a_crash_while_writing_leaves_what_stood_there(tmp_path, monkeypatch):
    import safetensors.numpy

    tx, file = protected(), tmp_path / "a.safetensors"
    finetune.save_importance(file, filled(tx), PARAMS)
    before = file.read_bytes()

    def crashes(_: Any, target: pathlib.Path, **__: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", crashes)
    with pytest.raises(OSError, match="disk full"):
        finetune.save_importance(file, filled(tx), PARAMS)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["ckpt", "ckpt/model.safetensors", "ckpt/deep"])
def test_what_is_no_importance_is_never_replaced(name, tmp_path):
    """Neither weights nor a folder that holds anything else, however deep."""
    (tmp_path / "ckpt" / "deep" / "er").mkdir(parents=True)
    save_file({"w": WEIGHTS}, tmp_path / "ckpt" / "model.safetensors")
    (tmp_path / "ckpt" / "deep" / "er" / "notes").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"{name} is no importance") as raised:
        finetune.save_importance(tmp_path / name, filled(protected()), PARAMS)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


def test_importance_with_a_foreign_file_in_it_is_not_replaced(tmp_path):
    tx = protected()
    finetune.save_importance(tmp_path / "a", filled(tx), PARAMS)
    (tmp_path / "a" / "d" / "notes").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="a is no importance"):
        finetune.save_importance(tmp_path / "a", tx.init(PARAMS), PARAMS)
    assert contents(tmp_path) == before
    finetune.load_importance(tmp_path / "a", tx.init(PARAMS))


def test_an_empty_folder_and_a_link_are_replaced(file):
    """What a link leads to stays."""
    tx = protected()
    if not file.suffix:
        file.mkdir()
    finetune.save_importance(file, filled(tx), PARAMS)
    link = file.with_name(f"link{file.suffix}")
    link.symlink_to(file)
    finetune.save_importance(link, tx.init(PARAMS), PARAMS)
    assert not link.is_symlink()
    chex.assert_trees_all_equal(
        finetune.load_importance(file, tx.init(PARAMS)), filled(tx)
    )


def test_a_failure_before_the_new_folder_stands_leaves_the_old(tmp_path, monkeypatch):
    tx, folder = protected(), tmp_path / "a"
    finetune.save_importance(folder, filled(tx), PARAMS)
    before = contents(tmp_path)
    rename, failed = pathlib.Path.rename, []

    def fails_once(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target == folder and not failed:
            failed.append(source)
            raise OSError("disk full")
        return rename(source, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails_once)
    with pytest.raises(OSError, match="disk full"):
        finetune.save_importance(folder, tx.init(PARAMS), PARAMS)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_states_without_accumulators():
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match="holds no CLASSP accumulator"):
        finetune.put_importance(adam.init(PARAMS), PARAMS)


def test_leaves_with_one_name_are_refused():
    tree = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match=re.escape("named alike: ['a/b']")):
        finetune.put_importance(classp_jax.classp(0.1).init(tree), tree)


# Magnitude


def test_importance_from_magnitude():
    found = finetune.importance_from_magnitude(PARAMS)
    sizes = np.concatenate([abs(WEIGHTS).ravel(), abs(BIAS)]).astype(np.float64)
    np.testing.assert_allclose(found["w"], abs(WEIGHTS) / sizes.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["b"], abs(BIAS) / sizes.mean(), rtol=1e-6)
    zeros = jnp.zeros(3, jnp.bfloat16)
    found = finetune.importance_from_magnitude(zeros)
    chex.assert_trees_all_equal(found, jnp.zeros(3, jnp.float32))
    with pytest.raises(TypeError, match="of type int32"):
        finetune.importance_from_magnitude(jnp.arange(3))


def test_importance_goes_in_under_jit():
    tx = protected()

    @jax.jit
    def start(params: Any) -> Any:
        importance = finetune.importance_from_magnitude(params)
        return finetune.put_importance(tx.init(params), importance, strength=3.0)

    chex.assert_trees_all_close(
        classp_jax.accumulators(start(PARAMS)),
        jax.tree.map(lambda a: 3 * a, finetune.importance_from_magnitude(PARAMS)),
        rtol=1e-6,
    )
