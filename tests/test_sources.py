"""Sources: what is read is what is there, parts do not mix, bad data is refused."""

import functools
import io
import json
import pathlib
import shutil
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from classp_jax.continual.sources import (
    SOURCES,
    Source,
    SourceError,
    Split,
    check_source,
    load_source,
    load_sources,
    source_from_arrays,
)
from classp_jax.continual.streams import make_stream

PARTS = ("train", "validation", "test")
# From the publications: LeCun et al. (labels counted), Xiao et al., Maas et al. and
# Malo et al. The means are the ones everybody normalises with.
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@functools.cache
def real(name: str, data_dir: pathlib.Path) -> Source:
    return load_source(name, data_dir=data_dir)


def splits(source: Source) -> list[Split]:
    return [source.train, source.validation, source.test]


def counts(*parts: Split) -> list[int]:
    return np.bincount(np.concatenate([part.y for part in parts])).tolist()


def keys(split: Split) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in split.x]


def refused(name: str, match: str, **kwargs: object) -> str:
    """The message of a refusal: one line that says what the test expects."""
    with pytest.raises(SourceError, match=match) as caught:
        load_source(name, **kwargs)  # pyright: ignore[reportArgumentType]
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# The embedded digits.


def test_digits_are_scikit_learns_scaled_to_a_byte():
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    expected = Counter(
        (bytes(int(v) * 255 // 16 for v in image.ravel()), int(label))
        for image, label in zip(data.images, data.target, strict=True)
    )
    source = load_source("digits")
    found = Counter(
        pair
        for part in splits(source)
        for pair in zip(keys(part), part.y.tolist(), strict=True)
    )
    assert found == expected
    assert source.train.x.dtype == np.uint8
    assert source.train.y.dtype == np.int32
    assert source.train.x.max() == 255
    assert source.class_names == tuple("0123456789")


def test_digits_parts_share_no_image():
    source = load_source("digits")
    images = [set(keys(part)) for part in splits(source)]
    assert [len(part.y) for part in splits(source)] == [1295, 143, 359]
    assert len(set.union(*images)) == sum(map(len, images)) == 1797


def test_the_test_part_is_the_same_for_every_seed_and_the_validation_part_is_not():
    first, again, other = (load_source("digits", seed=seed) for seed in (3, 3, 4))
    for a, b in zip(splits(first), splits(again), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
    np.testing.assert_array_equal(first.test.x, other.test.x)
    assert set(keys(first.validation)) != set(keys(other.validation))


def test_several_seeds_at_once_are_those_seeds_one_by_one():
    for together, seed in zip(load_sources("digits", [2, 9]), (2, 9), strict=True):
        alone = load_source("digits", seed=seed)
        for a, b in zip(splits(together), splits(alone), strict=True):
            np.testing.assert_array_equal(a.x, b.x)
            np.testing.assert_array_equal(a.y, b.y)


@given(
    labels=st.lists(st.integers(0, 6), min_size=20, max_size=300),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=50)
def test_cuts_are_stratified_and_keep_the_order(labels, fraction, seed):
    x = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    y = np.array(labels)
    names = [str(c) for c in range(7)]
    source = source_from_arrays(
        "numbered",
        *(x, y, x, y),
        class_names=names,
        validation_fraction=fraction,
        seed=seed,
    )
    rest, held = (part.x.ravel().astype(int) for part in splits(source)[:2])
    assert sorted([*rest, *held]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(held) > 0).all()
    np.testing.assert_array_equal(source.validation.y, y[held])
    np.testing.assert_array_equal(source.train.y, y[rest])
    assert abs(len(held) - fraction * len(labels)) <= 1
    for label in range(7):
        share = fraction * np.sum(y == label)
        assert abs(np.sum(y[held] == label) - share) < 1 + 1e-9


@pytest.mark.parametrize("fraction", [1, -0.1, float("nan"), "a", None])
def test_a_validation_fraction_that_leaves_nothing_is_refused(fraction):
    refused("digits", "validation_fraction must be", validation_fraction=fraction)


@pytest.mark.parametrize("fraction", [0, 0.0])
def test_without_validation_all_is_for_training(fraction):
    source = load_source("digits", validation_fraction=fraction, seed=1)
    check_source(source)
    usual = load_source("digits", seed=1)
    assert [len(part.y) for part in splits(source)] == [1438, 0, 359]
    np.testing.assert_array_equal(source.test.x, usual.test.x)
    assert source.validation.x.dtype == np.uint8
    assert source.validation.x.shape == (0, 8, 8, 1)
    assert sorted(keys(source.train)) == sorted(
        keys(usual.train) + keys(usual.validation)
    )


def test_a_fraction_too_small_for_one_example_is_refused():
    refused("digits", "validation part: is empty", validation_fraction=1e-4)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    refused("digits", "seed must be an integer >= 0", seed=seed)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digts", "did you mean 'digits'"),
        ("mnist", "did you mean 'tfds:mnist'"),
        ("tdfs:mnist", "did you mean 'tfds:mnist'"),
        ("letters.npz", "did you mean 'npz:letters.npz'"),
        ("C:/data/letters.tsv", "did you mean 'tsv:C:/data/letters.tsv'"),
        ("npz:", "Known: "),
        ("", "Known: "),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(name, hint):
    message = refused(name, hint)
    assert all(known in message for known in SOURCES)


# npz files.


def arrays(**changes: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (20, 5, 4), dtype=np.uint8),
        "y_train": np.arange(20) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {k: np.asarray(v) for k, v in (good | changes).items() if v is not None}


def saved(folder: pathlib.Path, **changes: object) -> str:
    path = folder / "set.npz"
    np.savez(path, **arrays(**changes))  # pyright: ignore[reportArgumentType]
    return f"npz:{path}"


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_npz_comes_back_as_it_was_saved(data, tmp_path_factory):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=5))
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, np.float32, np.float64]))
    numbers = st.integers(0, 255) if dtype == np.uint8 else st.floats(-9, 9, width=16)
    x_train = data.draw(hnp.arrays(dtype, (12, *shape), elements=numbers))
    x_test = data.draw(hnp.arrays(dtype, (5, *shape), elements=numbers))
    y_train = data.draw(st.permutations([0, 1, 2] * 4))
    label_dtype = data.draw(st.sampled_from([np.uint8, np.int64]))
    column = data.draw(st.booleans())
    y = np.array(y_train, label_dtype)
    folder = tmp_path_factory.mktemp("npz")
    name = saved(
        folder,
        x_train=x_train,
        y_train=y[:, None] if column else y,
        x_test=x_test,
        y_test=y[:5],
    )
    source = load_source(name, validation_fraction=0.25)
    full = shape if len(shape) == 3 else (*shape, 1)
    expected_dtype = np.uint8 if dtype == np.uint8 else np.float32
    assert source.kind == "image"
    assert source.class_names == ("0", "1", "2")
    assert len(source.validation.y) == 3
    for part in splits(source):
        assert part.x.shape == (len(part.y), *full)
        assert part.x.dtype == expected_dtype
    np.testing.assert_array_equal(source.test.x, x_test.reshape(-1, *full))
    np.testing.assert_array_equal(source.test.y, y_train[:5])
    # Adding 0 makes -0 and 0 one key.
    expected = Counter(
        (np.asarray(x + 0, expected_dtype).tobytes(), label)
        for x, label in zip(x_train, y_train, strict=True)
    )
    found = Counter(
        ((x + 0).tobytes(), int(label))
        for part in (source.train, source.validation)
        for x, label in zip(*part, strict=True)
    )
    assert found == expected


BLANK = np.zeros((20, 5, 4), np.float32)
WITH_NAN = BLANK.copy()
WITH_NAN[7, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y_test": None}, "has no y_test; needed: x_train, .* found: x_train, y_t"),
        ({"x_train": np.zeros((20, 5), np.uint8)}, r"x_train: images .* shape \[20, 5"),
        ({"x_train": np.zeros((20, 5, 4), np.int64)}, "x_train: .* uint8 or .* int64"),
        ({"x_train": np.zeros((20, 5, 4), "U3")}, "x_train: .* uint8 or .* <U3"),
        ({"x_train": np.zeros((20, 5, 4), object)}, "allow_pickle"),
        ({"x_train": np.zeros((19, 5, 4), np.uint8)}, "19 training examples, 20 label"),
        ({"x_train": np.zeros((20, 0, 4), np.uint8)}, "is empty"),
        ({"x_train": np.zeros((0, 5, 4), np.uint8), "y_train": []}, "is empty"),
        ({"x_test": np.zeros((0, 5, 4), np.uint8), "y_test": []}, "test part: is emp"),
        ({"x_test": np.zeros((6, 5, 5), np.uint8)}, r"test part: .*5, 5, 1.*5, 4, 1"),
        ({"x_test": np.zeros((6, 5, 4), np.float32)}, "test part: .*float32.*uint8"),
        ({"x_test": np.zeros((5, 5, 4), np.uint8)}, "has 5 examples, 6 labels"),
        ({"y_train": np.arange(20) / 2}, "y_train: labels must be integers.*float64"),
        ({"y_train": np.arange(20) - 1}, "y_train: labels must be 0, 1.*-1"),
        ({"y_train": np.zeros((20, 2), int)}, r"integers \[n\], got int64 \[20, 2\]"),
        ({"y_train": np.zeros(20, int)}, "at least two classes"),
        ({"y_train": np.arange(20) * 10**6}, "19000000 among 20 examples"),
        ({"y_train": np.arange(20) * 2**40}, "y_train: labels must be 0, 1, 2"),
        ({"y_test": np.arange(6)}, "test part: label 3 is not one of 0 to 2"),
        (
            {"x_train": WITH_NAN, "x_test": BLANK[:6]},
            "(training|validation) .* 1 of .*",
        ),
        ({"x_train": BLANK, "x_test": WITH_NAN[2:8]}, "test .* 1 of 6 .*example 5"),
        ({"x_train": BLANK, "x_test": BLANK[:6] - np.inf}, "test .* 6 of 6 "),
        (
            {"x_train": BLANK, "x_test": np.full((6, 5, 4), 1e39)},
            "test .* NaN or infinite",
        ),
        ({"x_train": np.zeros((4, 5, 4)), "y_train": [0, 1, 0, 1]}, "validat.* empty"),
    ],
)
def test_bad_arrays_are_refused(changes, match, tmp_path):
    refused(saved(tmp_path, **changes), match)


def test_files_that_are_no_npz_are_refused(tmp_path):
    refused(f"npz:{tmp_path / 'none.npz'}", "There is no file .*none.npz")
    refused(f"npz:{tmp_path}", "cannot be read: Is a directory")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(f"npz:{tmp_path / 'one.npy'}", "is no npz file")


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_damaged_npz_is_refused_or_read_but_never_crashes(data, tmp_path_factory):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())  # pyright: ignore[reportArgumentType]
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "set.npz"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] or b"")
    try:
        source = load_source(f"npz:{path}")
    except SourceError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        check_source(source)


# tsv files.

WORDS = st.text("abc dé.,'\"\\", min_size=1).map(str.strip).filter(bool)


@given(rows=st.lists(st.tuples(st.sampled_from("zyx"), WORDS), min_size=1))
@settings(deadline=None, max_examples=60)
def test_tsv_keeps_the_first_line_of_every_text(rows, tmp_path_factory):
    rows = [*rows, *(("abc"[i % 3], f"filler {i}") for i in range(30))]
    path = tmp_path_factory.mktemp("tsv") / "texts.tsv"
    lines = "".join(f"{label}\t{text}\n" for label, text in rows)
    path.write_text(lines, encoding="utf-8")
    source = load_source(f"tsv:{path}")
    expected: dict[str, str] = {}
    for label, text in rows:
        if text not in expected:
            expected[text] = label
    found = [
        (text, source.class_names[label])
        for part in splits(source)
        for text, label in zip(*part, strict=True)
    ]
    assert source.kind == "text"
    assert source.class_names == tuple(sorted(set(expected.values())))
    assert dict(found) == expected
    assert len(found) == len(expected)
    assert len(source.test.y) == len(expected) // 5
    other = load_source(f"tsv:{path}", seed=1)
    assert other.test.x.tolist() == source.test.x.tolist()


def test_tsv_takes_windows_files_tabs_in_texts_and_blank_lines(tmp_path):
    path = tmp_path / "texts.tsv"
    rows = "".join(f"{'ab'[i % 2]}\ttext {i}\twith a tab\r\n\r\n" for i in range(20))
    path.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    source = load_source(f"tsv:{path}")
    assert source.class_names == ("a", "b")
    texts = {text for part in splits(source) for text in part.x}
    assert texts == {f"text {i}\twith a tab" for i in range(20)}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"a\tgood\nno tab here\n", "line 2: expected a label, a tab and a text"),
        (b"a\tgood\n\nb\t \n", "line 3: expected a label, a tab and a text"),
        (b"a\tgood\n\ttext\n", "line 2: expected a label"),
        (b"a\tgood\nb\t\xff\xfe\n", "is no UTF-8 text"),
        (b"a\tone\nb\ttwo\n", "is empty"),
        (b"".join(b"a\ttext %d\n" % i for i in range(50)), "at least two classes"),
    ],
)
def test_bad_tsv_files_are_refused(content, match, tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_bytes(content)
    refused(f"tsv:{path}", match)
    refused(f"tsv:{tmp_path / 'none.tsv'}", "There is no file")


def test_phrasebank(shared_data):
    source = real(f"tsv:{shared_data / 'phrasebank_50agree.tsv'}", shared_data)
    # 4,846 sentences, of which 8 stand there twice, 2 of them with two labels.
    assert source.class_names == ("negative", "neutral", "positive")
    assert sum(counts(*splits(source))) == 4838
    published = [604, 2879, 1363]
    gone = np.subtract(published, counts(*splits(source)))
    assert gone.min() >= 0
    assert gone.sum() == 8
    texts = [set(part.x) for part in splits(source)]
    assert len(set.union(*texts)) == sum(map(len, texts))


# TFDS.


def test_mnist(shared_data):
    source = real("tfds:mnist", shared_data / "tfds")
    train = (source.train, source.validation)
    assert counts(*train) == MNIST_TRAIN
    assert counts(source.test) == MNIST_TEST
    assert len(source.validation.y) == 6000
    pixels = np.concatenate([part.x for part in train])
    assert pixels.shape == (60_000, 28, 28, 1)
    assert pixels.dtype == np.uint8
    assert pixels.mean() / 255 == pytest.approx(0.1306604762738429, abs=1e-12)
    assert pixels.std() / 255 == pytest.approx(0.3081078038564622, abs=1e-12)
    assert source.class_names == tuple("0123456789")


def test_fashion_mnist(shared_data):
    source = real("tfds:fashion_mnist", shared_data / "tfds")
    train = (source.train, source.validation)
    assert counts(*train) == [6000] * 10
    assert counts(source.test) == [1000] * 10
    pixels = np.concatenate([part.x for part in train])
    assert pixels.mean() / 255 == pytest.approx(0.2860405969887955, abs=1e-12)
    assert source.class_names[0] == "T-shirt/top"
    assert source.class_names[9] == "Ankle boot"


def test_mnist_then_fashion_mnist(shared_data):
    names = ("tfds:mnist", "tfds:fashion_mnist")
    sources = [real(name, shared_data / "tfds") for name in names]
    stream = make_stream("sequence", sources, max_train=1000)
    assert [task.name for task in stream.tasks] == ["mnist", "fashion_mnist"]
    assert [len(task.train.y) for task in stream.tasks] == [1000, 1000]
    assert [len(task.test.y) for task in stream.tasks] == [10_000, 10_000]
    assert np.bincount(stream.tasks[0].test.y).max() == 1135
    assert np.bincount(stream.tasks[1].test.y).tolist() == [1000] * 10


def test_images_are_those_that_tfds_decodes(shared_data):
    import tensorflow_datasets as tfds

    source = real("tfds:fashion_mnist", shared_data / "tfds")
    data: Any = tfds.data_source(
        "fashion_mnist", split="test", data_dir=shared_data / "tfds", download=False
    )
    for i in range(0, 10_000, 999):
        np.testing.assert_array_equal(source.test.x[i], data[i]["image"])
        assert source.test.y[i] == data[i]["label"]


def test_imdb(shared_data):
    source = real("tfds:imdb_reviews", shared_data / "tfds")
    assert source.kind == "text"
    assert source.class_names == ("neg", "pos")
    assert counts(source.train, source.validation) == [12_500] * 2
    assert counts(source.test) == [12_500] * 2
    assert all(isinstance(text, str) for text in source.train.x)
    named = real("tfds:imdb_reviews/plain_text:1.0.0", shared_data / "tfds")
    assert named.test.x[0] == source.test.x[0]


IMAGE = {
    "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
    "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
}
DEEP_IMAGE = {
    "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
    "image": {"dtype": "uint16", "shape": {"dimensions": ["-1", "-1", "1"]}},
}
TEXT = {
    "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
    "text": {},
}
LABEL = {
    "pythonClassName": (
        "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    ),
    "classLabel": {"numClasses": "2"},
}


def prepare(
    folder: pathlib.Path,
    features: dict[str, object],
    parts: dict[str, list[dict[str, bytes | int]]],
    file_format: str = "array_record",
) -> None:
    """Writes a folder as TFDS would, without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_parser

    Example = example_parser.tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    *_, name, version = folder.parts
    folder.mkdir(parents=True)
    described = {
        "pythonClassName": (
            "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        ),
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(described))
    infos = []
    for part, records in parts.items():
        file = folder / f"{name}-{part}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in records:
            example = Example()
            for key, value in record.items():
                feature = example.features.feature[key]
                if isinstance(value, bytes):
                    feature.bytes_list.value.append(value)
                else:
                    feature.int64_list.value.append(value)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append(
            {
                "name": part,
                "shardLengths": [str(len(records))],
                "numBytes": "1",
                "filepathTemplate": template,
            }
        )
    info = {"name": name, "version": version, "fileFormat": file_format}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": infos}))


def image_bytes(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


RGB = np.random.default_rng(1).integers(0, 256, (30, 5, 4, 3), dtype=np.uint8)
ROWS = [{"image": image_bytes(x), "label": i % 2} for i, x in enumerate(RGB)]
HIDDEN: list[dict[str, bytes | int]] = [{**row, "label": -1} for row in ROWS[:4]]
PICTURES: dict[str, object] = {"image": IMAGE, "label": LABEL}


def test_tfds_pixels_are_the_written_ones_in_colour(tmp_path):
    parts = {"train": ROWS[:20], "test": ROWS[20:], "unsupervised": HIDDEN}
    prepare(tmp_path / "mine/1.0.0", PICTURES, parts)
    source = load_source("tfds:mine", data_dir=tmp_path)
    np.testing.assert_array_equal(source.test.x, RGB[20:])
    assert sorted(keys(source.train) + keys(source.validation)) == sorted(
        x.tobytes() for x in RGB[:20]
    )
    assert source.test.y.tolist() == [0, 1] * 5


def test_tfds_takes_grey_pictures_and_jpegs_for_colour_ones(tmp_path):
    from PIL import Image

    pictures = [image_bytes(RGB[0], "JPEG"), image_bytes(RGB[1, :, :, 0])]
    rows = [{"image": picture, "label": i} for i, picture in enumerate(pictures)]
    prepare(tmp_path / "mine/1.0.0", PICTURES, {"train": ROWS, "test": rows})
    x = load_source("tfds:mine", data_dir=tmp_path).test.x
    np.testing.assert_array_equal(x[0], Image.open(io.BytesIO(pictures[0])))
    np.testing.assert_array_equal(x[1], np.repeat(RGB[1, :, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("parts", "expected_test"),
    [
        ({"train": ROWS[:20], "test": ROWS[20:22], "validation": ROWS[22:]}, 2),
        ({"train": ROWS[:20], "test": HIDDEN, "validation": ROWS[22:]}, 8),
        ({"train": ROWS[:20], "test": HIDDEN}, 4),
        ({"train": ROWS}, 6),
    ],
)
def test_tfds_sets_with_other_parts_get_a_test_part(parts, expected_test, tmp_path):
    prepare(tmp_path / "mine/1.0.0", PICTURES, parts)
    source = load_source("tfds:mine", data_dir=tmp_path)
    assert len(source.test.y) == expected_test
    assert source.test.y.min() == 0
    assert not set(keys(source.test)) & set(keys(source.train))


def test_the_newest_version_is_read_unless_one_is_named(tmp_path):
    rows = [{"text": b"text %d" % i, "label": i % 2} for i in range(50)]
    for version, size in (("9.0.0", 30), ("10.0.0", 40)):
        prepare(
            tmp_path / "mine" / version,
            {"text": TEXT, "label": LABEL},
            {"train": rows[:size]},
        )
    newest = load_source("tfds:mine", data_dir=tmp_path)
    oldest = load_source("tfds:mine:9.0.0", data_dir=tmp_path)
    assert sum(counts(*splits(newest))) == 40
    assert sum(counts(*splits(oldest))) == 30


@pytest.mark.parametrize(
    ("features", "parts", "match"),
    [
        (PICTURES, {"test": ROWS}, r"no examples in a part called 'train'.* test \(30"),
        (PICTURES, {"train": HIDDEN * 9}, "label -1 is not one of 0 to 1"),
        ({"image": IMAGE}, {"train": ROWS}, "no image or text classification set"),
        ({"label": LABEL}, {"train": ROWS}, "no image or text classification set"),
        (
            {**PICTURES, "again": IMAGE},
            {"train": ROWS},
            "one image or text and one class label, and has again, image, label",
        ),
        ({"image": DEEP_IMAGE, "label": LABEL}, {"train": ROWS}, "uint8 image"),
        (
            PICTURES,
            {"train": [*ROWS, {"image": image_bytes(RGB[0, 1:]), "label": 0}]},
            r"'train': images must all have one shape, got \[5, 4, 3\] and \[4, 4, 3",
        ),
        (
            PICTURES,
            {"train": [*ROWS, {"image": b"no picture", "label": 0}]},
            "'train', cannot be read: cannot identify image",
        ),
        (
            {"text": TEXT, "label": LABEL},
            {"train": [{"text": b"\xff", "label": 0}]},
            "'train', cannot be read: 'utf-8' codec",
        ),
    ],
)
def test_tfds_sets_that_do_not_fit_are_refused(features, parts, match, tmp_path):
    prepare(tmp_path / "mine/1.0.0", features, parts)
    refused("tfds:mine", match, data_dir=tmp_path)


def test_damaged_tfds_folders_are_refused(tmp_path):
    folder = tmp_path / "mine/1.0.0"
    prepare(folder, PICTURES, {"train": ROWS})
    file = next(folder.glob("*.array_record-*"))
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        file.write_bytes(content)
        refused("tfds:mine", "part 'train', cannot be read", data_dir=tmp_path)
    file.unlink()
    refused("tfds:mine", "part 'train', cannot be read", data_dir=tmp_path)
    (folder / "features.json").write_text("{")
    refused("tfds:mine", "1.0.0 cannot be read", data_dir=tmp_path)
    shutil.rmtree(folder)
    prepare(folder, PICTURES, {"train": ROWS}, file_format="tfrecord")
    refused(
        "tfds:mine", "not in the array_record format.*tfds build", data_dir=tmp_path
    )


def test_a_missing_tfds_set_names_the_command_or_the_folder(tmp_path):
    message = refused("tfds:cifar10", "There is no tfds:cifar10", data_dir=tmp_path)
    assert str(tmp_path) in message
    assert "tfds build cifar10 --file_format=array_record" in message
    assert "--data-dir" in message
    prepare(tmp_path / "mine/1.0.0", PICTURES, {"train": ROWS})
    refused("tfds:cifar10", "which holds mine", data_dir=tmp_path)
    refused("tfds:mines", "did you mean 'tfds:mine'", data_dir=tmp_path)
    refused("tfds:mnits", "did you mean 'tfds:mnist'", data_dir=tmp_path)
    refused("tfds:mine:2.0.0", "There is no tfds:mine:2.0.0", data_dir=tmp_path)
    refused("tfds:a/b/c", "NAME/CONFIG:VERSION", data_dir=tmp_path)
    refused("tfds:huggingface:mnist", "NAME/CONFIG:VERSION", data_dir=tmp_path)
    for config in ("one", "two"):
        shutil.copytree(tmp_path / "mine", tmp_path / "both" / config)
    refused("tfds:both", "name one: tfds:both/one, tfds:both/two", data_dir=tmp_path)


def test_the_environment_names_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    refused("tfds:cifar10", f"no tfds:cifar10 in {tmp_path}")


def test_tfds_is_read_without_the_network(tmp_path, monkeypatch):
    prepare(tmp_path / "mnist/3.0.1", PICTURES, {"train": ROWS})

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert len(load_source("tfds:mnist", data_dir=tmp_path).test.y) == 6
    refused("tfds:cifar10", "There is no", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("tensorflow_datasets", "tfds:mine", "tfds"),
        ("PIL.Image", "tfds:mine", "tfds"),
        ("sklearn.datasets", "digits", "continual"),
    ],
)
def test_a_missing_package_names_the_extra(module, name, extra, tmp_path, monkeypatch):
    prepare(tmp_path / "mine/1.0.0", PICTURES, {"train": ROWS})
    monkeypatch.setitem(sys.modules, module, None)
    match = rf'pip install "classp-jax\[{extra}\]"'
    refused(name, match, data_dir=tmp_path)


def test_importing_the_module_loads_no_reader():
    code = (
        "import sys; import classp_jax.continual.sources; "
        "print({'sklearn', 'tensorflow_datasets', 'PIL'} & {*sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


# Sources made by hand.


def by_hand(**changes: object) -> Source:
    x, y = np.zeros((4, 3, 3, 1), np.float32), np.array([0, 1, 0, 1], np.int32)
    split = Split(x, y)
    good = Source("mine", "image", split, split, split, ("a", "b"))
    return good._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "sound"}, "kind must be 'image' or 'text', got 'sound'"),
        ({"class_names": ("a",)}, "at least two classes"),
        ({"kind": "text"}, "texts must be str"),
        (
            {"test": Split(np.zeros((1, 3, 3)), np.array([0], np.int32))},
            "test part: images must",
        ),
        ({"test": Split(np.zeros((1, 3, 3, 1)), np.array([0]))}, "must be int32"),
        (
            {"test": Split(np.zeros((1, 3, 3, 1)), np.array([2], np.int32))},
            "label 2 is not one",
        ),
        (
            {"test": Split(np.zeros((1, 3, 3, 1)), np.array([0], np.int32))},
            "got float64",
        ),
        (
            {"test": Split(np.array(0.0), np.array([0], np.int32))},
            "has no examples, 1 labels",
        ),
    ],
)
def test_sources_made_by_hand_are_checked(changes, match):
    check_source(by_hand())
    with pytest.raises(SourceError, match=match):
        check_source(by_hand(**changes))
