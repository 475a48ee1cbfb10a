"""Tables, Markdown and pictures of results made up for it."""

import dataclasses
import io
import itertools
import math
import re
import statistics

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console

from classp_jax.continual import pictures, report, summary
from classp_jax.continual.metrics import METRICS
from classp_jax.continual.results import Results, Run

METHODS = {
    # The share kept of each task a task later, bytes per parameter, told.
    "sgd": (0.70, 0.0, False),
    "adam": (0.75, 8.0, False),
    "adagrad": (0.84, 4.0, False),
    "classp": (0.97, 4.0, False),
    "classp-published": (0.93, 4.0, False),
    "ewc": (0.92, 80.0, True),
    "online-ewc": (0.91, 12.0, True),
    "si": (0.90, 12.0, True),
    "ewc+classp": (0.98, 44.0, True),
    "replay": (0.96, 3.4, False),
    "joint": (1.0, 31.0, False),
}
STEPS = 60


def make_results(
    methods=tuple(METHODS), num_tasks=5, num_seeds=3, diverged=(), **changes
):
    """Tasks that are learned fast and forgotten by the method's share."""
    points = np.arange(0, num_tasks * STEPS + 1, STEPS // 6)
    runs = []
    for index, method in enumerate(methods):
        kept, state, told = METHODS.get(method, (0.8, 4.0, False))
        for seed in range(num_seeds):
            rng = np.random.default_rng([index, seed])
            age = (points[:, None] - STEPS * np.arange(num_tasks)) / STEPS
            learned = 1 - np.exp(-5 * np.clip(age, 0, 1))
            curve = 0.1 + 0.85 * learned * kept ** np.clip(age - 1, 0, None)
            curve = np.clip(curve + rng.normal(0, 0.01, curve.shape), 0, 1)
            matrix = curve[:: STEPS * (len(points) - 1) // points[-1]]
            if method == "joint":
                # As it is trained: no task is ever the last one but all.
                matrix = matrix.copy()
                matrix[1:-1] = np.nan
            broken = (method, seed) in diverged
            runs.append(
                Run(
                    method=method,
                    seed=seed,
                    matrix=np.where(broken, np.nan, matrix).tolist(),
                    curve_steps=points.tolist(),
                    curve=np.where(broken, np.nan, curve).tolist(),
                    seconds=float(rng.uniform(1, 9)),
                    state_bytes_per_parameter=state,
                    update_density=0.9,
                    told_boundary=told,
                    diverged=broken,
                    settings={"learning_rate": 0.1, "eps": 1e-4},
                )
            )
    results = Results(
        configuration={"stream": "permuted", "methods": list(methods)},
        versions={"jax": "0.10.2", "optax": "0.2.8"},
        device="CPU (2 cores)",
        date="2024-05-16",
        stream={
            "name": "permuted",
            "scenario": "domain-incremental",
            "task_names": [f"permutation {k}" for k in range(num_tasks)],
            "task_ends": [STEPS * (k + 1) for k in range(num_tasks)],
        },
        runs=tuple(runs),
    )
    return dataclasses.replace(results, **changes)


def row_of(results, method):
    (row,) = (row for row in summary.rows(results) if row.method == method)
    return row


def in_terminal(results, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(report.rich_table(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- rows ------------------------------------------------------------------------


def test_rows_are_mean_and_sample_deviation_over_seeds():
    results = make_results()
    rows = summary.rows(results)
    assert [row.method for row in rows] == list(METHODS)
    for row in rows:
        runs = [run for run in results.runs if run.method == row.method]
        assert row.seeds == (0, 1, 2)
        assert row.diverged == 0
        assert row.told_boundary == METHODS[row.method][2]
        for name, metric in METRICS.items():
            values = [metric.function(run.matrix) for run in runs]
            found = row.statistics[name]
            assert found is not None
            if math.isnan(values[0]):
                assert math.isnan(found.mean)
                continue
            assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-14)
            assert found.sd == pytest.approx(statistics.stdev(values), abs=1e-14)
        for name in ("seconds", "state_bytes_per_parameter", "update_density"):
            values = [getattr(run, name) for run in runs]
            found = row.statistics[name]
            assert found is not None
            assert found.mean == pytest.approx(statistics.fmean(values))
            assert found.sd == pytest.approx(statistics.stdev(values))


def test_one_seed_has_no_deviation():
    results = make_results(["sgd"], num_seeds=1)
    accuracy = row_of(results, "sgd").statistics["average_accuracy"]
    assert accuracy is not None
    assert math.isnan(accuracy.sd)
    assert re.search(r"\d\d\.\d ± -", in_terminal(results))


def test_a_diverged_seed_takes_the_numbers_of_its_method():
    results = make_results(["sgd", "adam", "ewc"], diverged={("adam", 1)})
    assert row_of(results, "adam").diverged == 1
    known = {k for k, v in row_of(results, "adam").statistics.items() if v is not None}
    assert known == {"state_bytes_per_parameter"}
    assert all(v is not None for v in row_of(results, "sgd").statistics.values())


# ---- tables ----------------------------------------------------------------------


def test_table_fits_120_columns_with_every_number_whole():
    # The widest numbers that can be, and a method's name that is too long.
    results = make_results([*METHODS, "online-ewc+classp-published+replay"])
    matrix = [[0.0] * 5] + [[1.0] * 5] * 4 + [[0.0] * 5]
    runs = [
        dataclasses.replace(
            run, matrix=matrix, seconds=1234.5, state_bytes_per_parameter=123.4
        )
        if run.method == "sgd" and run.seed
        else run
        for run in results.runs
    ]
    text = in_terminal(dataclasses.replace(results, runs=tuple(runs)))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for row in summary.rows(results):
        if row.method == "sgd":
            continue
        accuracy = row.statistics["average_accuracy"]
        assert accuracy is not None
        assert f"{100 * accuracy.mean:.1f} ± {100 * accuracy.sd:.1f}" in text
    assert "classp-published " in text
    for line in ("online-ewc+classp-", "published+replay"):
        assert line in text


def test_a_narrow_terminal_breaks_cells_but_no_number():
    results = make_results()
    narrow = in_terminal(results, width=80)
    assert max(map(len, narrow.splitlines())) <= 80

    def numbers(text):
        return sorted(re.findall(r"-?\d+\.\d+", text))

    assert numbers(narrow) == numbers(in_terminal(results))
    for method in METHODS:
        assert f"{method} " in narrow
    assert narrow.count(" yes\n") == sum(told for _, _, told in METHODS.values())


def test_table_says_diverged_instead_of_numbers():
    diverged = {("sgd", s) for s in range(3)} | {("adam", 0), ("adam", 2)}
    results = make_results(["sgd", "adam", "ewc"], diverged=diverged)
    lines = in_terminal(results).splitlines()
    (sgd,) = (line for line in lines if line.strip().startswith("sgd"))
    (adam,) = (line for line in lines if line.strip().startswith("adam"))
    # Four more metrics, seconds; bytes; density; told.
    assert sgd.split() == ["sgd", "diverged", *"-----", "0.0", "-", "no"]
    assert "2 of 3" in adam
    assert "±" not in adam
    assert "nan" not in in_terminal(results).lower()
    assert "| adam | 2 of 3 diverged | - | - |" in report.markdown(results)


def test_table_shows_undefined_metrics_as_dashes():
    text = in_terminal(make_results(["joint"]))
    (line,) = (x for x in text.splitlines() if x.strip().startswith("joint"))
    assert line.split()[4:8] == ["-", "-", "-", "-"]


def test_table_has_no_negative_zero():
    run = make_results(["sgd"], num_seeds=1).runs[0]
    matrix = [[0.1] * 5] + [[0.5] * 5] * 4 + [[0.5 - 1e-9] * 5]
    text = in_terminal(
        make_results(runs=(dataclasses.replace(run, matrix=matrix),), num_seeds=1)
    )
    assert "-0.0" not in text


def test_methods_with_different_numbers_of_seeds_say_so():
    results = make_results(["sgd", "adam"])
    text = in_terminal(dataclasses.replace(results, runs=results.runs[:-1]))
    assert "sgd (3 seeds)" in text
    assert "adam (2 seeds)" in text


def test_markup_in_names_stays_text(tmp_path):
    name = "[red]a_b|*$x$<b>`"
    results = make_results([name, "sgd"])
    assert name in in_terminal(results)
    (line,) = (
        line
        for line in report.markdown(results).splitlines()
        if line.startswith("| \\[red") and "±" in line
    )
    # As many cells as the table has columns.
    assert len(re.findall(r"(?<!\\)\|", line)) == 11
    report.write_report(results, tmp_path)
    axes = pictures.picture(results, "matrix.png").axes[0]
    assert axes.get_title(loc="left").replace(r"\$", "$") == name


# ---- Markdown --------------------------------------------------------------------


def test_markdown_tells_how_it_was_made():
    results = make_results()
    text = report.markdown(results, "classp-jax run --seeds 0 1 2")
    for part in (
        "```sh\nclassp-jax run --seeds 0 1 2\n```",
        "Device: CPU (2 cores)",
        "Date: 2024-05-16",
        "jax 0.10.2, optax 0.2.8",
        "Seeds: 0-2",
        "permuted, domain-incremental, 5 tasks, 3 seeds",
        "(accuracy.png)",
        "(matrix.png)",
        "(tradeoff.png)",
        "eps = 0.0001",
        '"stream": "permuted"',
    ):
        assert part in text
    for metric in METRICS.values():
        assert f"`{metric.formula}`" in text
    assert "```sh" not in report.markdown(results)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table[: len(METHODS) + 2]}) == 1
    for row in summary.rows(results):
        accuracy = row.statistics["average_accuracy"]
        assert accuracy is not None
        cell = f"{100 * accuracy.mean:.1f} ± {100 * accuracy.sd:.1f}"
        told = "yes" if row.told_boundary else "no"
        assert any(
            line.startswith(f"| {row.method} | {cell} |")
            and line.endswith(f" {told} |")
            for line in table
        )


# ---- pictures --------------------------------------------------------------------


def lines_of(axes):
    """A method's line as two arrays, steps and percent."""
    return {
        str(line.get_label()): np.asarray(line.get_xydata()).T
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"num_tasks": 10, "methods": ["sgd", "classp", "ewc", "joint"]},
        {"num_tasks": 1, "num_seeds": 1},
        {"num_tasks": 2, "methods": ["sgd"]},
        {"num_tasks": 30, "methods": ["sgd"], "num_seeds": 2},
        {"methods": ["sgd", "adam"], "diverged": {("sgd", 0)}},
        {"methods": ["sgd"], "diverged": {("sgd", s) for s in range(3)}},
    ],
)
def test_write_report(tmp_path, kind):
    results = make_results(**kind)
    before = dict(matplotlib.rcParams)
    report.write_report(results, tmp_path / "new" / "folder", command="classp-jax run")
    assert dict(matplotlib.rcParams) == before
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["accuracy.png", "matrix.png", "report.md", "tradeoff.png"]
    for name in ("accuracy.png", "matrix.png", "tradeoff.png"):
        with Image.open(tmp_path / "new" / "folder" / name) as image:
            assert image.format == "PNG"
            width, height = image.size
            assert width <= 1500
            assert height <= 4000
            # Something is drawn, on a white ground.
            pixels = np.asarray(image.convert("RGB"))
            assert tuple(pixels[0, 0]) == (255, 255, 255)
            assert np.ptp(pixels) > 100


def test_no_runs_are_no_report(tmp_path):
    with pytest.raises(ValueError, match="no finished runs"):
        report.write_report(make_results(runs=()), tmp_path)


def test_pictures_are_the_same_bytes_again(tmp_path):
    for folder in ("a", "b"):
        report.write_report(make_results(["sgd"], num_tasks=2), tmp_path / folder)
    for name in ("accuracy.png", "matrix.png", "tradeoff.png", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (
            tmp_path / "b" / name
        ).read_bytes()


def test_accuracy_picture_draws_the_means_of_every_task():
    results = make_results(["sgd", "classp"])
    top, *panels = pictures.picture(results, "accuracy.png").axes
    assert len([panel for panel in panels if panel.axison]) == 5
    for method in ("sgd", "classp"):
        curves = [run.curve for run in results.runs if run.method == method]
        mean = 100 * np.mean(curves, axis=0)
        for task in range(5):
            steps, values = lines_of(panels[task])[method]
            np.testing.assert_array_equal(steps, np.arange(0, 301, 10))
            np.testing.assert_allclose(values, mean[:, task])
        # The tasks seen: one at steps 1 to 60, two at 61 to 120, and so on.
        average = dict(lines_of(top)[method].T.tolist())
        assert 0 not in average
        assert average[60] == pytest.approx(mean[6, :1].mean())
        assert average[70] == pytest.approx(mean[7, :2].mean())
        assert average[300] == pytest.approx(mean[30].mean())


def test_accuracy_picture_uses_the_steps_that_all_seeds_have():
    results = make_results(["sgd"], num_seeds=2)
    first, second = results.runs
    shorter = dataclasses.replace(
        second, curve_steps=second.curve_steps[::2], curve=second.curve[::2]
    )
    figure = pictures.picture(
        dataclasses.replace(results, runs=(first, shorter)), "accuracy.png"
    )
    steps, values = lines_of(figure.axes[1])["sgd"]
    np.testing.assert_array_equal(steps, np.arange(0, 301, 20))
    expected = 50 * (np.asarray(first.curve)[::2, 0] + np.asarray(shorter.curve)[:, 0])
    np.testing.assert_allclose(values, expected)


def test_pictures_leave_out_methods_with_a_diverged_seed():
    results = make_results(["sgd", "adam", "ewc"], diverged={("adam", 2)})
    accuracy = pictures.picture(results, "accuracy.png")
    assert set(lines_of(accuracy.axes[1])) == {"sgd", "ewc"}
    titles = {
        axes.get_title(loc="left")
        for axes in pictures.picture(results, "matrix.png").axes
    }
    assert "adam" not in titles
    tradeoff = pictures.picture(results, "tradeoff.png")
    assert {text.get_text() for text in tradeoff.axes[0].texts} - {""} == {"sgd", "ewc"}
    note = "Not drawn because diverged: adam (1 of 3 seeds)"
    assert note in tradeoff.axes[0].get_xlabel()


def test_axes_are_named_with_units():
    results = make_results(["sgd", "ewc"])
    top = pictures.picture(results, "accuracy.png").axes[0]
    assert top.get_xlabel() == "training step (batches)"
    assert top.get_ylabel() == "test accuracy (%)"
    tradeoff = pictures.picture(results, "tradeoff.png").axes[0]
    assert "bytes per parameter" in tradeoff.get_xlabel()
    assert "(%)" in tradeoff.get_ylabel()


@pytest.mark.parametrize("num_tasks", [5, 10])
def test_matrix_picture_shows_the_mean_matrix_with_numbers(num_tasks):
    results = make_results(["sgd", "joint"], num_tasks=num_tasks)
    panels = pictures.picture(results, "matrix.png").axes
    for panel, method in zip(panels, ["sgd", "joint"], strict=False):
        matrices = [run.matrix for run in results.runs if run.method == method]
        R = 100 * np.mean(matrices, axis=0)
        shown = np.ma.MaskedArray(panel.images[0].get_array()).filled(np.nan)
        np.testing.assert_allclose(shown, R)
        texts = {t.get_position(): t.get_text() for t in panel.texts}
        assert len(texts) == np.isfinite(R).sum()
        assert texts[0, num_tasks] == f"{R[num_tasks, 0]:.0f}"


def overlaps(boxes):
    return [
        (a, b)
        for (a, first), (b, second) in itertools.combinations(boxes.items(), 2)
        if first.overlaps(second)
    ]


def boxes_of(figure, axes):
    figure.draw_without_rendering()
    return {
        text.get_text(): text.get_window_extent()
        for text in axes.texts
        if text.get_text()
    }


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.01])
def test_names_in_the_tradeoff_picture_do_not_overlap(spread):
    # All methods at two places, ever closer to each other.
    runs = [
        dataclasses.replace(
            run,
            state_bytes_per_parameter=4.0 if run.told_boundary else 8.0,
            matrix=(spread * (np.asarray(run.matrix) - 0.5) + 0.5).tolist(),
        )
        for run in make_results().runs
    ]
    figure = pictures.picture(make_results(runs=tuple(runs)), "tradeoff.png")
    axes = figure.axes[0]
    boxes = boxes_of(figure, axes)
    assert set(boxes) == set(METHODS)
    assert overlaps(boxes) == []
    frame = figure.bbox
    for box in boxes.values():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
    # Nor does a name hide a mark.
    for line in axes.get_lines():
        if line.get_marker() in {style.marker for style in look().values()}:
            data = np.column_stack([line.get_xdata(), line.get_ydata()])
            for x, y in axes.transData.transform(data):
                assert not any(box.contains(x, y) for box in boxes.values())


@pytest.mark.parametrize("own", [0, 9])
def test_names_beside_the_curves_do_not_overlap(own):
    methods = [*METHODS, *(f"own-{k}" for k in range(own))]
    figure = pictures.picture(make_results(methods), "accuracy.png")
    boxes = boxes_of(figure, figure.axes[0])
    assert set(boxes) == set(methods)
    assert overlaps(boxes) == []
    # They stand in the order in which the curves end.
    ends = {m: line[1, -1] for m, line in lines_of(figure.axes[0]).items()}
    assert sorted(boxes, key=lambda m: boxes[m].y0) == sorted(
        boxes, key=ends.__getitem__
    )


# ---- colours ---------------------------------------------------------------------


def look():
    return pictures.styles(list(METHODS))


def test_every_method_has_its_own_look_in_every_picture():
    assert len({(s.color, s.line) for s in look().values()}) == len(METHODS)
    assert len({s.marker for s in look().values()}) == len(METHODS)
    # A method's look depends neither on who else is there nor on the picture.
    for method, style in look().items():
        results = make_results(["own", method], num_tasks=2, num_seeds=1)
        assert pictures.styles(["own", method])[method] == style
        accuracy = pictures.picture(results, "accuracy.png")
        for axes in accuracy.axes[:2]:
            (line,) = (x for x in axes.get_lines() if x.get_label() == method)
            assert (line.get_color(), line.get_linestyle()) == style[:2]
        tradeoff = pictures.picture(results, "tradeoff.png").axes[0]
        assert (style.color, style.marker) in {
            (line.get_color(), line.get_marker()) for line in tradeoff.get_lines()
        }


def test_unknown_methods_get_looks_that_are_free():
    methods = [*METHODS, *(f"own-{k}" for k in range(10))]
    chosen = pictures.styles(methods)
    assert len({(s.color, s.line) for s in chosen.values()}) == len(methods)
    assert len(pictures.styles([f"own-{k}" for k in range(50)])) == 50


# Machado, Oliveira & Fernandes 2009, severity 1: what linear RGB becomes.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(color, deficiency):
    rgb = np.asarray(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(deficiency) @ linear, 0, 1)
    xyz = (
        np.array(
            [
                [0.4124564, 0.3575761, 0.1804375],
                [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041],
            ]
        )
        @ linear
        / [0.95047, 1.0, 1.08883]
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_lines_are_told_apart_with_every_kind_of_sight(deficiency):
    matrix = DEFICIENCIES[deficiency]
    white = lab("white", matrix)
    for style in look().values():
        assert np.linalg.norm(lab(style.color, matrix) - white) > 25
    for (a, first), (b, second) in itertools.combinations(look().items(), 2):
        if first.line == second.line:
            # About 2.3 is the least difference that is seen at all.
            distance = lab(first.color, matrix) - lab(second.color, matrix)
            assert np.linalg.norm(distance) > 15, (a, b)
