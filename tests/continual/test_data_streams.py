"""Streams: the tasks hold what they should, nothing leaks, and seeds share arrays."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classp_jax.continual.data.arrays import Split, Stream, Task
from classp_jax.continual.data.maker import SCENARIOS
from classp_jax.continual.data.readers import read_source
from classp_jax.continual.data.streams import (
    STREAMS,
    StreamMaker,
    make_stream,
    permuted,
    rotated,
    sequence,
    split,
    stream,
)
from classp_jax.continual.errors import DataError

DIGITS = functools.cache(lambda: read_source("digits"))


def splits(task: Task) -> list[Split]:
    return [task.train, task.validation, task.test]


def keys(part: Split) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in part.inputs()]


def assert_same(a: Stream, b: Stream) -> None:
    assert a._replace(tasks=()) == b._replace(tasks=())
    for task, other in zip(a.tasks, b.tasks, strict=True):
        assert task.name == other.name
        np.testing.assert_array_equal(task.classes, other.classes)
        for part, same in zip(splits(task), splits(other), strict=True):
            np.testing.assert_array_equal(part.inputs(), same.inputs())
            np.testing.assert_array_equal(part.labels(), same.labels())


def refused(match: str, make: Any, *args: Any, seed: Any = 0, **kwargs: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        make(*args, **kwargs)(seed)
    assert len(str(caught.value).splitlines()) == 1


def numbered(classes: int, each: int = 10, side: int = 4, channels: int = 1) -> Any:
    """Images whose pixels are numbered and whose last pixel is the true class."""
    pixels = side * side * channels
    x = np.tile(np.arange(pixels, dtype=np.uint8), (classes * each, 1))
    y = np.arange(classes * each) % classes
    x[:, -1] = y
    x = x.reshape(-1, side, side, channels)
    return x, y, x, y


def text_file(folder: pathlib.Path, *rows: tuple[str, str], name: str = "b") -> str:
    path = folder / f"{name}.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    return f"tsv:{path}"


# All streams.


@pytest.mark.parametrize("name", [*STREAMS])
@pytest.mark.parametrize("max_train", [None, 50])
def test_parts_and_dtypes(name, max_train):
    drawn = make_stream(name, ["digits"], max_train=max_train)(0)
    assert (drawn.name, drawn.kind, drawn.vocabulary_size) == (name, "image", 0)
    assert drawn.scenario == "domain-incremental"
    assert len({task.name for task in drawn.tasks}) == (1 if name == "sequence" else 5)
    for task in drawn.tasks:
        assert task.classes.dtype == bool
        assert task.classes.tolist() == [True] * drawn.num_classes
        for part in splits(task):
            assert part.inputs().dtype == np.uint8
            assert part.inputs().shape == (len(part), 8, 8, 1)
            assert part.labels().dtype == np.int32
            assert part.indices().dtype == np.int32
            assert (np.diff(part.indices()) > 0).all()
            assert 0 <= part.labels().min() <= part.labels().max() < drawn.num_classes
        # All 1,797 digits differ: none is in two parts.
        images = [set(keys(part)) for part in splits(task)]
        assert len(set.union(*images)) == sum(len(part) for part in splits(task))
        if max_train:
            assert len(task.train) == max_train


@pytest.mark.parametrize("name", [*STREAMS])
def test_a_stream_depends_on_its_seed_alone(name):
    maker = make_stream(name, ["digits"], max_train=70)
    alone, wide = maker(3), 2**70
    maker(4)
    assert_same(alone, maker(3))
    assert_same(alone, make_stream(name, ["digits"], max_train=70)(3))
    assert_same(maker(wide), maker(wide))
    for other in (4, wide, 3 + 2**64):
        with pytest.raises(AssertionError):
            assert_same(alone, maker(other))
    for part, same in zip(alone.tasks, maker(4).tasks, strict=True):
        if name in ("rotated", "sequence"):
            assert keys(part.test) == keys(same.test)
            assert set(keys(part.validation)) != set(keys(same.validation))


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda: permuted("digits", tasks=10), 1),
        (lambda: split("digits", scenario="class-incremental"), 1),
        (lambda: split("digits"), 1),
        (lambda: sequence(["digits"] * 4), 1),
        (lambda: rotated("digits", tasks=4), 4),
    ],
)
def test_tasks_parts_and_seeds_share_one_copy(make, copies):
    maker: StreamMaker = make()
    tasks = [task for seed in range(10) for task in maker(seed).tasks]
    assert len({id(part.x) for task in tasks for part in splits(task)}) == copies
    # Of its own a part has rows, and a task the order of its pixels.
    owned = {
        id(array): array.nbytes
        for task in tasks
        for part in splits(task)
        for array in (part.rows, part.pixels)
        if array is not None
    }
    assert sum(owned.values()) < len(tasks) * 4 * (1797 + 64 + 1)


def test_max_train_chooses_anew_for_every_task_among_the_training_examples():
    unlimited = sequence(["digits"] * 3)(0)
    limited = sequence(["digits"] * 3, max_train=60)(0)
    chosen = [set(keys(task.train)) for task in limited.tasks]
    assert [len(images) for images in chosen] == [60] * 3
    assert len(chosen[0] & chosen[1]) < 30
    for task, whole, images in zip(limited.tasks, unlimited.tasks, chosen, strict=True):
        assert images <= set(keys(whole.train))
        assert keys(task.validation) == keys(whole.validation)
        assert keys(task.test) == keys(whole.test)
    assert_same(unlimited, sequence(["digits"] * 3, max_train=1295)(0))


@pytest.mark.parametrize("name", [*STREAMS])
def test_without_validation_a_stream_is_the_same_but_for_that_part(name):
    drawn = make_stream(name, ["digits"], tasks=2, validation_fraction=0)(0)
    usual = make_stream(name, ["digits"], tasks=2)(0)
    for task, other in zip(drawn.tasks, usual.tasks, strict=True):
        assert len(task.validation) == 0
        assert task.validation.inputs().shape == (0, 8, 8, 1)
        assert len(task.train) == len(other.train) + len(other.validation)
        np.testing.assert_array_equal(task.test.inputs(), other.test.inputs())


def test_the_configuration_is_plain_json():
    options: Any = {"tasks": np.int64(3), "max_train": np.int32(9)}
    maker = split(numbered(6), **options)
    assert json.loads(json.dumps(maker.configuration)) == {
        "stream": "split",
        "source": ["arrays"],
        "tasks": 3,
        "scenario": "domain-incremental",
        "max_train": 9,
        "validation_fraction": 0.1,
    }


def test_the_fingerprint_follows_the_content(tmp_path):
    x, y = np.random.default_rng(0).random((40, 5), np.float32), np.arange(40) % 4
    names = []
    for name in ("one", "two"):
        np.savez(tmp_path / name, x_train=x, y_train=y, x_test=x, y_test=y)
        names.append(f"npz:{tmp_path / name}.npz")
    fingerprint = permuted(names[0]).fingerprint
    assert len(fingerprint) == 16
    assert permuted(names[1], tasks=3).fingerprint == fingerprint
    assert permuted((x, y, x.copy(), y.tolist())).fingerprint == fingerprint
    changed = x.copy()
    changed[39, 4] += 1
    different = [
        permuted((changed, y, x, y)),
        permuted((x, y, changed, y)),
        permuted((x, np.roll(y, 1), x, y)),
        permuted((x, y)),
        permuted((x.reshape(40, 5, 1), y, x.reshape(40, 5, 1), y)),
        sequence([names[0], names[0]]),
    ]
    found = {maker.fingerprint for maker in different}
    assert len(found - {fingerprint}) == len(different)


def test_the_fingerprint_of_texts_tells_words_and_labels(tmp_path):
    rows = [("ab"[i % 2], f"text {i}") for i in range(20)]
    makers = [
        sequence(text_file(tmp_path, *rows, name=name))
        for name, rows in {
            "one": rows,
            "same": rows,
            "word": [*rows[:-1], ("b", "text nineteen")],
            "label": [*rows[:-1], ("a", "text 19")],
            "name": [("ac"[label == "b"], text) for label, text in rows],
        }.items()
    ]
    first, same, *others = [maker.fingerprint for maker in makers]
    assert first == same
    assert len({first, *others}) == 4


def test_what_was_read_is_described(tmp_path):
    rows = [("yn"[i % 2], f"text {i}") for i in range(30)]
    described = sequence(text_file(tmp_path, *rows), vocabulary_size=10).describe()
    assert described.splitlines()[0] == (
        "sequence: 1 task, domain-incremental, 2 outputs, 10 tokens"
    )
    assert "30 texts (6 for testing), int32 [30], 2 classes: n, y" in described
    x, y = np.zeros((30, 7)), np.arange(30) % 3
    many = stream([(x, y)] * 5).describe()
    assert many.splitlines()[1] == (
        "arrays, task 1: 30 vectors (6 for testing), float32 [7], 3 classes: 0, 1, 2;"
        " and 4 more"
    )


# Permuted.


def orders(drawn: Stream) -> list[np.ndarray]:
    """The order of the pixels in every task, seen in images that number them."""
    found = []
    for task in drawn.tasks:
        images = np.concatenate([part.inputs() for part in splits(task)])
        assert (images == images[0]).all()
        found.append(images[0])
    return found


def blank_numbered(side: int, channels: int = 1) -> Any:
    pixels = np.arange(side * side * channels, dtype=np.uint8)
    x = np.tile(pixels, (20, 1)).reshape(20, side, side, channels)
    y = np.arange(20) % 2
    return x, y, x, y


@given(side=st.integers(2, 15), tasks=st.integers(1, 6), seed=st.integers(0, 2**70))
@settings(deadline=None, max_examples=30)
def test_permutations_are_bijections(side, tasks, seed):
    found = orders(permuted(blank_numbered(side), tasks=tasks)(seed))
    assert len(found) == tasks
    np.testing.assert_array_equal(found[0].ravel(), np.arange(side**2))
    for order in found:
        assert sorted(order.ravel()) == list(range(side**2))
    if side > 4:
        assert len({order.tobytes() for order in found}) == tasks


def test_a_permutation_depends_on_the_seed_and_the_task_alone():
    source = blank_numbered(8)
    few = orders(permuted(source, tasks=3, max_train=2)(5))
    many = orders(permuted(source, tasks=6)(5))
    other = orders(permuted(source, tasks=3)(6))
    for a, b, c in zip(few, many, other, strict=False):
        np.testing.assert_array_equal(a, b)
        assert (a == c).all() == (a is few[0])


def test_a_permutation_moves_whole_pixels():
    moved = orders(permuted(blank_numbered(6, channels=3), tasks=2)(0))[1]
    moved = moved.reshape(36, 3)
    np.testing.assert_array_equal(moved % 3, np.tile([0, 1, 2], (36, 1)))
    np.testing.assert_array_equal(moved // 3, np.repeat(moved[:, :1] // 3, 3, axis=1))
    assert sorted(moved[:, 0] // 3) == list(range(36))


def test_the_features_of_vectors_are_permuted_too():
    x, y = np.tile(np.arange(30.0), (20, 1)), np.arange(20) % 2
    drawn = permuted((x, y, x, y), tasks=2)(0)
    assert drawn.kind == "vector"
    straight, moved = orders(drawn)
    np.testing.assert_array_equal(straight, np.arange(30))
    assert sorted(moved) == list(range(30))
    assert (moved != straight).any()


# Rotated.


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """One image [h, w] turned counter-clockwise, in float64, pixel by pixel."""
    h, w = image.shape
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    result = np.zeros((h, w))
    for r in range(h):
        for c in range(w):
            # Where the pixel comes from: turned back about the centre.
            y, x = r - (h - 1) / 2, c - (w - 1) / 2
            y, x = cos * y + sin * x + (h - 1) / 2, -sin * y + cos * x + (w - 1) / 2
            if not (0 <= y <= h - 1 and 0 <= x <= w - 1):
                continue
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            v, u = y - top, x - left
            corner = image[top : top + 2, left : left + 2].astype(np.float64)
            result[r, c] = np.array([1 - v, v]) @ corner @ np.array([1 - u, u])
    return result


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rotations_are_bilinear_by_equal_angles(dtype):
    x = np.random.default_rng(0).integers(0, 256, (20, 7, 9, 2)).astype(dtype)
    y = np.arange(20) % 2
    drawn = rotated((x, y, x, y), tasks=4)(0)
    assert [task.name for task in drawn.tasks] == ["0°", "45°", "90°", "135°"]
    for task, degrees in zip(drawn.tasks, (0, 45, 90, 135), strict=True):
        found = task.test.inputs()
        assert found.dtype == dtype
        for channel in range(2):
            expected = turned(x[3, :, :, channel], degrees)
            # A byte is rounded to the nearest.
            atol = 0.5 + 1e-6 if dtype == np.uint8 else 1e-3
            np.testing.assert_allclose(
                found[3, :, :, channel], expected, rtol=0, atol=atol
            )


def test_a_rotation_by_0_is_the_identity_and_by_90_a_quarter_turn():
    straight, quarter = rotated("digits", tasks=2)(0).tasks
    for part, original in zip(splits(quarter), splits(straight), strict=True):
        # numpy turns counter-clockwise as an image is shown, rows downwards.
        np.testing.assert_array_equal(
            part.inputs(), np.rot90(original.inputs(), axes=(1, 2))
        )
        np.testing.assert_array_equal(part.labels(), original.labels())
    np.testing.assert_array_equal(straight.test.inputs(), DIGITS().test.inputs())


# Split.


@given(classes=st.integers(2, 12), tasks=st.integers(1, 12), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("scenario", [*SCENARIOS])
def test_split_divides_the_classes(scenario, classes, tasks, seed):
    source = numbered(classes)
    smallest = 1 if scenario == "class-incremental" else 2
    options = {"tasks": tasks, "scenario": scenario}
    if tasks * smallest > classes:
        refused(f"{tasks} {scenario} tasks need at", split, source, **options)
        return
    drawn = split(source, **options)(seed)
    groups = [np.unique(task.train.inputs()[:, -1, -1, 0]) for task in drawn.tasks]
    assert sorted(np.concatenate(groups)) == list(range(classes))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    outputs = max(sizes) if scenario == "domain-incremental" else classes
    assert drawn.num_classes == outputs
    assert len({task.name for task in drawn.tasks}) == tasks
    for task, group in zip(drawn.tasks, groups, strict=True):
        assert task.name.startswith(str(group[0]))
        may_win = group if scenario == "task-incremental" else range(outputs)
        np.testing.assert_array_equal(np.flatnonzero(task.classes), may_win)
        for part in splits(task):
            true = part.inputs()[:, -1, -1, 0]
            if scenario == "domain-incremental":
                true = np.searchsorted(group, true)
            np.testing.assert_array_equal(part.labels(), true)
        assert len(task.test) == 10 * len(group)
        assert len(task.train) + len(task.validation) == 10 * len(group)


def test_split_digits_hold_every_example_once():
    drawn = split("digits", scenario="class-incremental")(1)
    whole = sequence("digits")(1).tasks[0]
    for part, original in enumerate(splits(whole)):
        found = [
            pair
            for task in drawn.tasks
            for pair in zip(
                keys(splits(task)[part]),
                splits(task)[part].labels().tolist(),
                strict=True,
            )
        ]
        expected = zip(keys(original), original.labels().tolist(), strict=True)
        assert Counter(found) == Counter(expected)


def test_the_order_of_the_classes_comes_from_the_seed():
    maker = split("digits")
    orders = {tuple(task.name for task in maker(seed).tasks) for seed in range(10)}
    assert len(orders) == 10


def test_groups_of_many_classes_have_short_names():
    names = [task.name for task in split(numbered(8), tasks=2)(0).tasks]
    assert all(name.endswith("and 3 more") for name in names)
    assert len(set(names)) == 2


def test_a_class_with_a_single_example_stays_in_training():
    x, y, *_ = numbered(3)
    y = np.where(y == 2, np.where(np.arange(30) == 2, 2, 0), y)
    task = sequence([(x, y)])(0).tasks[0]
    assert [np.sum(part.labels() == 2) for part in splits(task)] == [1, 0, 0]
    refused(
        "validation part: is empty",
        split,
        (x, y),
        scenario="class-incremental",
        tasks=3,
    )


# Sequence.


def test_a_sequence_has_one_task_for_each_source_and_one_head():
    drawn = sequence([numbered(3, side=8), "digits", "digits", numbered(3, side=8)])(0)
    names = ["arrays", "digits", "digits (2)", "arrays (2)"]
    assert [task.name for task in drawn.tasks] == names
    assert drawn.num_classes == 10
    for task in drawn.tasks:
        assert task.classes.tolist() == [True] * 10
    first, again = drawn.tasks[1:3]
    # Coming back to an old task: what it was validated on is not trained on now.
    for part, same in zip(splits(first), splits(again), strict=True):
        assert part.x is same.x
        np.testing.assert_array_equal(part.indices(), same.indices())


def test_words_are_numbered_by_frequency_then_alphabet(tmp_path):
    rows = [
        ("no", "The cat; the DOG."),
        ("yes", "a dog (the_best) isn't 42"),
        ("yes", "dog ant"),
        ("no", "..."),
    ]
    rows += [("no", "zebra zebra zebra zebra w0")]
    name = text_file(tmp_path, *rows)
    maker = sequence(name, text_length=6, validation_fraction=0)
    source = read_source(name)
    task = maker(0).tasks[0]
    counts = Counter()
    words = {
        "The cat; the DOG.": ["the", "cat", "the", "dog"],
        "a dog (the_best) isn't 42": ["a", "dog", "the_best", "isn't", "42"],
        "dog ant": ["dog", "ant"],
        "...": [],
        "zebra zebra zebra zebra w0": ["zebra", "zebra", "zebra", "zebra", "w0"],
    }
    for text in source.train.inputs():
        counts.update(words[text])
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    assert maker.vocabulary_size == len(ranked) + 2
    for part, texts in ((task.train, source.train), (task.test, source.test)):
        for tokens, text in zip(part.inputs(), texts.inputs(), strict=True):
            found = [ranked.index(w) + 2 if w in ranked else 1 for w in words[text]]
            found = found or [1]
            assert tokens.tolist() == found + [0] * (6 - len(found))
    assert task.name == "b"
    assert task.train.x.dtype == np.int32


def test_the_vocabulary_is_of_all_sources_and_of_what_the_model_sees(tmp_path):
    first = [("ab"[i % 2], f"one two{i % 4} three hidden") for i in range(4)]
    second = [("ab"[i % 2], f"five one six{i % 5} hidden") for i in range(10)]
    names = [
        text_file(tmp_path, *[*rows, ("a", "x y"), ("b", "y z")], name=name)
        for name, rows in (("first", first), ("second", second))
    ]
    maker = sequence(names, text_length=3, vocabulary_size=4, validation_fraction=0)
    assert maker.vocabulary_size == 4
    stream = maker(0)
    # "one" is the most frequent word of both together, "five" comes next; "hidden"
    # stands behind the third word.
    for task, name in zip(stream.tasks, names, strict=True):
        for tokens, text in zip(task.train.x, read_source(name).train.x, strict=True):
            expected = [{"one": 2, "five": 3}.get(word, 1) for word in text.split()[:3]]
            assert tokens.tolist() == [*expected, 0][:3]


def test_seeds_share_the_vocabulary_and_the_tokens(tmp_path):
    rows = [("ab"[i % 2], f"word{i} and {i % 7}") for i in range(60)]
    maker = sequence(text_file(tmp_path, *rows), max_train=10)
    streams = [maker(seed) for seed in range(3)]
    assert len({id(s.tasks[0].train.x) for s in streams}) == 1
    assert len({s.vocabulary_size for s in streams}) == 1
    assert len({tuple(s.tasks[0].train.indices()) for s in streams}) == 3


def test_tokens_do_not_depend_on_the_hash_seed(tmp_path):
    rows = "".join(f"{'ab'[i % 2]}\tw{i} v{i % 5} u{i % 3}\n" for i in range(40))
    (tmp_path / "texts.tsv").write_text(rows)
    code = """if True:
        from classp_jax.continual.data.streams import sequence
        maker = sequence("tsv:texts.tsv")
        print(maker.fingerprint, maker(0).tasks[0].train.inputs().tolist())
    """
    root = str(pathlib.Path(__file__).parents[2])
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    maker = sequence(f"tsv:{tmp_path}/texts.tsv")
    expected = [maker.fingerprint, maker(0).tasks[0].train.inputs().tolist()]
    assert ran.stdout.strip() == " ".join(map(str, expected))


def test_split_divides_texts_and_sequences_take_tokens(tmp_path):
    rows = [("abcd"[i % 4], f"word{i} same") for i in range(80)]
    drawn = split(text_file(tmp_path, *rows), tasks=2)(0)
    assert (drawn.kind, drawn.num_classes) == ("text", 2)
    assert drawn.tasks[0].train.x is drawn.tasks[1].test.x
    tokens, y = np.arange(140).reshape(20, 7), np.arange(20) % 2
    drawn = sequence([(tokens // 2, y), (tokens, y)])(0)
    assert (drawn.kind, drawn.vocabulary_size) == ("text", 140)


# Refusals.


@pytest.mark.parametrize(
    ("name", "sources", "options", "match"),
    [
        ("permute", ["digits"], {}, "stream 'permute'; did you mean 'permuted'"),
        ("split", ["digits"], {"scenario": "class"}, "did you mean 'class-incrementa"),
        ("permuted", ["digits"], {"scenario": "task-incremental"}, "'split' can be"),
        ("sequence", ["digits"], {"scenario": "class-incremental"}, "'split' can be"),
        ("rotated", ["digits"] * 2, {}, "one source, got 2; 'sequence' takes several"),
        ("permuted", [], {}, "one source, got 0"),
        ("sequence", [], {}, "at least one source"),
        ("permuted", ["digts"], {}, "did you mean 'digits'"),
        ("permuted", ["digits"], {"validation_fraction": 1e-4}, "validation .* empty"),
        ("split", ["digits"], {"tasks": 0}, "tasks must be an integer >= 1, got 0"),
        ("split", ["digits"], {"tasks": 2.0}, "tasks must be .* got 2.0"),
        ("split", ["digits"], {"tasks": True}, "tasks must be .* got True"),
        ("permuted", ["digits"], {"max_train": 0}, "max_train must be .* >= 1, got 0"),
        ("sequence", ["digits"], {"text_length": 0}, "text_length must be .* >= 1"),
        ("split", ["digits"], {"vocabulary_size": 2}, "vocabulary_size must .* >= 3"),
        *(
            ("permuted", ["digits"], {"validation_fraction": bad}, "at least 0 and bel")
            for bad in (1, -0.1, float("nan"), "a", None)
        ),
    ],
)
def test_options_that_do_not_work_are_named(name, sources, options, match):
    refused(match, make_stream, name, sources, **options)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    refused("seed must be an integer >= 0", rotated, "digits", tasks=1, seed=seed)


def test_streams_say_what_they_are_made_from(tmp_path):
    texts = text_file(tmp_path, *[("ab"[i % 2], f"t{i}") for i in range(20)])
    x, y = np.zeros((20, 8)), np.arange(20) % 2
    refused("'permuted' is made from images or vectors; tsv:.* texts", permuted, texts)
    refused("'rotated' is made from images; arrays has vectors", rotated, (x, y))
    refused("one kind, got digits .image., tsv:", sequence, ["digits", texts])
    refused("one kind, got tsv:.*, arrays", sequence, [texts, (x.astype(int), y)])
    refused(
        r"image uint8 \[4, 4, 1\], .* digits image uint8 \[8, 8, 1\]",
        sequence,
        ["digits", numbered(3)],
    )
    refused(
        r"float32 \[8, 8, 1\], .* uint8 \[8",
        sequence,
        ["digits", (np.zeros((20, 8, 8)), y)],
    )


# Arrays.


def arrays(seed: int = 0, **changes: Any) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    good = {
        "x_train": rng.random((40, 6, 5, 2), np.float32),
        "y_train": np.arange(40) % 4,
        "x_test": rng.random((8, 6, 5, 2), np.float32),
        "y_test": np.arange(8) % 4,
    }
    x_train, y_train, x_test, y_test = (good | changes).values()
    return x_train, y_train, x_test, y_test


def test_arrays_become_tasks():
    tasks = [arrays(seed) for seed in range(3)]
    drawn = stream((task for task in tasks), validation_fraction=0.25)(2)
    assert [task.name for task in drawn.tasks] == ["task 1", "task 2", "task 3"]
    assert (drawn.kind, drawn.num_classes, drawn.vocabulary_size) == ("image", 4, 0)
    for task, (x_train, y_train, x_test, y_test) in zip(
        drawn.tasks, tasks, strict=True
    ):
        np.testing.assert_array_equal(task.test.inputs(), x_test)
        np.testing.assert_array_equal(task.test.labels(), y_test)
        assert task.train.x is x_train
        held = task.validation.indices()
        assert np.bincount(y_train[held]).max() - np.bincount(y_train[held]).min() <= 1
        rows = np.sort([*task.train.indices(), *held])
        np.testing.assert_array_equal(rows, np.arange(40))
        np.testing.assert_array_equal(task.train.labels(), np.delete(y_train, held))


def test_pairs_give_the_same_fifth_for_testing_whatever_the_seed():
    x, y, *_ = arrays()
    maker = stream([(x, y)])
    parts = [splits(maker(seed).tasks[0]) for seed in (0, 1)]
    assert [len(part) for part in parts[0]] == [29, 3, 8]
    np.testing.assert_array_equal(parts[0][2].indices(), parts[1][2].indices())
    assert np.bincount(parts[0][2].labels()).tolist() == [2] * 4
    assert not np.array_equal(parts[0][1].indices(), parts[1][1].indices())
    for three in parts:
        rows = np.sort(np.concatenate([part.indices() for part in three]))
        np.testing.assert_array_equal(rows, np.arange(40))


def test_an_array_that_comes_again_is_stored_once_and_held_out_alike():
    # float64 [n, height, width]: both its dtype and its shape are changed.
    (x, z), y = np.random.default_rng(0).random((2, 40, 6, 5)), np.arange(40) % 4
    first, second, third = stream([(x, y), (z, y), (x, y)])(0).tasks
    assert first.train.x is third.train.x
    assert first.train.x is not second.train.x
    for part, again in zip(splits(first), splits(third), strict=True):
        np.testing.assert_array_equal(part.indices(), again.indices())


def test_vectors_and_tokens_are_taken_too():
    x, y = np.random.default_rng(0).random((20, 7)), np.arange(20)[:, None] % 2
    vectors = stream([(x, y, x, y)])(0)
    assert vectors.kind == "vector"
    np.testing.assert_array_equal(vectors.tasks[0].test.inputs(), x.astype("f4"))
    tokens = np.arange(140).reshape(20, 7)
    drawn = stream([(tokens // 2, y, tokens, y)])(0)
    assert (drawn.kind, drawn.vocabulary_size) == ("text", 140)
    assert drawn.tasks[0].train.x.dtype == np.int32
    np.testing.assert_array_equal(drawn.tasks[0].test.inputs(), tokens)


def test_jax_arrays_are_taken():
    import jax.numpy as jnp

    task = arrays()
    given = stream([tuple(map(jnp.asarray, task))])
    assert_same(given(0), stream([task])(0))


def test_task_incremental_arrays_mask_the_other_tasks_classes():
    first, second = arrays(), arrays(1)
    second = (second[0], second[1] % 2 + 4, second[2], second[3] % 2 + 4)
    drawn = stream([first, second], scenario="task-incremental", task_names=("a", "a"))(
        0
    )
    assert [task.name for task in drawn.tasks] == ["a", "a (2)"]
    assert drawn.num_classes == 6
    assert drawn.tasks[0].classes.tolist() == [True] * 4 + [False] * 2
    assert drawn.tasks[1].classes.tolist() == [False] * 4 + [True] * 2
    shared = stream([first, second], num_classes=9)(0)
    assert all(task.classes.tolist() == [True] * 9 for task in shared.tasks)


@pytest.mark.parametrize(
    ("tasks", "options", "match"),
    [
        ([], {}, "at least one task is needed"),
        ([arrays()], {"task_names": ["a", "b"]}, "has 1 tasks, 2 task names"),
        ([arrays(), arrays()[:3]], {}, r"task 2: must be \(x, y\) or .* got 3 arrays"),
        (arrays()[:2], {}, r"task 1: must be \(x, y\) or .* got a ndarray"),
        ([arrays(y_test=np.arange(8))], {}, "task 1, test part: label 4 of example 4"),
        ([arrays()], {"num_classes": 3}, "training part: label 3 of example 3 is not"),
        ([arrays()], {"num_classes": 1}, "num_classes must be an integer >= 2"),
        ([arrays(y_train=[0] * 40, y_test=[0] * 8)], {}, "at least two classes"),
        ([arrays()], {"scenario": "x"}, "Unknown scenario 'x'"),
        ([arrays()], {"validation_fraction": 1.0}, "validation_fraction must be"),
        ([arrays()], {"validation_fraction": 0.01}, "validation part: is empty; hold"),
        ([arrays()], {"seed": -1}, "seed must be"),
        ([arrays(x_test=np.ones((8, 6, 5, 3)))], {}, r"\[6, 5, 3\], .*\[6, 5, 2\]"),
        ([arrays(), (np.ones((40, 2), int), [0, 1] * 20)], {}, "task 2: .*text int32"),
        ([arrays(x_train=np.ones(40))], {}, "task 1, x_train: must be images .n, heig"),
        ([(np.full((9, 3), np.inf), [0] * 9)], {}, "task 1, x: example 0 holds"),
        (
            [arrays(y_train=[*"abcd"] * 10)],
            {},
            "y_train: labels must be integers .*uniq",
        ),
        (
            [arrays(y_train=np.arange(39) % 4)],
            {},
            "x_train has 40 .* y_train 39 labels",
        ),
        ([(np.ones((3, 2)), [0, 1, 0])], {}, "3 examples are too few to hold 20% out"),
    ],
)
def test_bad_arrays_are_refused(tasks, options, match):
    refused(match, stream, tasks, **options)


def test_the_number_of_a_bad_example_is_that_of_the_users_array():
    x, y = np.zeros((50, 4)), np.arange(50) % 2
    x[[33, 44]] = np.nan
    tasks = [(np.ones((50, 4)), y), (x, y)]
    refused(r"task 2, x: example 33 holds NaN .*\(2 of 50", stream, tasks)


def test_classes_may_stay_in_the_source_s_order():
    for seed in (0, 1):
        drawn = split("digits", tasks=5, shuffle_classes=False)
        names = [task.name for task in drawn(seed).tasks]
        assert names == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    assert drawn.configuration["shuffle_classes"] is False
    assert "shuffle_classes" not in split("digits").configuration
