"""Streams: the tasks hold what they should, and nothing leaks between parts."""

import functools
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

from classp_jax.continual.sources import Source, Split, load_source, source_from_arrays
from classp_jax.continual.streams import (
    SCENARIOS,
    STREAMS,
    Stream,
    StreamError,
    Task,
    make_stream,
    stream_from_arrays,
)


@functools.cache
def digits() -> Source:
    return load_source("digits")


@functools.cache
def real(name: str, data_dir: pathlib.Path) -> Source:
    return load_source(name, data_dir=data_dir)


def splits(parts: Task | Source) -> list[Split]:
    return [parts.train, parts.validation, parts.test]


def keys(split: Split) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in split.x]


def assert_same(a: Stream, b: Stream) -> None:
    assert a._replace(tasks=()) == b._replace(tasks=())
    for task, other in zip(a.tasks, b.tasks, strict=True):
        assert task.name == other.name
        np.testing.assert_array_equal(task.classes, other.classes)
        for part, same in zip(splits(task), splits(other), strict=True):
            np.testing.assert_array_equal(part.x, same.x)
            np.testing.assert_array_equal(part.y, same.y)


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(StreamError, match=match) as caught:
        make_stream(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


def numbered(classes: int, each: int = 10, side: int = 4, channels: int = 1) -> Source:
    """Images whose pixels are numbered and whose last pixel is the true class."""
    pixels = side * side * channels
    x = np.tile(np.arange(pixels, dtype=np.uint8), (classes * each, 1))
    y = np.arange(classes * each) % classes
    x[:, -1] = y
    x = x.reshape(-1, side, side, channels)
    return source_from_arrays("numbered", x, y, x, y)


def texts(*rows: tuple[str, int], test: tuple[str, ...] = ("the end",)) -> Source:
    def split(pairs: list[tuple[str, int]]) -> Split:
        x = np.empty(len(pairs), object)
        x[:] = [text for text, _ in pairs]
        return Split(x, np.array([label for _, label in pairs], np.int32))

    held = split([(text, 0) for text in test])
    return Source("tsv:/a/b.tsv", "text", split(list(rows)), held, held, ("no", "yes"))


# All streams.


@pytest.mark.parametrize("name", ["permuted", "rotated", "split"])
@pytest.mark.parametrize("max_train", [None, 50])
def test_parts_and_dtypes(name, max_train):
    stream = make_stream(name, [digits()], max_train=max_train)
    assert (stream.name, stream.kind, stream.vocabulary_size) == (name, "image", 0)
    assert stream.scenario == "domain-incremental"
    assert len(stream.tasks) == 5
    assert len({task.name for task in stream.tasks}) == 5
    for task in stream.tasks:
        assert task.classes.dtype == bool
        assert task.classes.tolist() == [True] * stream.num_classes
        for part in splits(task):
            assert part.x.dtype == np.uint8
            assert part.x.shape == (len(part.y), 8, 8, 1)
            assert part.y.dtype == np.int32
            assert 0 <= part.y.min() <= part.y.max() < stream.num_classes
        if max_train:
            assert len(task.train.y) == max_train


@pytest.mark.parametrize("name", ["permuted", "rotated", "split"])
def test_no_image_of_a_task_is_in_two_parts(name):
    # All 1,797 digits differ.
    for task in make_stream(name, [digits()]).tasks:
        images = [set(keys(part)) for part in splits(task)]
        sizes = [len(part.y) for part in splits(task)]
        assert len(set.union(*images)) == sum(sizes)


@pytest.mark.parametrize("name", [*STREAMS])
def test_the_same_seed_gives_the_same_stream_and_another_does_not(name):
    def made(seed: int) -> Stream:
        return make_stream(name, [digits()], seed=seed, max_train=70)

    assert_same(made(3), made(3))
    with pytest.raises(AssertionError):
        assert_same(made(3), made(4))


def test_max_train_chooses_anew_for_every_task_among_the_training_examples():
    source = digits()
    stream = make_stream("rotated", [source], num_tasks=3, max_train=60)
    unturned = make_stream("sequence", [source] * 3, max_train=60)
    chosen = [set(keys(task.train)) for task in unturned.tasks]
    assert [len(images) for images in chosen] == [60] * 3
    assert all(images <= set(keys(source.train)) for images in chosen)
    assert len(chosen[0] & chosen[1]) < 30
    for turned, task in zip(stream.tasks, unturned.tasks, strict=True):
        np.testing.assert_array_equal(turned.train.y, task.train.y)
        assert len(turned.validation.y) == len(source.validation.y)
        assert len(turned.test.y) == len(source.test.y)


def test_max_train_above_what_there_is_changes_nothing():
    some = make_stream("permuted", [digits()], max_train=1295)
    assert_same(some, make_stream("permuted", [digits()]))


# Permuted.


def orders(stream: Stream) -> list[np.ndarray]:
    """The order of the pixels in every task, seen in images that number them."""
    found = []
    for task in stream.tasks:
        images = np.concatenate([part.x for part in splits(task)])
        assert (images == images[0]).all()
        found.append(images[0])
    return found


def blank_numbered(side: int, channels: int = 1) -> Source:
    pixels = np.arange(side * side * channels, dtype=np.uint8)
    x = np.tile(pixels, (20, 1)).reshape(20, side, side, channels)
    y = np.arange(20) % 2
    return source_from_arrays("numbered", x, y, x, y)


@given(side=st.integers(2, 15), num_tasks=st.integers(1, 6), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=30)
def test_permutations_are_bijections(side, num_tasks, seed):
    source = blank_numbered(side)
    stream = make_stream("permuted", [source], num_tasks=num_tasks, seed=seed)
    found = orders(stream)
    assert len(found) == num_tasks
    np.testing.assert_array_equal(found[0].ravel(), np.arange(side**2))
    for order in found:
        assert sorted(order.ravel()) == list(range(side**2))
    if side > 4:
        assert len({order.tobytes() for order in found}) == num_tasks


def test_the_first_task_is_the_source_itself():
    task = make_stream("permuted", [digits()]).tasks[0]
    for part, original in zip(splits(task), splits(digits()), strict=True):
        np.testing.assert_array_equal(part.x, original.x)
        np.testing.assert_array_equal(part.y, original.y)


def test_a_permutation_depends_on_the_seed_and_the_task_alone():
    source = blank_numbered(8)
    few = orders(make_stream("permuted", [source], num_tasks=3, seed=5, max_train=2))
    many = orders(make_stream("permuted", [source], num_tasks=6, seed=5))
    other = orders(make_stream("permuted", [source], num_tasks=3, seed=6))
    for a, b, c in zip(few, many, other, strict=False):
        np.testing.assert_array_equal(a, b)
        assert (a == c).all() == (a is few[0])


def test_a_permutation_moves_whole_pixels():
    stream = make_stream("permuted", [blank_numbered(6, channels=3)], num_tasks=2)
    moved = orders(stream)[1].reshape(36, 3)
    np.testing.assert_array_equal(moved % 3, np.tile([0, 1, 2], (36, 1)))
    np.testing.assert_array_equal(moved // 3, np.repeat(moved[:, :1] // 3, 3, axis=1))
    assert sorted(moved[:, 0] // 3) == list(range(36))


def test_permuted_digits_keep_their_labels_and_grey_values():
    stream = make_stream("permuted", [digits()], num_tasks=3)
    for task in stream.tasks[1:]:
        for part, original in zip(splits(task), splits(digits()), strict=True):
            np.testing.assert_array_equal(part.y, original.y)
            before, after = (np.sort(p.x.reshape(-1, 64)) for p in (original, part))
            np.testing.assert_array_equal(after, before)
            assert (part.x != original.x).any()


# Rotated.


def test_a_rotation_by_0_is_the_identity_and_by_90_a_quarter_turn():
    stream = make_stream("rotated", [digits()], num_tasks=2)
    assert [task.name for task in stream.tasks] == ["0°", "90°"]
    for straight, turned, original in zip(
        *map(splits, stream.tasks), splits(digits()), strict=True
    ):
        np.testing.assert_array_equal(straight.x, original.x)
        # numpy turns counter-clockwise as an image is shown, rows downwards.
        np.testing.assert_array_equal(turned.x, np.rot90(original.x, axes=(1, 2)))
        np.testing.assert_array_equal(turned.y, original.y)


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
    source = source_from_arrays("noise", x, y, x, y)
    stream = make_stream("rotated", [source], num_tasks=4)
    assert [task.name for task in stream.tasks] == ["0°", "45°", "90°", "135°"]
    for task, degrees in zip(stream.tasks, (0, 45, 90, 135), strict=True):
        assert task.test.x.dtype == dtype
        for channel in range(2):
            expected = turned(x[3, :, :, channel], degrees)
            found = task.test.x[3, :, :, channel]
            # A byte is rounded to the nearest.
            atol = 0.5 + 1e-6 if dtype == np.uint8 else 1e-3
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# Split.


@given(
    classes=st.integers(2, 12), num_tasks=st.integers(1, 12), seed=st.integers(0, 999)
)
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("scenario", [*SCENARIOS])
def test_split_divides_the_classes(scenario, classes, num_tasks, seed):
    source = numbered(classes)
    smallest = 1 if scenario == "class-incremental" else 2
    arguments = {"num_tasks": num_tasks, "scenario": scenario, "seed": seed}
    if num_tasks * smallest > classes:
        refused(f"{num_tasks} {scenario} tasks need at", "split", [source], **arguments)
        return
    stream = make_stream("split", [source], **arguments)
    groups = [np.unique(task.train.x[:, -1, -1, 0]) for task in stream.tasks]
    assert sorted(np.concatenate(groups)) == list(range(classes))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    outputs = max(sizes) if scenario == "domain-incremental" else classes
    assert stream.num_classes == outputs
    for task, group in zip(stream.tasks, groups, strict=True):
        assert task.name.startswith(str(group[0]))
        may_win = range(outputs)
        if scenario == "task-incremental":
            may_win = group
        np.testing.assert_array_equal(np.flatnonzero(task.classes), may_win)
        for part, original in zip(splits(task), splits(source), strict=True):
            true = part.x[:, -1, -1, 0]
            assert len(true) == np.isin(original.y, group).sum()
            if scenario == "domain-incremental":
                true = np.searchsorted(group, true)
            np.testing.assert_array_equal(part.y, true)


def test_split_digits_hold_every_example_once():
    stream = make_stream("split", [digits()], scenario="class-incremental", seed=1)
    for part in range(3):
        found = [
            pair
            for task in stream.tasks
            for pair in zip(
                keys(splits(task)[part]), splits(task)[part].y.tolist(), strict=True
            )
        ]
        original = splits(digits())[part]
        expected = zip(keys(original), original.y.tolist(), strict=True)
        assert Counter(found) == Counter(expected)


def test_the_order_of_the_classes_comes_from_the_seed():
    orders = {
        tuple(task.name for task in make_stream("split", [digits()], seed=seed).tasks)
        for seed in range(10)
    }
    assert len(orders) == 10


def test_groups_of_many_classes_have_short_names():
    names = [
        task.name for task in make_stream("split", [numbered(8)], num_tasks=2).tasks
    ]
    assert all(name.endswith("and 3 more") for name in names)
    assert len(set(names)) == 2


# Sequence.


def test_a_sequence_has_one_task_a_source_and_one_head():
    small, large = numbered(3, side=8), digits()
    stream = make_stream("sequence", [small, large, small])
    assert [task.name for task in stream.tasks] == [
        "numbered",
        "digits",
        "numbered (2)",
    ]
    assert stream.num_classes == 10
    for task, source in zip(stream.tasks, (small, large, small), strict=True):
        assert task.classes.tolist() == [True] * 10
        for part, original in zip(splits(task), splits(source), strict=True):
            np.testing.assert_array_equal(part.x, original.x)
            np.testing.assert_array_equal(part.y, original.y)


def test_words_are_numbered_by_frequency_then_alphabet():
    source = texts(
        ("The cat; the DOG.", 0),
        ("a dog (the_best) isn't 42", 1),
        ("dog ant", 1),
        test=("Dog? Ant! the zebra", "...", "cat isn't the_best cat dog ant a"),
    )
    stream = make_stream("sequence", [source], text_length=6)
    # dog 3, the 2, then once each: 42, a, ant, cat, isn't, the_best.
    words = ["dog", "the", "42", "a", "ant", "cat", "isn't", "the_best"]
    token = {word: number for number, word in enumerate(words, start=2)}
    task = stream.tasks[0]
    assert (stream.kind, stream.vocabulary_size) == ("text", 10)
    assert (task.name, task.train.x.dtype) == ("b", np.int32)
    the, cat, dog = token["the"], token["cat"], token["dog"]
    assert task.train.x[0].tolist() == [the, cat, the, dog, 0, 0]
    assert task.test.x.tolist() == [
        [dog, token["ant"], the, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [cat, token["isn't"], token["the_best"], cat, dog, token["ant"]],
    ]
    fewer = make_stream("sequence", [source], text_length=6, vocabulary_size=5)
    assert fewer.vocabulary_size == 5
    assert fewer.tasks[0].train.x.tolist() == [
        [3, 1, 3, 2, 0, 0],
        [1, 2, 1, 1, 4, 0],
        [2, 1, 0, 0, 0, 0],
    ]


def test_the_vocabulary_is_of_all_sources_and_of_what_the_model_sees():
    first = texts(("one two three four", 0), ("one", 1))
    second = texts(("two five six seven", 0), ("five", 1), test=("four one end",))
    stream = make_stream("sequence", [first, second], text_length=3)
    # Alphabetical among equals; "four" and "seven" stand behind the third word.
    words = ["five", "one", "two", "six", "three"]
    token = {word: number for number, word in enumerate(words, start=2)}
    assert stream.vocabulary_size == 7
    assert stream.tasks[1].train.x[0].tolist() == [token[w] for w in words[2::-2]] + [
        token["six"]
    ]
    assert stream.tasks[1].test.x[0].tolist() == [1, token["one"], 1]


def test_words_of_examples_left_out_by_max_train_are_unknown():
    source = texts(*((f"word{i}", i % 2) for i in range(50)))
    stream = make_stream("sequence", [source], max_train=10)
    assert stream.vocabulary_size == 12
    assert sorted(stream.tasks[0].train.x[:, 0]) == list(range(2, 12))


def test_tokens_do_not_depend_on_the_hash_seed(tmp_path):
    rows = "".join(f"{'ab'[i % 2]}\tw{i} v{i % 5} u{i % 3}\n" for i in range(40))
    (tmp_path / "texts.tsv").write_text(rows)
    code = """if True:
        from classp_jax.continual.sources import load_source
        from classp_jax.continual.streams import make_stream
        stream = make_stream("sequence", [load_source("tsv:texts.tsv")])
        print(stream.tasks[0].train.x.tolist())
    """
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert "2" in printed.pop()


def test_phrasebank_then_imdb(shared_data):
    bank = real(f"tsv:{shared_data / 'phrasebank_50agree.tsv'}", shared_data)
    imdb = real("tfds:imdb_reviews", shared_data / "tfds")
    stream = make_stream("sequence", [bank, imdb], vocabulary_size=5000)
    assert (stream.num_classes, stream.vocabulary_size) == (3, 5000)
    assert [task.name for task in stream.tasks] == [
        "phrasebank_50agree",
        "imdb_reviews",
    ]
    for task, source in zip(stream.tasks, (bank, imdb), strict=True):
        for part, original in zip(splits(task), splits(source), strict=True):
            assert part.x.shape == (len(original.y), 30)
            assert 0 <= part.x.min() <= part.x.max() < 5000
            # Every text has a word, and padding stands only behind the words.
            assert (part.x[:, 0] > 0).all()
            assert (np.diff((part.x == 0).astype(int)) >= 0).all()
    # The most frequent word of English texts is the first one.
    the = [
        text.lower().split().count("the") and 2 in row
        for text, row in zip(imdb.test.x[:200], stream.tasks[1].test.x, strict=False)
        if "the" in text.lower().split()[:20]
    ]
    assert the
    assert all(the)


# Refusals.


def test_unknown_names_get_the_nearest_known_one():
    refused("Unknown stream 'permute'; did you mean 'permuted'", "permute", [digits()])
    refused(
        "Unknown scenario 'class'; did you mean 'class-incremental'",
        "split",
        [digits()],
        scenario="class",
    )


@pytest.mark.parametrize("name", ["permuted", "rotated", "sequence"])
@pytest.mark.parametrize("scenario", ["class-incremental", "task-incremental"])
def test_only_split_has_the_other_scenarios(name, scenario):
    refused(f"'split' can be {scenario}", name, [digits()], scenario=scenario)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_tasks", 0),
        ("num_tasks", 2.0),
        ("num_tasks", True),
        ("max_train", 0),
        ("text_length", 0),
        ("vocabulary_size", 2),
        ("seed", -1),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    refused(
        f"{argument} must be .*got {value}", "split", [digits()], **{argument: value}
    )


@pytest.mark.parametrize("name", ["permuted", "rotated", "split"])
def test_these_need_one_source_of_images(name):
    words = texts(("a", 0), ("b", 1))
    refused("one source of images, got tsv:/a/b.tsv .text", name, [words])
    refused("got digits .image., digits .image", name, [digits(), digits()])
    refused("one source of images, got none", name, [])


def test_sequences_need_sources_of_one_kind_and_shape():
    refused("at least one source", "sequence", [])
    mixed = [digits(), texts(("a", 0), ("b", 1))]
    refused("digits .image., tsv:/a/b.tsv .text", "sequence", mixed)
    other = numbered(3)
    refused(r"uint8 \[4, 4, 1\], .*uint8 \[8, 8", "sequence", [digits(), other])
    x, y = np.zeros((20, 8, 8)), np.arange(20) % 2
    floats = source_from_arrays("floats", x, y, x, y)
    refused(r"float32 .*digits uint8", "sequence", [digits(), floats])


def test_bad_sources_are_refused():
    good = numbered(3)
    blank = good.test._replace(x=np.full((30, 4, 4, 1), np.nan, np.float32))
    empty = Split(good.test.x[:0], good.test.y[:0])
    outside = good.test._replace(y=good.test.y + 1)
    for split, match in ((blank, "NaN"), (empty, "is empty"), (outside, "label 3 is")):
        refused(f"test part: .*{match}", "permuted", [good._replace(test=split)])


def test_a_task_without_examples_in_a_part_is_refused():
    good = numbered(4)
    one = good.validation.y == 0
    poor = good._replace(
        validation=Split(good.validation.x[one], good.validation.y[one])
    )
    refused("split, .*, validation part: is empty", "split", [poor], num_tasks=2)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("permuted", "digits"),
        ("rotated", "digits"),
        ("split", "digits"),
        ("sequence", "digits"),
        ("sequence", "texts"),
    ],
)
def test_without_validation_a_stream_is_the_same_but_for_that_part(
    name, source, tmp_path
):
    if source == "texts":
        lines = [f"{i % 2}\tword{i % 7} number {i}" for i in range(40)]
        (tmp_path / "texts.tsv").write_text("\n".join(lines) + "\n")
        source = f"tsv:{tmp_path}/texts.tsv"
    stream = make_stream(
        name, [load_source(source, validation_fraction=0)], num_tasks=2
    )
    usual = make_stream(name, [load_source(source)], num_tasks=2)
    for task, other in zip(stream.tasks, usual.tasks, strict=True):
        held = len(other.validation.y)
        assert held > 0
        assert len(task.validation.x) == len(task.validation.y) == 0
        assert task.validation.x.shape[1:] == task.train.x.shape[1:]
        assert len(task.train.y) == len(other.train.y) + held
        np.testing.assert_array_equal(task.test.y, other.test.y)


def test_arrays_without_validation():
    data = arrays()
    (task,) = stream_from_arrays([data], validation_fraction=0).tasks
    assert len(task.validation.y) == 0
    np.testing.assert_array_equal(task.train.x, data[0])
    np.testing.assert_array_equal(task.train.y, data[1])


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
    stream = stream_from_arrays(tasks, validation_fraction=0.25, seed=2)
    assert [task.name for task in stream.tasks] == ["task 1", "task 2", "task 3"]
    assert (stream.kind, stream.num_classes, stream.vocabulary_size) == ("image", 4, 0)
    for task, (x_train, y_train, x_test, y_test) in zip(
        stream.tasks, tasks, strict=True
    ):
        np.testing.assert_array_equal(task.test.x, x_test)
        np.testing.assert_array_equal(task.test.y, y_test)
        assert len(task.validation.y) == 10
        label_of = {
            x.tobytes(): y for x, y in zip(x_train, y_train.tolist(), strict=True)
        }
        cut = (task.train, task.validation)
        found = [pair for p in cut for pair in zip(keys(p), p.y.tolist(), strict=True)]
        assert dict(found) == label_of
        assert len(found) == 40
        assert np.bincount(task.train.y).max() - np.bincount(task.train.y).min() <= 1


def test_vectors_and_tokens_are_taken_too():
    x, y = np.random.default_rng(0).random((20, 7)), np.arange(20)[:, None] % 2
    vectors = stream_from_arrays([(x, y, x, y)])
    assert vectors.tasks[0].test.x.dtype == np.float32
    np.testing.assert_array_equal(vectors.tasks[0].test.x[:, 0, 0], x.astype("f4"))
    tokens = np.arange(140).reshape(20, 7)
    stream = stream_from_arrays([(tokens // 2, y, tokens, y)])
    assert (stream.kind, stream.vocabulary_size) == ("text", 140)
    assert stream.tasks[0].train.x.dtype == np.int32
    np.testing.assert_array_equal(stream.tasks[0].test.x, tokens)


def test_jax_arrays_are_taken():
    import jax.numpy as jnp

    task = arrays()
    assert_same(
        stream_from_arrays([tuple(map(jnp.asarray, task))]), stream_from_arrays([task])
    )


def test_task_incremental_arrays_mask_the_other_tasks_classes():
    first, second = arrays(), arrays(1)
    second = (second[0], second[1] % 2 + 4, second[2], second[3] % 2 + 4)
    stream = stream_from_arrays(
        [first, second], scenario="task-incremental", task_names=("a", "b")
    )
    assert [task.name for task in stream.tasks] == ["a", "b"]
    assert stream.num_classes == 6
    assert stream.tasks[0].classes.tolist() == [True] * 4 + [False] * 2
    assert stream.tasks[1].classes.tolist() == [False] * 4 + [True] * 2
    shared = stream_from_arrays([first, second], num_classes=9)
    assert all(task.classes.tolist() == [True] * 9 for task in shared.tasks)


@pytest.mark.parametrize(
    ("tasks", "options", "match"),
    [
        ([], {}, "has 0 tasks"),
        ([arrays()], {"task_names": ["a", "b"]}, "has 1 tasks, 2 task names"),
        (
            [arrays(), arrays()[:3]],
            {},
            "task 2: must be .x_train, y_train, x_test, y_t",
        ),
        ([arrays(y_test=np.arange(8))], {}, "task 1, test part: label 4 is not one of"),
        ([arrays()], {"num_classes": 3}, "training part: label 3 is not one of 0 to 2"),
        ([arrays()], {"num_classes": 1}, "num_classes must be an integer >= 2"),
        ([arrays()], {"scenario": "x"}, "Unknown scenario 'x'"),
        ([arrays()], {"validation_fraction": 1.0}, "validation_fraction must be"),
        ([arrays()], {"validation_fraction": 0.01}, "validation part: is empty"),
        ([arrays()], {"seed": -1}, "seed must be"),
        ([arrays(x_test=np.ones((0, 6, 5, 2)), y_test=[])], {}, "test part: is empty"),
        ([arrays(x_test=np.ones((8, 6, 5, 3)))], {}, r"\[6, 5, 3\], .*\[6, 5, 2\]"),
        ([arrays(), arrays(x_test=np.ones((8, 2), int))], {}, "task 2: .*int32"),
        ([arrays(x_test=-np.ones((8, 2), int))], {}, "test part: tokens must be 0, 1"),
        ([arrays(x_train=np.ones(40))], {}, "training part: images must be .n, height"),
        (
            [arrays(x_train=np.full((40, 6, 5), np.nan))],
            {},
            "40 of 40 examples hold Na",
        ),
        ([arrays(y_train=np.arange(40) / 4)], {}, "training part: labels must be int"),
        ([arrays(y_train=-np.arange(40))], {}, "labels must be 0, 1, 2 and so on"),
        ([arrays(y_train=np.arange(39) % 4)], {}, "has 40 examples, 39 labels"),
    ],
)
def test_bad_arrays_are_refused(tasks, options, match):
    with pytest.raises(StreamError, match=match) as caught:
        stream_from_arrays(tasks, **options)
    assert len(str(caught.value).splitlines()) == 1
