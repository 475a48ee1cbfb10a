"""Checkpoints of the published class: read, written, and trained on in both worlds."""

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

import classp_jax
from classp_jax import torch_state
from classp_jax.torch_state import conv, dense, flat, same
from tests.test_imports import modules_loaded_by
from tests.torch_reference import PublishedClassp

HYPERPARAMS: Any = {
    "lr": 0.05,
    "threshold": 0.5,
    "epsilon": 1e-2,
    "power": 1,
}
TABLE = {
    "tokens.weight": same("tokens"),
    "attention.in_proj_weight": dense("query/kernel", "key/kernel", "value/kernel"),
    "attention.in_proj_bias": flat("query/bias", "key/bias", "value/bias"),
    "attention.out_proj.weight": dense("out/kernel", inputs=2),
    "attention.out_proj.bias": same("out/bias"),
    "convs.{}.weight": conv("convs/{}/kernel"),
    "convs.{}.bias": same("convs/{}/bias"),
    "norm.weight": same("norm/scale"),
    "norm.bias": None,
    "norm.running_*": None,
    "norm.num_batches_tracked": None,
    "head.weight": dense("head/kernel"),
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 11, size=(60, 4, 5))
LABELS = RNG.integers(0, 3, size=(60, 4))


class Network(torch.nn.Module):
    convs: Any

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(11, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.convs = torch.nn.ModuleList(
            [torch.nn.Conv2d(1, 2, (3, 2)), torch.nn.Conv2d(2, 4, (1, 3))]
        )
        self.norm = torch.nn.BatchNorm1d(4).eval()
        self.norm.bias.requires_grad_(False)
        self.head = torch.nn.Linear(4, 3, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = self.attention(x, x, x, need_weights=False)[0][:, None]
        x = functional.relu(self.convs[0](x))
        # Its bias is never used: a parameter without gradients has no sum in the file.
        x = functional.conv2d(x, self.convs[1].weight)
        x = x.mean((2, 3)) * self.norm.weight
        return self.head(x)


def parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [w for w in network.parameters() if w.requires_grad]


def train_torch(network: Network, optimizer: PublishedClassp, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        logits = network(torch.from_numpy(TOKENS[i]))
        functional.cross_entropy(logits, torch.from_numpy(LABELS[i])).backward()
        optimizer.step()


def logits(p, tokens):
    x = p["tokens"][tokens]

    def heads(name):
        projected = jnp.einsum("bti,ihd->bthd", x, p[name]["kernel"])
        return projected + p[name]["bias"]

    scores = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key")) / 2
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads("value"))
    x = jnp.einsum("bthd,hdo->bto", mixed, p["out"]["kernel"]) + p["out"]["bias"]

    def convolved(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=numbers
        )

    first, second = p["convs"]
    x = jax.nn.relu(convolved(x[..., None], first["kernel"]) + first["bias"])
    x = convolved(x, second["kernel"]).mean((1, 2)) * p["norm"]["scale"]
    return x @ p["head"]["kernel"]


@jax.jit
def gradient(params, tokens, labels):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, tokens), labels
        ).mean()

    return jax.grad(loss)(params)


def template():
    def arrays(*shape):
        return jnp.full(shape, jnp.nan)

    projection = {"kernel": arrays(8, 2, 4), "bias": arrays(2, 4)}
    return {
        "tokens": arrays(11, 8),
        "query": projection,
        "key": projection,
        "value": projection,
        "out": {"kernel": arrays(2, 4, 8), "bias": arrays(8)},
        "convs": [
            {"kernel": arrays(3, 2, 1, 2), "bias": arrays(2)},
            {"kernel": arrays(1, 3, 2, 4), "bias": arrays(4)},
        ],
        "norm": {"scale": arrays(4)},
        "head": {"kernel": arrays(4, 3)},
    }


def saved_by_torch(network, optimizer, only_optimizer=False) -> io.BytesIO:
    both = {
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    file = io.BytesIO()
    torch.save(both["optimizer_state_dict"] if only_optimizer else both, file)
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def trained() -> tuple[Network, PublishedClassp]:
    torch.manual_seed(0)
    network = Network()
    optimizer = PublishedClassp(parameters(network), **HYPERPARAMS)
    train_torch(network, optimizer, range(20))
    return network, optimizer


NAMES = [name for name, w in Network().named_parameters() if w.requires_grad]


def read(file, **kwargs) -> torch_state.Checkpoint:
    return torch_state.read(file, template(), TABLE, **kwargs)


def test_both_frameworks_go_on_alike(trained):
    network, optimizer = Network(), None
    network.load_state_dict(trained[0].state_dict())
    optimizer = PublishedClassp(parameters(network), **HYPERPARAMS)
    optimizer.load_state_dict(trained[1].state_dict())
    saved = read(saved_by_torch(network, optimizer), names=NAMES)
    assert saved.hyperparams == {
        "learning_rate": 0.05,
        "threshold": 0.5,
        "power": 1,
        "eps": 1e-2,
        "scaling": True,
    }
    tx = classp_jax.classp_published(**saved.hyperparams)
    params = saved.params
    state = optax.tree.set(tx.init(params), accumulator=saved.accumulators)
    update = jax.jit(tx.update)
    for i in range(20, 40):
        grads = gradient(params, TOKENS[i], LABELS[i])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # PyTorch goes on from what JAX had after 20 steps of its own, and from its own.
    file = io.BytesIO()
    sums = classp_jax.accumulators(state)
    torch_state.write(file, saved._replace(params=params, accumulators=sums), TABLE)
    file.seek(0)
    train_torch(network, optimizer, range(20, 40))
    theirs = read(saved_by_torch(network, optimizer), names=NAMES)
    for ours, other in ((params, theirs.params), (sums, theirs.accumulators)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
            ours,
            other,
        )
    back = torch.load(file, weights_only=True)
    other = Network()
    loaded = other.load_state_dict(back["model_state_dict"], strict=False)
    assert not loaded.unexpected_keys
    assert all(key.startswith("norm.") for key in loaded.missing_keys)
    other_optimizer = PublishedClassp(parameters(other), **(HYPERPARAMS | {"lr": 9}))
    other_optimizer.load_state_dict(back["optimizer_state_dict"])
    train_torch(other, other_optimizer, range(40, 60))
    train_torch(network, optimizer, range(40, 60))
    pairs = zip(parameters(other), parameters(network), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=5e-4, atol=5e-6)


def test_what_is_written_has_the_bits_that_were_read(trained):
    network, optimizer = trained
    saved = read(saved_by_torch(network, optimizer), names=NAMES)
    file = io.BytesIO()
    torch_state.write(file, saved, TABLE)
    file.seek(0)
    back = torch.load(file, weights_only=True)
    for name, tensor in network.state_dict().items():
        if not name.startswith("norm.") or name == "norm.weight":
            assert torch.equal(back["model_state_dict"][name], tensor), name
    state = optimizer.state_dict()["state"]
    unused = NAMES.index("convs.1.bias")
    assert unused not in state
    for number, entry in back["optimizer_state_dict"]["state"].items():
        sums = state.get(number, {"grad_sum": torch.zeros(4)})["grad_sum"]
        assert torch.equal(entry["grad_sum"], sums), number
    (group,) = back["optimizer_state_dict"]["param_groups"]
    assert group == optimizer.state_dict()["param_groups"][0]


def test_an_optimizer_alone_needs_the_names(trained):
    file = saved_by_torch(*trained, only_optimizer=True)
    with pytest.raises(ValueError, match=r"without its model.*give names"):
        read(file)
    file.seek(0)
    alone = read(file, names=NAMES)
    whole = read(saved_by_torch(*trained), names=NAMES)
    jax.tree.map(np.testing.assert_array_equal, alone.accumulators, whole.accumulators)
    assert np.isnan(alone.params["tokens"]).all()


def test_bfloat16_is_read_and_written_bit_for_bit():
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    optimizer = PublishedClassp([torch.nn.Parameter(weight)], **HYPERPARAMS)
    file = io.BytesIO()
    torch.save(
        {
            "model_state_dict": {"w": weight},
            "optimizer_state_dict": optimizer.state_dict(),
        },
        file,
    )
    file.seek(0)
    table = {"w": dense("kernel")}
    params = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    saved = torch_state.read(file, params, table)
    assert saved.params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        saved.params["kernel"].astype(jnp.float32), weight.float().numpy().T
    )
    file = io.BytesIO()
    torch_state.write(file, saved, table)
    file.seek(0)
    back = torch.load(file, weights_only=True)
    assert torch.equal(back["model_state_dict"]["w"], weight)


def test_parameters_and_tensors_in_place_of_numbers():
    """A state dict may hold ``nn.Parameter``; PyTorch takes a tensor for ``lr``."""
    dtypes = (torch.float32, torch.bfloat16)
    weights = [torch.nn.Parameter(torch.randn(2, 3, dtype=d)) for d in dtypes]
    optimizer = PublishedClassp(weights, **HYPERPARAMS)
    saved = {
        "model_state_dict": dict(zip("ab", weights, strict=True)),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    (group,) = saved["optimizer_state_dict"]["param_groups"]
    group |= {"lr": torch.tensor(0.25), "apply_scaling": torch.tensor(True)}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    like = {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2), jnp.bfloat16)}
    found = torch_state.read(file, like, {"a": dense("a"), "b": dense("b")})
    for name, weight in saved["model_state_dict"].items():
        np.testing.assert_array_equal(
            found.params[name].astype(jnp.float32), weight.detach().float().numpy().T
        )
    assert found.hyperparams["learning_rate"] == 0.25
    assert found.hyperparams["scaling"] is True
    classp_jax.classp_published(**found.hyperparams).init(found.params)


def test_everything_that_does_not_fit_is_named_at_once(trained):
    network, optimizer = trained
    model = network.state_dict()
    del model["head.weight"], model["convs.1.bias"]
    model["tokens.weight"] = model["tokens.weight"][:10]
    model |= {"decoder.weight": torch.zeros(2, 3), "decoder.bias": torch.zeros(2)}
    file = io.BytesIO()
    torch.save(
        {"model_state_dict": model, "optimizer_state_dict": optimizer.state_dict()},
        file,
    )
    file.seek(0)
    params = template() | {"new": jnp.zeros(2)}
    with pytest.raises(ValueError, match="does not fit the parameters") as error:
        torch_state.read(file, params, TABLE, names=NAMES)
    for part in (
        "Missing: convs.1.bias (4,), head.weight (3, 4).",
        "without a parameter: decoder.weight (2, 3), decoder.bias (2,).",
        "Of another shape: tokens.weight (10, 8), needed (11, 8).",
        "no tensor for: new.",
    ):
        assert part in str(error.value)


def test_names_in_another_order_or_number_are_refused(trained):
    file = saved_by_torch(*trained)
    with pytest.raises(ValueError, match=r"optimizer .* does not fit.*tokens\.weight"):
        read(file, names=NAMES[::-1])
    file.seek(0)
    with pytest.raises(ValueError, match="11 parameters, but there are 10 names"):
        read(file, names=NAMES[1:])


class Harmful:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("touched"),))


def test_files_of_another_kind_are_refused_in_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = saved_by_torch(*trained).getvalue()
    adam = torch.optim.Adam(parameters(trained[0]))
    files = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"epoch 3\n",
        "code": {"model_state_dict": {}, "optimizer_state_dict": Harmful()},
        "weights": trained[0].state_dict(),
        "adam": {"model_state_dict": {}, "optimizer_state_dict": adam.state_dict()},
    }
    messages = {
        "truncated": "is damaged",
        "empty": "is damaged",
        "text": "is damaged",
        "code": "no code in it was run",
        "weights": "no checkpoint of the published class.*Found: tokens.weight",
        "adam": "written by another optimizer: .* no threshold, power, epsilon",
    }
    for kind, content in files.items():
        path = tmp_path / f"{kind}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=f"{kind}.pt.*{messages[kind]}") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.pt")


def test_tables_need_neither_torch_nor_flax():
    loaded = modules_loaded_by(
        "import classp_jax.torch_state, classp_jax.finetune.layouts"
    )
    assert "classp_jax.finetune.layouts" in loaded
    assert not loaded & {"torch", "flax", "safetensors"}
