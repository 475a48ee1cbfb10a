"""The benchmarks outside the package: they run, and count what they say."""

import json
import pathlib
import sys
import types

import ahead
import decoder
import faults
import jax
import numpy as np
import optax
import page
import pytest
import scale
import step
import transforms

import classp_jax
from classp_jax import regularizers, rivals

ROOT = pathlib.Path(__file__).parents[1]
MODULE = """HloModule jit_step, is_scheduled=true

%fused (a: f32[8,128], b: f32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[] parameter(1)
  ROOT %scaled = f32[8,128]{1,0} fusion(%a, %b), kind=kLoop, calls=%nothing
}

%branch (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %copy.1 = f32[8,128]{1,0} copy(%x)
}

%cheap_branch (y: f32[8,128]) -> f32[8,128] {
  ROOT %y = f32[8,128]{1,0} parameter(0)
}

ENTRY %main (p: f32[8,128], q: bf16[8,128], n: s32[]) -> (f32[8,128], pred[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = bf16[8,128]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) \
copy-start(%p), backend_config={}
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[8,128]{1,0}), bf16[2,128]{1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%q), slice={[0:2], [0:128]}
  %slice-done = bf16[2,128]{1,0:S(1)} slice-done(%slice-start)
  %both = (f32[8,128]{1,0}, /*index=1*/pred[8,128]{1,0}) fusion(%copy-done, %q, %n), \
kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add"}
  %first = f32[8,128]{1,0} get-tuple-element(%both), index=0
  %second = pred[8,128]{1,0} get-tuple-element(%both), index=1
  %sum = f32[8,128]{1,0} all-reduce-start(%first), channel_id=3, to_apply=%add
  %again = f32[8,128]{1,0} all-reduce(%first), channel_id=3, to_apply=%add
  %chosen = f32[8,128]{1,0} conditional(%n, %first, %first), \
branch_computations={%branch, %cheap_branch}
  ROOT %tuple = (f32[8,128]{1,0}, pred[8,128]{1,0}) tuple(%chosen, %second)
}
"""


@pytest.fixture
def module():
    """A compiled module written by hand, of 1024 elements an array."""
    return types.SimpleNamespace(as_text=lambda: MODULE)


def test_kernels_of_a_module(module):
    found = {kernel.opcode: kernel for kernel in ahead.kernels(module)}
    assert list(found) == [
        "copy-start",
        "slice-start",
        "fusion",
        "all-reduce-start",
        "all-reduce",
        "copy",
    ]
    # Read p whole and a quarter of q; the fast memory is not counted.
    assert found["copy-start"].in_main_memory == 4096
    assert found["slice-start"].in_main_memory == 512
    # Reads q and n, writes float32 and bool.
    assert found["fusion"].in_main_memory == 2048 + 4 + 4096 + 1024
    assert sorted(found["fusion"].arrays) == [4, 1024, 2048, 4096, 4096]
    assert found["copy"].in_main_memory == 2 * 4096
    assert [k.opcode for k in found.values() if k.copies_only][:2] == [
        "copy-start",
        "slice-start",
    ]


def test_collectives_of_a_module():
    assert ahead.collectives(MODULE) == {"all-reduce": 1}


def test_counts_of_a_cpu_are_those_of_the_compiler():
    counted = step.count("sgd", "cpu", optax.sgd(0.1), (256, 128))
    # Reads g and w, writes w.
    expected = step.Count("sgd", 12.0, 12.0, 1.0, 0.0, 0.0)
    assert counted._replace(traffic=round(counted.traffic, 2)) == expected


@pytest.mark.parametrize(
    ("target", "words"),
    [("cuda:rusty", "cuda:a100, cuda:h100"), ("abacus", "There is no target")],
)
def test_an_unknown_target_is_refused(target: str, words: str):
    with pytest.raises(ahead.UnknownTargetError, match=words):
        ahead.mesh(target)


@pytest.mark.parametrize("target", ["tpu:v5e:2x2", "cuda:a100"])
def test_without_the_compiler_it_says_what_to_install(target, monkeypatch):
    monkeypatch.setattr(ahead, "_version", lambda _: "")
    with pytest.raises(ahead.UnknownTargetError, match="pip install"):
        ahead.mesh(target)


def test_every_public_transform_has_a_row():
    rows = {
        part.split("(")[0].split(" ")[0]
        for name in transforms.transforms()
        for part in name.split(", ")
    }
    short = {"scale_by_generalized_adagrad": "scaling"}
    made = [
        name
        for room in (classp_jax, regularizers, rivals)
        for name in room.__all__
        if "GradientTransformation" in _annotations(room, name).get("return", "")
    ]
    assert len(made) == 15
    assert {short.get(name, name) for name in made} <= rows


def _annotations(room, name: str) -> dict[str, str]:
    """What a function takes and returns, as text; nothing of what is no function."""
    public = getattr(room, name)
    found = getattr(public, "__annotations__", {}) if callable(public) else {}
    return {key: getattr(value, "__name__", str(value)) for key, value in found.items()}


def test_the_benchmark_prints_every_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("torch")
    some = list(transforms.transforms().items())[::9]
    monkeypatch.setattr(step, "transforms", lambda: dict(some))
    # optax.adam mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        step.report(leaves=2, parameters=2000, rounds=1)
    table = capsys.readouterr().out
    rows = [*(name for name, _ in some), "torch, Algorithm 1, power 1"]
    rows += ["torch.optim.Adagrad, foreach", "torch.optim.Adagrad, fused"]
    for row in rows:
        assert f"\n{row} " in table
    assert "left out" not in table


def test_the_benchmark_says_that_torch_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    adagrad = {"optax.adagrad": optax.adagrad(0.1)}
    monkeypatch.setattr(step, "transforms", lambda: adagrad)
    step.report(leaves=2, parameters=2000, rounds=1)
    table = capsys.readouterr().out
    assert "\noptax.adagrad " in table
    assert "torch." not in table
    assert "PyTorch is not installed" in table


def test_it_counts_for_another_machine_and_saves(capsys, monkeypatch, tmp_path):
    adagrad = {"optax.adagrad": optax.adagrad(0.1)}
    monkeypatch.setattr(step, "transforms", lambda: adagrad)
    saved = tmp_path / "speed.json"
    saved.write_text('{"cuda:a100": 1, "cpu": 2}')
    arguments = ["step.py", "--compile-for", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", arguments)
    step.main()
    assert "optax.adagrad " in capsys.readouterr().out
    stored = json.loads(saved.read_text())
    assert stored["cuda:a100"] == 1
    assert stored["cpu"]["jax"] == jax.__version__
    assert stored["cpu"]["large"][0]["traffic"] == 28


def test_tables_go_to_their_places():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n"
    table = page.table(["x", "y"], [["a", "1"]])
    filled = page.filled(text, {"one": table})
    assert filled == (
        "a\n<!-- one -->\n| x | y |\n| --- | ---: |\n| a | 1 |\n<!-- end -->\nb\n"
    )
    with pytest.raises(ValueError, match="0 places for 'two'"):
        page.filled(text, {"two": ""})


def test_the_page_of_speed_has_the_stored_tables():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    results = json.loads(step.RESULTS.read_text(encoding="utf-8"))
    assert page.filled(text, step.page_tables(results)) == text
    for target in results.values():
        assert target["date"] in text


def test_the_page_of_scale_has_the_stored_tables():
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert page.filled(text, scale.tables(scale.load())) == text


def test_the_page_of_faults_has_the_stored_table():
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    stored = json.loads(faults.RESULTS.read_text(encoding="utf-8"))
    assert stored.keys() == {name for name, _ in faults.FAULTS}
    assert page.filled(text, {"faults": faults.table(stored)}) == text


def test_no_optimizer_adds_a_collective_to_a_step():
    cells = scale.load()
    assert len(cells) == 2 * len(scale.MODELS) * len(scale.SLICES) * len(
        scale.optimizers()
    )
    steps = {}
    for cell in cells:
        if cell["part"] == "update":
            assert cell["collectives"] == {}, cell
            assert cell["temporary"] < 2**20, cell
        elif "needs" not in cell:
            place = (cell["model"], cell["slice"])
            assert steps.setdefault(place, cell["collectives"]) == cell["collectives"]
    assert len(steps) == len(scale.MODELS) * len(scale.SLICES)


def test_a_decoder_cut_in_two_has_the_loss_of_a_whole_one():
    size = decoder.Size(2, 32, 64, 2, 64, 16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.1 * rng.standard_normal(x.shape, np.float32),
        decoder.parameters(size),
    )
    tokens = rng.integers(size.vocabulary, size=(2, size.tokens), dtype=np.int32)

    def loss(chips: int) -> float:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:chips]), (ahead.AXIS,))
        placed = jax.device_put(params, decoder.shardings(mesh, params))
        # jax.nn.dot_product_attention mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            return float(jax.jit(decoder.loss_function(size, mesh))(placed, tokens))

    # Close to guessing among all tokens at first.
    whole = loss(1)
    assert whole == pytest.approx(np.log(size.vocabulary), abs=0.3)
    assert loss(2) == pytest.approx(whole, rel=1e-3)
