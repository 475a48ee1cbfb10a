"""Each notebook runs whole, without a warning, and shows what its text claims."""

import json
import os
import pathlib
import re
from typing import Any

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.py"))

# Warnings are errors in the kernel too, but for those of the kernel itself.
FIRST_CELL = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("default", module="ipykernel")
"""


def execute(
    name: str, folder: pathlib.Path, expressions: dict[str, str], **variables: str
) -> tuple[nbformat.NotebookNode, dict[str, Any]]:
    """The notebook with its outputs, and what the expressions are worth at its end."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    pairs = ", ".join(f"{key!r}: {value}" for key, value in expressions.items())
    last_cell = f"import json; print(json.dumps({{{pairs}}}))"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST_CELL))
    notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    # As on a reader's machine: without the virtual devices of the other tests.
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    client.execute(env=kept | variables)
    return notebook, json.loads(printed(notebook.cells.pop()))


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in cell.get("outputs", []) if "text" in o)


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_text(notebook: nbformat.NotebookNode) -> None:
    """Every measured number in the prose is one that the notebook prints."""
    everything = "\n".join(map(printed, notebook.cells))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for number in re.findall(r"\d+\.\d+|\d+(?=\s?%)", cell.source):
                assert number in everything


def test_five_minutes(tmp_path):
    notebook, values = execute(
        "01_five_minutes",
        tmp_path,
        {
            "learned": "{k: float(v) for k, v in first_learned.items()}",
            "at_end": "{k: v.tolist() for k, v in at_end.items()}",
            "halves": "{k: v.tolist() for k, v in halves_at_end.items()}",
        },
    )
    learned, at_end = values["learned"], values["at_end"]
    assert min(learned.values()) > 0.9
    assert at_end["Adam"][0] < 0.75
    # Rounding, another on each machine, decides between neighbouring rates.
    assert at_end["CLASSP"][0] > at_end["Adam"][0] + 0.1
    assert at_end["CLASSP"][0] > learned["CLASSP"] - 0.2
    assert at_end["CLASSP"][1] > at_end["Adam"][1] - 0.08
    # What the notebook says that CLASSP cannot do.
    for old, new in values["halves"].values():
        assert old < 0.4
        assert new > 0.9
    assert pictures(notebook) == 1
    check_text(notebook)


def test_threshold_and_power(tmp_path):
    notebook, values = execute(
        "02_threshold_and_power",
        tmp_path,
        {
            "thresholds": "THRESHOLDS",
            "first": "{str(e): [first_step(p, e).tolist() for p in POWERS]"
            " for e in (1e-5, 1e-1)}",
            "sizes": "sizes.tolist()",
            "density": "list(mean_density.values())",
            "free": "[float(classp_jax.free_fraction(states[1.0, t])) for t in SHOWN]",
            "accuracy": "[[accuracy[p, t].mean(0).tolist() for t in THRESHOLDS]"
            " for p in POWERS]",
            "published": "[[same(published['published', a], published['published', b])"
            " for a in (-1.0, 0.0, 0.5, 0.99)] for b in (0.99, 1.0)]",
            "published_density": "[published['published', t][1] for t in (0.5, 1.0)]",
            "classp_density": "[published['classp', t][1] for t in (0.0, 0.5)]",
            "published_2": "accuracy_published.mean(0).tolist()",
        },
    )
    # The first step is alpha g / e for small gradients, alpha for large ones.
    for e, steps in values["first"].items():
        for of_power in steps:
            pairs = zip(values["sizes"], of_power, strict=True)
            for size, step in pairs:
                assert step <= 1 + 1e-6
                if size < float(e) / 50:
                    assert step == pytest.approx(size / float(e), rel=0.05)
                if size > float(e) * 50:
                    assert step == pytest.approx(1, rel=0.05)
    # A higher threshold: sparser updates, more weights that never moved.
    assert values["density"] == sorted(values["density"], reverse=True)
    assert values["density"][-1] < 0.1 * values["density"][0]
    assert values["free"] == sorted(values["free"])
    # A lower power keeps more; too high a threshold loses everything.
    low = [i for i, t in enumerate(values["thresholds"]) if t <= 1e-4]
    old = [sum(row[i][0] for i in low) / len(low) for row in values["accuracy"]]
    new = [sum(row[i][1] for i in low) / len(low) for row in values["accuracy"]]
    assert old[0] > old[1] + 3
    assert old[1] > old[2] + 1
    assert min(new) > max(new) - 5
    for power, of_threshold in enumerate(values["accuracy"]):
        assert of_threshold[-1][0] < old[power] - 10
        assert of_threshold[-1][1] < new[power]
    # The published class: all thresholds below 1 are one, and 1 freezes the network.
    assert values["published"] == [[True] * 4, [False] * 4]
    assert values["classp_density"][0] > 0.1
    assert values["published_density"][0] == pytest.approx(
        values["classp_density"][0], rel=0.05
    )
    assert values["published_density"][1] == 0
    assert values["classp_density"][1] < 0.001
    assert pictures(notebook) == 4
    check_text(notebook)


def test_fine_tune_without_forgetting(tmp_path):
    notebook, values = execute(
        "03_fine_tune_without_forgetting",
        tmp_path,
        {
            "before": "before",
            "runs": "{k: len(v) for k, v in curves.items()}",
            "best": "{k: v.tolist() for k, v in best.items()}",
        },
        # It compiles more than it computes.
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        XLA_FLAGS="--xla_cpu_use_fusion_emitters=false",
    )
    assert values["before"][0] > 95
    assert len(set(values["runs"].values())) == 1
    adamw, protected = values["best"]["AdamW"], values["best"]["protect(AdamW)"]
    assert sum(protected) > sum(adamw) + 10
    assert protected[0] > adamw[0] + 3
    assert pictures(notebook) == 2
    check_text(notebook)


def test_every_notebook_is_tested_and_listed():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        assert f"]({name}.py)" in readme
        assert f'"{name}"' in source
        first = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[1]
        assert re.match(r"# # \w", first)
