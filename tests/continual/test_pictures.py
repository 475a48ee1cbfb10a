"""The pictures: what they show, that nothing is cut off or covered, their files."""

import dataclasses
import errno
import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from classp_jax.continual.report import pictures, write_report
from classp_jax.continual.report.styles import styles
from classp_jax.continual.results import ResultsError
from classp_jax.continual.results import files as files_module
from tests.continual.fakes import make_results, make_run

METHODS = (
    "sgd",
    "adam",
    "adagrad",
    "classp",
    "classp-published",
    "ewc",
    "online-ewc",
    "si",
    "ewc+classp",
    "replay",
    "joint",
)


def several(methods=("sgd", "classp"), seeds=2, **changes):
    return make_results(
        *(make_run(m, seed, **changes) for m in methods for seed in range(seeds))
    )


def lines_of(axes):
    """By label, each method's points [points, 2]."""
    return {
        line.get_label(): np.asarray(line.get_xydata())
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


# ---- curves ----------------------------------------------------------------------


def test_curves_are_the_means_over_seeds():
    results = several(unseen=True)
    top, *panels = results.accuracy_picture().axes
    for method in ("sgd", "classp"):
        curves = [run.curve for run in results.runs if run.method == method]
        mean = 100 * np.mean(curves, axis=0)
        for task in range(3):
            x, y = lines_of(panels[task])[method].T
            np.testing.assert_allclose(x, np.arange(7) / 2)
            np.testing.assert_allclose(y, mean[:, task])
        # One task is seen up to its end, then two, then three.
        x, y = lines_of(top)[method].T
        np.testing.assert_allclose(x, [1, 1.5, 2, 2.5, 3])
        seen = [1, 2, 2, 3, 3]
        np.testing.assert_allclose(
            y, [mean[2 + i, :count].mean() for i, count in enumerate(seen)]
        )


def test_tasks_not_seen_yet_are_not_drawn():
    top, *panels = several().accuracy_picture().axes
    assert [lines_of(panel)["sgd"][0, 0] for panel in panels] == [0.5, 1.5, 2.5]
    assert np.isfinite(lines_of(top)["sgd"]).all()


def test_seeds_with_other_numbers_of_steps_stand_together():
    # No step of one seed is a step of the other, as where each draws its classes.
    long = make_run("sgd", 0, steps_per_task=np.array([40, 60, 80]), unseen=True)
    short = make_run("sgd", 1, steps_per_task=np.array([14, 8, 22]), unseen=True)
    assert set(long.curve_steps) & set(short.curve_steps) == {0}
    top, *panels = make_results(long, short).accuracy_picture().axes
    assert len(lines_of(top)["sgd"]) == 5
    expected = 50 * (np.asarray(long.curve) + np.asarray(short.curve))
    for task in range(3):
        x, y = lines_of(panels[task])["sgd"].T
        np.testing.assert_allclose(x, np.arange(7) / 2)
        np.testing.assert_allclose(y, expected[:, task])


def test_other_points_are_interpolated():
    fine = make_run(num_tasks=2, curve_steps=[0, 20, 40, 60, 80], curve=[[0.1] * 2] * 5)
    coarse = make_run(
        seed=1,
        num_tasks=2,
        curve_steps=[0, 40, 80],
        curve=[[0.2, 0.2], [0.6, 0.6], [0.8, 0.8]],
    )
    top, first, _ = make_results(fine, coarse).accuracy_picture().axes
    expected = [[0.0, 15.0], [0.5, 25.0], [1.0, 35.0], [1.5, 40.0], [2.0, 45.0]]
    np.testing.assert_allclose(lines_of(first)["sgd"], expected)
    np.testing.assert_allclose(lines_of(top)["sgd"], expected[2:])


def test_a_run_without_a_curve_has_the_rows_of_its_matrix():
    run = make_run(curve=[], curve_steps=[])
    panel = make_results(run).accuracy_picture().axes[1]
    expected = [[i, 100 * run.matrix[i][0]] for i in (1, 2, 3)]
    np.testing.assert_allclose(lines_of(panel)["sgd"], expected)


@pytest.mark.parametrize(("num_tasks", "panels"), [(1, 0), (2, 2), (5, 5), (100, 12)])
def test_many_tasks_have_few_panels_and_no_wall_of_lines(num_tasks, panels):
    results = several(num_tasks=num_tasks, seeds=1)
    _, *small = [axes for axes in results.accuracy_picture().axes if axes.axison]
    assert len(small) == panels
    for panel in small:
        # Methods, and at most a line per boundary of ten tasks.
        assert len(panel.get_lines()) <= 2 + 9


@pytest.mark.parametrize("level", [0.03, 0.5, 0.97])
def test_axes_hold_all_of_every_curve_and_band(level):
    figure = several(seeds=3, level=level).accuracy_picture()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        bands = [
            path.vertices
            for band in axes.collections
            if isinstance(band, FillBetweenPolyCollection)
            for path in band.get_paths()
        ]
        assert bands or not axes.axison
        for points in [*lines_of(axes).values(), *bands]:
            assert low <= points[:, 1].min()
            assert points[:, 1].max() <= high


def test_curves_are_named_in_the_order_in_which_they_end():
    levels = {"sgd": 0.5, "adam": 0.9, "classp": 0.7}
    results = make_results(*(make_run(m, level=v) for m, v in levels.items()))
    legend = results.accuracy_picture().axes[0].get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["adam", "classp", "sgd"]


# ---- matrices --------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [3, 10, 20])
def test_matrix_picture_shows_the_mean_matrix_with_numbers(num_tasks):
    results = several(num_tasks=num_tasks, unseen=True)
    panels = results.matrix_picture().axes
    for panel, method in zip(panels, ["sgd", "classp"], strict=False):
        matrices = [run.matrix for run in results.runs if run.method == method]
        R = 100 * np.mean(matrices, axis=0)
        shown = np.ma.MaskedArray(panel.images[0].get_array()).filled(np.nan)
        np.testing.assert_allclose(shown, R)
        texts = {t.get_position(): t.get_text() for t in panel.texts}
        assert len(texts) == (R.size if num_tasks <= 12 else 0)
        if texts:
            assert texts[0, num_tasks] == f"{R[num_tasks, 0]:.0f}"
        assert panel.get_ylim() == (num_tasks + 0.5, -0.5)


def test_the_row_before_training_is_left_out_where_it_is_empty():
    panel = several().matrix_picture().axes[0]
    assert panel.get_ylim() == (3.5, 0.5)


# ---- trade-off -------------------------------------------------------------------


def text_boxes(figure, axes):
    figure.draw_without_rendering()
    return {t.get_text(): t.get_window_extent() for t in axes.texts if t.get_text()}


@pytest.mark.parametrize("spread", [0.4, 0.15])
def test_names_cover_neither_each_other_nor_marks(spread):
    # Ten methods at three places of the x axis, the closer the harder, and one far off.
    runs = []
    for i, method in enumerate(METHODS):
        value = 0.9 - spread * ((7 * i) % 11) / 11 if i else 0.4
        for seed in range(2):
            matrix = [[0.1], [value + 0.002 * seed]]
            run = make_run(method, seed, 1, matrix=matrix)
            bytes_ = (4.0, 8.0, 12.0)[i % 3]
            runs.append(dataclasses.replace(run, state_bytes_per_parameter=bytes_))
    figure = make_results(*runs).tradeoff_picture()
    axes = figure.axes[0]
    boxes = text_boxes(figure, axes)
    assert set(boxes) == set(METHODS)
    overlaps = [
        (a, b)
        for (a, first), (b, second) in itertools.combinations(boxes.items(), 2)
        if first.overlaps(second)
    ]
    assert overlaps == []
    frame = figure.bbox
    marks = {style.marker for style in styles(METHODS).values()}
    for name, box in boxes.items():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, name
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, name
        for line in axes.get_lines():
            if line.get_marker() in marks:
                ((x, y),) = axes.transData.transform(line.get_xydata())
                assert not box.contains(x, y), name


@pytest.mark.parametrize("bytes_per_parameter", [0.0, 4.0, 24.0, 500.0])
def test_the_size_axis_holds_every_mark(bytes_per_parameter):
    results = several(state_bytes_per_parameter=bytes_per_parameter)
    axes = results.tradeoff_picture().axes[0]
    low, high = axes.get_xlim()
    assert low < bytes_per_parameter < high
    assert axes.get_xlabel() == "optimizer and method state (bytes per parameter)"


# ---- all of them -----------------------------------------------------------------


def test_diverged_methods_are_left_out_and_named():
    results = several(["sgd", "ewc"]).add(several(["adam"], diverged=True))
    accuracy = results.accuracy_picture()
    assert set(lines_of(accuracy.axes[1])) == {"sgd", "ewc"}
    titles = {a.get_title(loc="left") for a in results.matrix_picture().axes}
    assert titles - {""} == {"sgd", "ewc"}
    tradeoff = results.tradeoff_picture()
    assert {text.get_text() for text in tradeoff.axes[0].texts} - {""} == {"sgd", "ewc"}
    note = "Not drawn because diverged: adam (2 of 2 seeds)"
    assert note in tradeoff.axes[0].get_xlabel()


def test_everything_diverged_and_one_method_once_still_draw():
    for name in pictures.PICTURES:
        results = several(seeds=1, num_tasks=1, diverged=True)
        pictures.picture(results, name).draw_without_rendering()
    joint = make_run("joint", curve_steps=[120], curve=[[0.9] * 3])
    figure = make_results(joint).accuracy_picture()
    assert len(lines_of(figure.axes[0])["joint"]) == 1


def test_files_are_the_same_bytes_again():
    before = dict(matplotlib.rcParams)
    results = several(["sgd"], seeds=1, num_tasks=1)
    files = dict(pictures.picture_files(results))
    assert dict(pictures.picture_files(results)) == files
    assert dict(matplotlib.rcParams) == before
    assert len(files) == 9
    for name, content in files.items():
        if name.endswith(".png"):
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.asarray(image.convert("RGB"))
            assert pixels.shape[1] <= 1500
            assert tuple(pixels[0, 0]) == (255, 255, 255)
            assert np.ptp(pixels) > 100
        else:
            assert content.startswith(b"%PDF" if name.endswith("pdf") else b"<?xml")


def test_a_full_disk_while_drawing_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", fail)
    with pytest.raises(ResultsError) as error:
        write_report(several(seeds=1, num_tasks=1), tmp_path)
    path = tmp_path / "report.md"
    assert str(error.value) == f"Cannot write {path}: No space left on device."


def test_an_unknown_picture_is_refused():
    with pytest.raises(ResultsError, match="accuracy, matrix, tradeoff, got 'x'"):
        pictures.picture(several(), "x")


# ---- colours ---------------------------------------------------------------------


def look():
    return styles(METHODS)


def test_every_method_has_its_own_look():
    assert len({(s.color, s.line) for s in look().values()}) == len(METHODS)
    assert len({s.marker for s in look().values()}) == len(METHODS)
    for method, style in look().items():
        assert styles(["own", method])[method] == style


def test_unknown_methods_get_looks_that_are_free():
    methods = [*METHODS, *(f"own-{k}" for k in range(10))]
    chosen = styles(methods)
    assert len({(s.color, s.line) for s in chosen.values()}) == len(methods)
    assert len(styles([f"own-{k}" for k in range(50)])) == 50


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
