"""Pretrained networks: the same numbers as in PyTorch, from the same files."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

import classp_jax
from classp_jax.finetune import layouts, weights
from classp_jax.finetune.bert import Bert, BertConfig
from classp_jax.finetune.llama import Llama, LlamaConfig, RopeScaling
from classp_jax.torch_state.layouts import by_path, tensors_of
from tests import finetune_reference as reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES: Any = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_size": 24,
}
# Wavelengths of 6, 29 and 135 tokens: one stays, one lies between, one grows.
ROPE = {
    "head_dim": 6,
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling(8.0, 1.0, 4.0, original_length=100),
}
GEMMA: Any = SIZES | {"num_kv_heads": 1, "head_dim": 6, "num_layers": 1}
BERT: Any = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_size": 24,
    "max_length": 9,
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 13, size=(3, 7))
TYPES = RNG.integers(0, 2, size=TOKENS.shape)
MASK = np.arange(7) < np.array([[7], [4], [5]])
CONTRAST = RNG.normal(size=(3, 7, 16))
# Of float32 against float64, for numbers of about 1.
CLOSE: Any = {"rtol": 2e-4, "atol": 2e-5}


def generated(shapes) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)

    def tensor(name, shape):
        if name.endswith("position_ids"):
            return torch.arange(shape[1])[None]
        scale = 0.3 if len(shape) == 2 else 0.5
        return torch.from_numpy(rng.normal(scale=scale, size=shape)).float()

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def llama_file(folder, sizes: Any = SIZES, gemma=False, tied=False, changes=None):
    tensors = generated(reference.llama_shapes(sizes, gemma, tied)) | (changes or {})
    file = folder / "model.safetensors"
    save_file({n: t for n, t in tensors.items() if t is not None}, file)
    return file


def llama(**changes: Any) -> Llama:
    """Without weights: nothing is compiled to draw what is read anyway."""
    config = LlamaConfig(**(SIZES | {"tied": False} | changes))
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(7)))


def load(model: nnx.Module, path: Any, table: Any) -> None:
    nnx.update(model, weights.read(path, nnx.state(model, nnx.Param), table))


def doubles(file) -> dict[str, torch.Tensor]:
    tensors = {n: t for n, t in load_file(file).items() if t.is_floating_point()}
    return {n: t.double().requires_grad_() for n, t in tensors.items()}


def assert_same_gradients(gradients: Any, table: Any, theirs: Any) -> None:
    ours = tensors_of(by_path(gradients), table)
    assert ours.keys() == {name for name, t in theirs.items() if t.grad is not None}
    for name, gradient in ours.items():
        np.testing.assert_allclose(
            gradient, theirs[name].grad.numpy(), **CLOSE, err_msg=name
        )


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
def test_a_decoder_does_what_it_does_in_torch(gemma: bool, tmp_path):
    sizes = GEMMA if gemma else SIZES | ROPE
    file = llama_file(tmp_path, sizes, gemma, tied=gemma)
    config = LlamaConfig.gemma(**sizes) if gemma else LlamaConfig(tied=False, **sizes)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(7)))
    load(model, file, layouts.LLAMA)

    theirs = doubles(file)
    tokens = torch.from_numpy(TOKENS)
    expected = reference.llama(theirs, tokens, sizes, gemma)
    contrast = RNG.normal(size=expected.shape)
    (expected * torch.from_numpy(contrast)).sum().backward()

    @nnx.jit
    def ours(model, tokens, contrast):
        def loss(model):
            logits = model(tokens)
            return jnp.sum(logits * contrast), logits

        return nnx.grad(loss, has_aux=True)(model)

    gradients, logits = ours(
        model, jnp.asarray(TOKENS, jnp.int32), jnp.asarray(contrast, jnp.float32)
    )
    np.testing.assert_allclose(logits, expected.detach().numpy(), **CLOSE)
    assert_same_gradients(gradients, layouts.LLAMA, theirs)


def test_an_encoder_does_what_it_does_in_torch(tmp_path):
    file, older = tmp_path / "model.safetensors", tmp_path / "older.safetensors"
    tensors = generated(reference.bert_shapes(BERT))
    save_file(tensors, file)
    theirs = doubles(file)
    model = nnx.eval_shape(lambda: Bert(BertConfig(**BERT), rngs=nnx.Rngs(7)))
    load(model, file, layouts.BERT)

    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        tensors = {name.replace(new, old): t for name, t in tensors.items()}
    save_file(tensors, older)
    params = nnx.state(model, nnx.Param)
    again = weights.read(older, params, layouts.BERT_GAMMA_BETA)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    tokens, types, mask = map(torch.from_numpy, (TOKENS, TYPES, MASK))
    hidden, pooled = reference.bert(theirs, tokens, types, mask, heads=4)
    known = torch.from_numpy(CONTRAST * MASK[..., None])
    ((hidden * known).sum() + (pooled * known[:, 0]).sum()).backward()

    @nnx.jit
    def ours(model, tokens, types, mask, known):
        def loss(model):
            hidden = model(tokens, types, mask)
            pooled = model.pooled(hidden)
            total = jnp.sum(hidden * known) + jnp.sum(pooled * known[:, 0])
            return total, (hidden, pooled)

        return nnx.grad(loss, has_aux=True)(model)

    gradients, (our_hidden, our_pooled) = ours(
        model,
        jnp.asarray(TOKENS, jnp.int32),
        jnp.asarray(TYPES, jnp.int32),
        jnp.asarray(MASK),
        jnp.asarray(known.numpy(), jnp.float32),
    )
    expected = hidden.detach().numpy()
    np.testing.assert_allclose(our_hidden[MASK], expected[MASK], **CLOSE)
    np.testing.assert_allclose(our_pooled, pooled.detach().numpy(), **CLOSE)
    assert_same_gradients(gradients, layouts.BERT, theirs)


def test_what_is_written_has_the_bits_that_were_read(tmp_path):
    file = llama_file(tmp_path)
    params = nnx.state(llama(), nnx.Param)
    read = weights.read(file, params, layouts.LLAMA)
    weights.write(tmp_path / "one.safetensors", read, layouts.LLAMA)
    weights.write(tmp_path / "many", read, layouts.LLAMA, max_bytes=3_000)
    weights.write(tmp_path / "few", read, layouts.LLAMA)
    original = load_file(file)
    constant = {name for name in original if name.endswith("inv_freq")}
    index = json.loads(
        (tmp_path / "many" / "model.safetensors.index.json").read_text(encoding="utf-8")
    )
    assert set(index["weight_map"]) == original.keys() - constant
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    assert {part.name for part in parts} == set(index["weight_map"].values())
    assert all(part.stat().st_size < 3_000 + 2_000 for part in parts)
    sharded = {n: t for part in parts for n, t in load_file(part).items()}
    for written in (load_file(tmp_path / "one.safetensors"), sharded):
        assert written.keys() == original.keys() - constant
        assert all(torch.equal(tensor, original[n]) for n, tensor in written.items())
    for source in (
        "one.safetensors",
        "many",
        "many/model.safetensors.index.json",
        "few",
    ):
        again = weights.read(tmp_path / source, params, layouts.LLAMA)
        jax.tree.map(np.testing.assert_array_equal, again, read)


def test_no_stale_weights_stay_beside_the_new_ones(tmp_path):
    def written(value: float, max_bytes: int) -> set[str]:
        tensors = {"a": jnp.full(8, value), "b": jnp.full(8, value)}
        weights.write(tmp_path, tensors, table, max_bytes=max_bytes)
        again = weights.read(tmp_path, tensors, table)
        jax.tree.map(np.testing.assert_array_equal, again, tensors)
        return {file.name for file in tmp_path.iterdir()} - others

    table = {"a": layouts.same("a"), "b": layouts.same("b")}
    others = {"config.json", "model.importance.safetensors", "model-1-of-2.safetensors"}
    for name in others:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    index = "model.safetensors.index.json"
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert written(1.0, 1_000) == {"model.safetensors"}
    assert written(2.0, 32) == shards | {index}
    (tmp_path / "model-00003-of-00003.safetensors").write_text("stale")
    assert written(3.0, 32) == shards | {index}
    assert written(4.0, 1_000) == {"model.safetensors"}
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_what_breaks_while_writing_leaves_what_stood_there(tmp_path, monkeypatch):
    params = {"a": jnp.ones(8), "b": jnp.ones(8)}
    table = {"a": layouts.same("a"), "b": layouts.same("b")}
    save = weights.save_file

    def fails_at_the_second(tensors: Any, file: Any, **settings: Any) -> None:
        if "b" in tensors:
            raise OSError("disk full")
        save(tensors, file, **settings)

    for max_bytes in (1_000, 32):
        weights.write(tmp_path, params, table, max_bytes=max_bytes)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        other = jax.tree.map(jnp.zeros_like, params)
        with monkeypatch.context() as patched:
            patched.setattr(weights, "save_file", fails_at_the_second)
            with pytest.raises(OSError, match="disk full"):
                weights.write(tmp_path, other, table, max_bytes=32)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_is_missing_is_made(tmp_path):
    params, table = {"a": jnp.ones(8)}, {"a": layouts.same("a")}
    for name in ("new/deep", "another/one.safetensors"):
        weights.write(tmp_path / name, params, table)
        found = weights.read(tmp_path / name, params, table)
        np.testing.assert_array_equal(found["a"], params["a"])


def test_numbers_take_the_dtype_and_the_tree_of_the_parameters(tmp_path):
    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 7
    save_file({"w": half}, tmp_path / "half.safetensors")
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"deep": [{"kernel": jnp.zeros([3, 2], dtype)}]}
        table = {"w": layouts.dense("deep/0/kernel")}
        read = weights.read(tmp_path / "half.safetensors", params, table)
        kernel = read["deep"][0]["kernel"]
        assert kernel.dtype == dtype
        np.testing.assert_array_equal(kernel.astype(jnp.float32), half.float().T)
    weights.write(tmp_path / "again.safetensors", read, table)
    assert torch.equal(load_file(tmp_path / "again.safetensors")["w"], half)


def add_lora(model: Llama, rngs: nnx.Rngs) -> None:
    for layer in model.layers:
        for name in ("query", "value"):
            base = getattr(layer.attention, name)
            lora = nnx.LoRA(
                base.in_features, 2, base.out_features, base_module=base, rngs=rngs
            )
            setattr(layer.attention, name, lora)


@pytest.mark.parametrize(
    ("name", "kind"), [("classp", nnx.Param), ("protect", nnx.LoRAParam)]
)
def test_optimizers_fine_tune_what_was_read(name: str, kind: Any, tmp_path):
    file = llama_file(tmp_path, SIZES | {"num_layers": 1})
    plain, model = llama(num_layers=1), llama(num_layers=1)
    load(plain, file, layouts.LLAMA)
    if kind is nnx.LoRAParam:
        add_lora(model, nnx.Rngs(1))
    load(model, file, layouts.LLAMA)
    before = by_path(nnx.state(plain, nnx.Param))

    def file_has(place: str, leaf: Any) -> Any:
        # LoRA begins with a product of 0.
        return before.get(place.replace("/base_module", ""), np.zeros(leaf.shape))

    def moved() -> set[str]:
        """Which parameters are not those of the file."""
        return {
            place
            for place, leaf in by_path(nnx.state(model, nnx.Param)).items()
            if not np.array_equal(leaf, file_has(place, leaf))
        }

    assert all(place.endswith("/lora_a") for place in moved())
    tokens = jnp.asarray(TOKENS, jnp.int32)

    inner = {
        "classp": lambda: classp_jax.classp(0.05),
        "protect": lambda: classp_jax.protect(optax.adamw(1e-2)),
    }
    optimizer: Any = nnx.Optimizer(model, inner[name](), wrt=kind)

    def loss(model: Llama) -> jax.Array:
        logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    wrt = nnx.DiffState(0, kind)
    losses_and_gradients = nnx.jit(nnx.value_and_grad(loss, argnums=wrt))

    @nnx.jit
    def fill(model, optimizer, gradients):
        params = nnx.state(model, kind)
        optimizer.opt_state = classp_jax.accumulate_importance(
            optimizer.tx, optimizer.opt_state, params, gradients
        )

    @nnx.jit
    def step(model, optimizer, gradients):
        optimizer.update(model, gradients)

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw mixes dtypes.
        fill(model, optimizer, losses_and_gradients(model)[1])
        filled = classp_jax.mean_accumulator(optimizer)
        for _ in range(4):
            value, gradients = losses_and_gradients(model)
            losses.append(float(value))
            step(model, optimizer, gradients)
    assert filled > 0
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1e-3
    if kind is nnx.Param:
        assert moved() == before.keys()
        return
    assert len(moved()) == 4
    assert all("/lora_" in place for place in moved())
    with pytest.raises(ValueError, match=r"LoRA: layers/0/attention/query/lora_a, "):
        weights.write(tmp_path / "out", nnx.state(model, nnx.Param), layouts.LLAMA)
    assert not (tmp_path / "out").exists()


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    file = llama_file(
        tmp_path,
        changes={
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.mlp.gate_proj.weight": torch.zeros(16, 24),
            "model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16),
            "score.weight": torch.zeros(2),
        },
    )
    with pytest.raises(ValueError, match="does not fit the parameters") as error:
        load(llama(), file, layouts.LLAMA)
    message = str(error.value)
    assert "\n" not in message
    missing, extra, misshapen = message.split(". ")[1:]
    assert set(re.findall(r"[\w.]+weight", missing)) == {
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert set(re.findall(r"[\w.]+weight", extra)) == {
        "model.layers.2.mlp.up_proj.weight",
        "score.weight",
    }
    assert "gate_proj.weight (16, 24), needed (24, 16)" in misshapen
    # A head of its own in the file, where the model has none, is not passed over.
    with pytest.raises(ValueError, match=r"without a parameter: lm_head\.weight"):
        load(llama(tied=True), llama_file(tmp_path), layouts.LLAMA)


def test_damaged_files_and_indices_are_refused_in_one_line(tmp_path):
    params = nnx.state(llama(), nnx.Param)

    def refused(path, kind: Any, match: str) -> None:
        with pytest.raises(kind, match=match) as error:
            weights.read(path, params, layouts.LLAMA)
        assert "\n" not in str(error.value)

    refused(tmp_path / "absent.safetensors", FileNotFoundError, "no file .*absent")
    refused(tmp_path, FileNotFoundError, r"Neither model\.safetensors nor")
    whole = llama_file(tmp_path)
    read = weights.read(whole, params, layouts.LLAMA)
    for size in (0, 5, 300, whole.stat().st_size - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole.read_bytes()[:size])
        refused(cut, ValueError, r"cut\.safetensors is truncated")
    weights.write(tmp_path / "many", read, layouts.LLAMA, max_bytes=3_000)
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    parts[1].unlink()
    parts[2].unlink()
    both = f"not beside it: {parts[1].name}, {parts[2].name}"
    refused(tmp_path / "many", FileNotFoundError, both)
    index = tmp_path / "many" / "model.safetensors.index.json"
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text, encoding="utf-8")
        refused(tmp_path / "many", ValueError, "is no index of safetensors files")
    name = "model.norm.weight"
    for dtype, theirs in (
        (torch.int8, "I8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ):
        quantized = llama_file(tmp_path, changes={name: torch.zeros(16, dtype=dtype)})
        refused(quantized, ValueError, f"{name} is of dtype {theirs}; .* not quantized")


def test_sizes_that_cannot_be_are_refused():
    for wrong, match in (
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"hidden_size": 18}, "num_heads must divide hidden_size = 18"),
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, got 'relu'"),
    ):
        with pytest.raises(ValueError, match=match):
            LlamaConfig(**(SIZES | wrong))
    with pytest.raises(ValueError, match="num_heads must divide hidden_size = 16"):
        BertConfig(**(BERT | {"num_heads": 3}))
    model = nnx.eval_shape(lambda: Bert(BertConfig(**BERT), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"have 10 tokens, .* positions for 9"):
        model(jnp.zeros([1, 10], jnp.int32))
