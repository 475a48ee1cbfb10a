"""The table on screens of several widths, and the report in Markdown."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from classp_jax.continual.report import markdown, write_report
from classp_jax.continual.report.table import table_content
from classp_jax.continual.results import ResultsError
from classp_jax.continual.results.statistics import rows
from tests.continual.fakes import PROVENANCE, make_results, make_run

METHODS = ("sgd", "ewc-published", "reset-optimizer+adam", "lower-rate-later")


def several(methods=METHODS, seeds=3, **changes):
    return make_results(
        *(
            make_run(method, seed, level=0.6 + 0.1 * i, **changes)
            for i, method in enumerate(methods)
            for seed in range(seeds)
        )
    )


def text_of(results, width, reference=None):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(results.table(reference))
    return file.getvalue()


def cells(results, reference=None):
    """By the words of its heading, a column's cells."""
    content = table_content(results, reference)
    columns = (content.labels, *content.accuracies, *content.costs)
    return {" ".join(c.heading.split()): list(c.cells) for c in columns}


# ---- the table -------------------------------------------------------------------


def test_cells_are_the_statistics():
    results = several()
    found = cells(results)
    for i, row in enumerate(rows(results)):
        mean, sd = row.estimates["average_accuracy"] or (0, 0)
        assert found["Average accuracy"][i] == f"{100 * mean:.1f} ± {100 * sd:.1f}"
        density, _ = row.estimates["update_density"] or (0, 0)
        assert found["Update density"][i] == f"{100 * density:.1f}"
        if i:
            d = row.difference
            assert d is not None
            half = 100 * (d.high - d.low) / 2
            expected = f"{100 * d.mean:+.1f} ± {half:.1f} {d.word}"
            assert found["Against sgd"][i] == expected
    assert found["Against sgd"][0] == "reference"
    assert found["Training seconds"] == ["0.25"] * 4
    assert found["Compiling seconds"] == ["1.5"] * 4
    assert found["Bytes per parameter"] == ["4.0"] * 4
    assert found["Task boundary known"] == ["no"] * 4


def test_against_another_method():
    found = cells(several(), "ewc-published")
    (words,) = (v for k, v in found.items() if k.startswith("Against"))
    assert words[1] == "reference"
    assert words[0].endswith("behind")
    assert words[2].endswith("ahead")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_number_and_no_heading_is_broken(width):
    results = several(unseen=True, ulp_spread=0.004)
    text = text_of(results, width)
    assert max(map(len, text.splitlines())) <= width
    content = table_content(results)
    for column in (*content.accuracies, *content.costs):
        for cell in column.cells:
            assert re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text), cell
        for line in column.heading.split("\n"):
            assert re.search(rf"(?<!\S){re.escape(line)}(?!\S)", text), line
    for method in METHODS:
        assert method in text


def test_a_table_fits_every_terminal():
    """Also one that is too narrow for a column by a single character."""
    results = several(unseen=True)
    for width in range(60, 95):
        text = text_of(results, width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width


def test_a_heading_with_settings_is_broken_between_words():
    results = make_results(
        *(make_run("sgd", settings={"learning_rate": rate}) for rate in (0.05, 0.5))
    )
    headings = [column.heading for column in table_content(results).accuracies]
    assert "Against sgd\n(learning_rate=0.05)" in headings


def test_one_seed_has_no_spread():
    text = text_of(several(seeds=1), 120)
    assert "±" not in text
    assert "An interval takes two seeds or more." in " ".join(text.split())


def test_columns_without_a_number_are_left_out():
    found = cells(several())
    assert "Forward transfer" not in found
    assert "Rounding spread" not in found
    assert "Forward transfer" in cells(several(unseen=True))
    one_task = cells(several(num_tasks=1))
    assert "Forgetting" not in one_task
    assert "Against sgd" not in cells(several(["sgd"]))


def test_rounding_stands_beside_the_spread_of_seeds():
    found = cells(several(ulp_spread=0.0123))
    names = list(found)
    assert found["Rounding spread"] == ["1.2"] * 4
    assert names.index("Rounding spread") == names.index("Average accuracy") + 2


def test_a_diverged_method_has_a_hint_instead_of_numbers():
    results = several(["sgd", "ewc"])
    *others, last = results.runs
    results = dataclasses.replace(
        results, runs=(*others, dataclasses.replace(last, diverged=True))
    )
    found = cells(results)
    assert found["Average accuracy"][1] == "1 of 3\ndiverged"
    assert "Against sgd" not in found
    assert found["Learning accuracy"][1] == "-"
    assert found["Bytes per parameter"][1] == "4.0"
    hint = " ".join(text_of(results, 80).split())
    assert "ewc diverged (1 of 3 seeds)" in hint
    assert "--set ewc.learning_rate=" in hint
    every = dataclasses.replace(
        results,
        runs=tuple(dataclasses.replace(run, diverged=True) for run in results.runs),
    )
    assert cells(every)["Average accuracy"] == ["diverged"] * 2


def test_no_negative_zero():
    run = make_run(num_tasks=2, matrix=[[0.0] * 2, [0.50001, 0.0], [0.5, 0.5]])
    assert cells(make_results(run))["Backward transfer"] == ["0.0"]


def test_methods_with_other_numbers_of_seeds_say_so():
    results = several().add(several(["sgd"], seeds=5))
    assert cells(results)["Method"] == [
        "sgd, 5 seeds",
        "ewc-published",
        "reset-optimizer+adam",
        "lower-rate-later",
    ]
    assert table_content(results).title.endswith("3 tasks, 3 seeds")


def test_the_table_shows_itself():
    table = several().table()
    assert str(table) == repr(table)
    assert "ewc-published" in str(table)
    assert "text/html" in table._repr_mimebundle_((), ())


def test_markup_in_names_stays_text(tmp_path):
    results = several(["[red]a|b[/red]", "$x_1$ *y*"], seeds=1)
    assert "[red]a|b[/red]" in text_of(results, 120)
    text = markdown(results)
    assert r"\[red\]a\|b\[/red\]" in text
    assert r"\$x\_1\$ \*y\*" in text
    results.tradeoff_picture().savefig(tmp_path / "x.png")


# ---- Markdown --------------------------------------------------------------------


def test_the_report_says_how_each_run_was_made():
    old = several(["sgd"])
    later = dataclasses.replace(
        PROVENANCE,
        date="2027-01-01T00:00:00+00:00",
        device="TPU v9",
        command="classp-jax run --methods adam",
    )
    results = old.add(several(["adam"], provenance=later))
    text = markdown(results)
    assert "classp-jax run\nclassp-jax run --methods adam" in text
    assert r"  - CPU (x86\_64, 2 cores): sgd, seeds 0-2" in text
    assert "  - TPU v9: adam, seeds 0-2" in text
    assert "- Versions: python 3.11.7, jax 0.10.2" in text
    assert "- Seeds: 0-2" in text
    assert "- Parameters: 25,000" in text
    assert "- Date: 2026-11-23T18:40:00+00:00 to 2027-01-01T00:00:00+00:00" in text
    assert "- Device: CPU" in markdown(old)


def test_the_report_has_table_formulas_settings_and_configuration():
    results = several(["sgd", "classp"])
    text = markdown(results, "classp")
    for cell in cells(results, "classp")["Average accuracy"]:
        assert f"| {cell} |" in text
    assert "| Method | Average accuracy | Against classp |" in text
    assert "- Forgetting: `mean over j < N of max(" in text
    assert "- Average online accuracy: `mean over tasks" in text
    assert r"| classp | learning\_rate = 0.1, eps = 0.001 |" in text
    assert '"fingerprint": "0123abcd"' in text


def test_write_report(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_report(several(["sgd", "classp"], num_tasks=1, seeds=1), folder)
    names = sorted(path.name for path in folder.iterdir())
    pictures = [
        f"{p}.{s}"
        for p in ("accuracy", "matrix", "tradeoff")
        for s in ("pdf", "png", "svg")
    ]
    assert names == sorted([*pictures, "report.md"])
    text = (folder / "report.md").read_text()
    for picture in ("accuracy.png", "matrix.png", "tradeoff.png"):
        assert f"({picture})" in text


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError) as error:
        write_report(several(["sgd"], seeds=1), tmp_path / "file" / "folder")
    assert "Cannot write" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ResultsError, match="no finished runs"):
        write_report(make_results(), tmp_path)
