"""The page on fine-tuning says what the stored runs say, and its path runs."""

import importlib
import json
import pathlib
import re

import numpy as np
import optax
import pytest

from classp_jax import finetune

FOLDER = pathlib.Path(__file__).parents[1] / "docs/finetuning"


@pytest.fixture(scope="module")
def render():
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(FOLDER)
        yield importlib.import_module("render")


@pytest.fixture(scope="module")
def curves(render):
    return importlib.import_module("curves")


def test_the_page_is_its_template_with_the_stored_runs(render):
    template = render.TEMPLATE.read_text(encoding="utf-8")
    assert render.render(template) == render.PAGE.read_text(encoding="utf-8")


def test_what_is_said_of_magnitudes_is_what_was_measured(render):
    text = str(finetune.importance_from_magnitude.__doc__)
    said = re.findall(r"[-+]\d+\.\d+ \(.*?\)(?= points| hundredths)", text)
    for problem, words in zip(("fashion", "language"), said, strict=True):
        table = render.sources(problem, render.PLANS[problem].targets[-1])
        (measured,) = [row for row in table.split("\n") if "magnitude" in row]
        assert measured.endswith(f"| {words} |")


def test_no_result_in_the_template_is_typed(render):
    template = render.TEMPLATE.read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+ ?(?:%|points|±|\|)", template) == []


def test_what_is_kept_where_a_curve_crosses_the_target(curves):
    curve = [[0, 97.0, 10.0], [5, 90.0, 60.0], [10, 80.0, 80.0], [20, 70.0, 75.0]]
    assert curves.kept_at(curve, 75.0) == 82.5
    assert curves.kept_at(curve, 80.0) == 80.0
    # From the start nothing is interpolated: that would flatter a coarse curve.
    assert curves.kept_at(curve, 30.0) == 90.0
    assert np.isnan(curves.kept_at(curve, 81.0))


def test_the_frontier_is_what_none_surpasses(curves):
    points = [(90, 10), (80, 50), (85, 40), (70, 45), (60, 60), (60, 55)]
    assert curves.frontier(points) == [(90, 10), (85, 40), (80, 50), (60, 60)]


def test_every_method_has_as_many_trials_and_no_seed_is_tuned_on(render):
    for problem in render.PLANS:
        if render.has(problem):
            for method in render.methods(problem):
                found = render.trials_of(problem, method)
                assert len(found) == render.PLANS[problem].trials
                assert {line["seed"] for line in found} == {render.TUNING_SEED}
            seeds = {line["seed"] for line in render.trained(problem, "test")}
            assert seeds == set(render.PLANS[problem].seeds)
            assert render.TUNING_SEED not in seeds


def test_the_numbers_depend_on_the_stored_runs(render, monkeypatch):
    """A table of one method against itself made worse, from lines made up here."""

    def line(method: str, seed: int, part: str, kept: float, settings: dict) -> dict:
        curve = [[0, 97.0, 10.0], [5, kept + seed, 60.0], [9, kept + seed, 99.0]]
        return {"method": method, "seed": seed, "part": part, "curve": curve,
                "settings": settings}  # fmt: skip

    stored, plan = [], render.PLANS["fashion"]
    for method, kept in (("AdamW", 50.0), ("LoRA", 60.0), ("EWC", 90.0)):
        tried = render.trials(render.METHODS[method], plan.trials)
        stored += [
            line(method, 1000, "validation", kept - k, s) for k, s in enumerate(tried)
        ]
        stored += [line(method, s, "test", kept, tried[0]) for s in plan.seeds]
    monkeypatch.setattr(render, "lines", lambda _: stored)
    target = plan.targets[0]
    table = render.kept_table("fashion", target)
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")
    ]
    assert rows[2][:2] == ["AdamW", "52.0 ± 1.6"]
    assert rows[-1][3] == "+10.0 (+10.0 to +10.0)"


def test_results_are_lines_of_json_with_what_made_them():
    for file in (FOLDER / "results").glob("*.jsonl"):
        for text in file.read_text("utf-8").splitlines():
            found = json.loads(text)
            assert {"date", "device", "jax", "part"} <= found.keys()


def test_the_code_on_the_page_runs(tmp_path, monkeypatch):
    import jax.numpy as jnp

    page = (FOLDER.parent / "finetuning.md").read_text("utf-8")
    path, combination = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)

    def loss(params, batch):
        return ((batch @ params["w"]) ** 2).mean()

    names = {
        "loss": loss,
        "params": {"w": jnp.array([1.0, -2.0])},
        "old_batches": [jnp.array([[1.0, 0.0], [3.0, 0.0]])],
    }
    import jax

    with jax.numpy_dtype_promotion("standard"):
        exec(path, names)
    importance = names["state"].importance.accumulator["w"]
    np.testing.assert_allclose(importance, [2.0 + 18.0, 0.0])
    assert isinstance(names["tx"], optax.GradientTransformation)

    names |= {
        "logits": lambda params, x: x @ params["w"][:, None] * jnp.array([[1.0, -1.0]]),
        "old_params": names["params"],
        "old_inputs": names["old_batches"][0],
        "new_params": {"w": jnp.array([3.0, 2.0])},
    }
    with jax.numpy_dtype_promotion("standard"):
        exec(combination, names)
    # No input has the second feature: that weight is as after fine-tuning.
    first, second = names["params"]["w"]
    assert 1.0 <= first < 3.0
    assert second == 2.0
