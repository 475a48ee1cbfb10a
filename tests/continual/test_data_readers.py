"""Readers: what is read is what is there, bad data is refused in one line."""

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

from classp_jax.continual.data.arrays import Split
from classp_jax.continual.data.readers import SOURCES, read_source
from classp_jax.continual.data.streams import sequence
from classp_jax.continual.errors import DataError

# From the publications: LeCun et al. (labels counted), Xiao et al., Maas et al. and
# Malo et al. The means are the ones everybody normalises with.
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def counts(*parts: Split) -> list[int]:
    return np.bincount(np.concatenate([part.labels() for part in parts])).tolist()


def keys(split: Split) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in split.inputs()]


def refused(name: str, match: str, **kwargs: Any) -> str:
    """The message of a refusal: one line that says what the test expects."""
    with pytest.raises(DataError, match=match) as caught:
        read_source(name, **kwargs)
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
    source = read_source("digits")
    found = Counter(
        pair
        for part in (source.train, source.test)
        for pair in zip(keys(part), part.labels().tolist(), strict=True)
    )
    assert found == expected
    assert source.train.x is source.test.x
    assert source.train.x.dtype == np.uint8
    assert source.train.y.dtype == np.int32
    assert source.class_names == tuple("0123456789")
    assert (len(source.train), len(source.test)) == (1438, 359)


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
    # Longer sides could look like images with the channels first, which are refused.
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    dtypes = [np.float16, np.float32, np.float64]
    dtypes += [np.uint8] if len(shape) > 1 else [np.int64]
    dtype = data.draw(st.sampled_from(dtypes))
    numbers = st.integers(0, 255) if dtype in dtypes[3:] else st.floats(-9, 9, width=16)
    x_train = data.draw(hnp.arrays(dtype, (12, *shape), elements=numbers))
    x_test = data.draw(hnp.arrays(dtype, (5, *shape), elements=numbers))
    y = np.array(data.draw(st.permutations([0, 1, 2] * 4)))
    y = y.astype(data.draw(st.sampled_from([np.uint8, np.int64])))
    column = y[:, None] if data.draw(st.booleans()) else y
    folder = tmp_path_factory.mktemp("npz")
    name = saved(folder, x_train=x_train, y_train=column, x_test=x_test, y_test=y[:5])
    source = read_source(name)
    full = (*shape, 1) if len(shape) == 2 else shape
    expected = {np.uint8: np.uint8, np.int64: np.int32}.get(dtype, np.float32)
    kinds = {(True, True): "text", (True, False): "vector"}
    is_vector, is_integer = len(shape) == 1, dtype == np.int64
    assert source.kind == kinds.get((is_vector, is_integer), "image")
    assert source.class_names == ("0", "1", "2")
    for part, x, labels in (
        (source.train, x_train, y),
        (source.test, x_test, y[:5]),
    ):
        assert part.x.dtype == expected
        np.testing.assert_array_equal(part.inputs(), x.reshape(-1, *full))
        np.testing.assert_array_equal(part.labels(), labels)


BLANK = np.zeros((20, 5, 4), np.float32)
WITH_NAN = BLANK.copy()
WITH_NAN[7, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y_test": None}, "has no y_test; needed: x_train, .* found: x_train, y_t"),
        ({"x_train": np.zeros((20, 5), np.uint8)}, "x_train: .* pixels or tokens"),
        ({"x_train": np.zeros(20)}, r"x_train: must be images .* got shape \[20\]"),
        ({"x_train": np.zeros((20, 5, 4), np.int64)}, "x_train: .* uint8 or .* int64"),
        ({"x_train": np.zeros((20, 5, 4), "U3")}, "x_train: .* uint8 or .* <U3"),
        ({"x_train": np.zeros((20, 5, 4), object)}, "allow_pickle"),
        ({"x_train": np.zeros((20, 4), "U3")}, "x_train: vectors must be uint8 or "),
        ({"x_train": -np.ones((20, 4), int)}, "x_train: tokens .* got -1 to -1"),
        ({"x_train": np.zeros((19, 5, 4), np.uint8)}, "x_train has 19 .* y_train 20 l"),
        ({"x_train": np.zeros((20, 0, 4), np.uint8)}, "training part: is empty"),
        ({"x_train": np.zeros((0, 5, 4), np.uint8), "y_train": []}, "two classes"),
        ({"x_test": np.zeros((0, 5, 4), np.uint8), "y_test": []}, "test part: is emp"),
        ({"x_test": np.zeros((6, 5, 5), np.uint8)}, r"test example .*5, 5, 1.*5, 4, 1"),
        ({"x_test": np.zeros((6, 5, 4), np.float32)}, "test example .*float32.*uint8"),
        ({"x_test": np.zeros((5, 5, 4), np.uint8)}, "x_test has 5 .* y_test 6 labels"),
        ({"y_train": np.arange(20) / 2}, "y_train: labels must be integers.*float64"),
        ({"y_train": np.arange(20) - 3}, "y_train: .* 0, 1.* got -3 at example 0"),
        ({"y_train": np.zeros((20, 2), int)}, r"integers \[n\], got int64 \[20, 2\]"),
        ({"y_train": np.zeros(20, int)}, "at least two classes"),
        ({"y_train": np.arange(20) * 10**6}, "19000000 among 20 examples"),
        ({"y_train": np.arange(20) * 2**40}, "y_train: labels must be 0, 1, 2"),
        ({"y_test": np.arange(6)}, "test part: label 3 of example 3 is not .* 0 to 2"),
        # The numbers of examples are those of the user's arrays.
        ({"x_train": WITH_NAN, "x_test": BLANK[:6]}, "x_train: example 7 holds NaN"),
        ({"x_train": BLANK, "x_test": WITH_NAN[2:8]}, r"x_test: example 5 .*\(1 of 6"),
        ({"x_train": BLANK, "x_test": BLANK[:6] - np.inf}, r"x_test: .*\(6 of 6"),
        ({"x_train": BLANK, "x_test": np.full((6, 5, 4), 1e39)}, "NaN or infinite"),
    ],
)
def test_bad_arrays_are_refused(changes, match, tmp_path):
    refused(saved(tmp_path, **changes), match)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (4, 48, 64)])
def test_images_with_their_channels_first_are_refused(shape, tmp_path):
    x = np.zeros((6, *shape), np.uint8)
    name = saved(tmp_path, x_train=x, x_test=x, y_train=[0, 1] * 3, y_test=[0, 1] * 3)
    refused(name, r"x_train: shape .* looks like \[n, channels, .*moveaxis\(x, 1, -1")


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (1, 128, 9), (4, 4, 64)])
def test_images_that_are_low_or_deep_are_taken(shape, tmp_path):
    x = np.zeros((6, *shape), np.uint8)
    name = saved(tmp_path, x_train=x, x_test=x, y_train=[0, 1] * 3, y_test=[0, 1] * 3)
    assert read_source(name).train.x.shape == x.shape


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
        source = read_source(f"npz:{path}")
    except DataError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert source.kind == "image"
        assert len(source.train) + len(source.test) == 26


# tsv files.

WORDS = st.text("abc dé.,'\"\\", min_size=1).map(str.strip).filter(bool)


@given(rows=st.lists(st.tuples(st.sampled_from("zyx"), WORDS), min_size=1))
@settings(deadline=None, max_examples=60)
def test_tsv_keeps_the_first_line_of_every_text(rows, tmp_path_factory):
    rows = [*rows, *(("xyz"[i % 3], f"filler {i}") for i in range(30))]
    path = tmp_path_factory.mktemp("tsv") / "texts.tsv"
    lines = "".join(f"{label}\t{text}\n" for label, text in rows)
    path.write_text(lines, encoding="utf-8")
    source = read_source(f"tsv:{path}")
    expected: dict[str, str] = {}
    for label, text in rows:
        if text not in expected:
            expected[text] = label
    found = [
        (text, source.class_names[label])
        for part in (source.train, source.test)
        for text, label in zip(part.inputs(), part.labels(), strict=True)
    ]
    assert source.kind == "text"
    assert source.class_names == tuple(sorted(set(expected.values())))
    assert dict(found) == expected
    assert len(found) == len(expected)
    assert len(source.test) == len(expected) // 5


def test_tsv_takes_windows_files_tabs_in_texts_and_blank_lines(tmp_path):
    path = tmp_path / "texts.tsv"
    rows = "".join(f"{'ab'[i % 2]}\ttext {i}\twith a tab\r\n\r\n" for i in range(20))
    path.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    source = read_source(f"tsv:{path}")
    assert source.class_names == ("a", "b")
    texts = {*source.train.inputs(), *source.test.inputs()}
    assert texts == {f"text {i}\twith a tab" for i in range(20)}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"a\tgood\nno tab here\n", "line 2: expected a label, a tab and a text"),
        (b"a\tgood\n\nb\t \n", "line 3: expected a label, a tab and a text"),
        (b"a\tgood\n\ttext\n", "line 2: expected a label"),
        (b"a\tgood\nb\t\xff\xfe\n", "is no UTF-8 text"),
        (b"a\tone\na\ttwo\nb\tthree", "3 examples are too few to hold 20% out"),
        (b"label\ttext\na\tone\nb\ttwo\n", "line 1: .*'label'; delete .*header"),
        (b"".join(b"a\ttext %d\n" % i for i in range(50)), "at least two classes"),
    ],
)
def test_bad_tsv_files_are_refused(content, match, tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_bytes(content)
    refused(f"tsv:{path}", match)
    refused(f"tsv:{tmp_path / 'none.tsv'}", "There is no file")


def test_phrasebank(shared_data):
    source = read_source(f"tsv:{shared_data / 'phrasebank_50agree.tsv'}")
    # 4,846 sentences, of which 8 stand there twice, 2 of them with two labels.
    assert source.class_names == ("negative", "neutral", "positive")
    found = counts(source.train, source.test)
    assert sum(found) == 4838
    gone = np.subtract([604, 2879, 1363], found)
    assert gone.min() >= 0
    assert gone.sum() == 8
    assert not {*source.train.inputs()} & {*source.test.inputs()}


# TFDS.


def test_mnist(shared_data):
    import tensorflow_datasets as tfds

    source = read_source("tfds:mnist", shared_data / "tfds")
    assert counts(source.train) == MNIST_TRAIN
    assert counts(source.test) == MNIST_TEST
    pixels = source.train.x
    assert pixels.shape == (60_000, 28, 28, 1)
    assert pixels.dtype == np.uint8
    assert pixels.mean() / 255 == pytest.approx(0.1306604762738429, abs=1e-12)
    assert pixels.std() / 255 == pytest.approx(0.3081078038564622, abs=1e-12)
    assert source.class_names == tuple("0123456789")
    data: Any = tfds.data_source(
        "mnist", split="test", data_dir=shared_data / "tfds", download=False
    )
    for i in range(0, 10_000, 999):
        np.testing.assert_array_equal(source.test.x[i], data[i]["image"])
        assert source.test.y[i] == data[i]["label"]


def test_phrasebank_then_imdb(shared_data):
    bank = f"tsv:{shared_data / 'phrasebank_50agree.tsv'}"
    maker = sequence(
        [bank, "tfds:imdb_reviews"],
        vocabulary_size=5000,
        data_dir=shared_data / "tfds",
    )
    stream, other = maker(0), maker(1)
    assert (stream.kind, stream.num_classes, stream.vocabulary_size) == (
        "text",
        3,
        5000,
    )
    assert [task.name for task in stream.tasks] == [
        "phrasebank_50agree",
        "imdb_reviews",
    ]
    imdb = stream.tasks[1]
    assert counts(imdb.train, imdb.validation) == counts(imdb.test) == [12_500] * 2
    for task, again in zip(stream.tasks, other.tasks, strict=True):
        assert task.train.x is again.train.x
        for x in (task.train.x, task.test.x):
            assert 0 <= x.min() <= x.max() < 5000
            # Every text has a word, and padding stands only behind the words.
            assert (x[:, 0] > 0).all()
            assert (np.diff((x == 0).astype(int)) >= 0).all()
    # The most frequent word of English texts is the first one.
    tokens, texts = stream.tasks[0].train.x, read_source(bank).train.x
    the = ["the" in text.lower().split()[:20] for text in texts]
    assert (tokens[the] == 2).any(axis=1).all()


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
    source = read_source("tfds:mine", data_dir=tmp_path)
    np.testing.assert_array_equal(source.test.x, RGB[20:])
    np.testing.assert_array_equal(source.train.x, RGB[:20])
    assert source.test.y.tolist() == [0, 1] * 5


def test_tfds_takes_grey_pictures_and_jpegs_for_colour_ones(tmp_path):
    from PIL import Image

    pictures = [image_bytes(RGB[0], "JPEG"), image_bytes(RGB[1, :, :, 0])]
    rows = [{"image": picture, "label": i} for i, picture in enumerate(pictures)]
    prepare(tmp_path / "mine/1.0.0", PICTURES, {"train": ROWS, "test": rows})
    x = read_source("tfds:mine", data_dir=tmp_path).test.x
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
    source = read_source("tfds:mine", data_dir=tmp_path)
    assert len(source.test) == expected_test
    assert source.test.labels().min() == 0
    assert not set(keys(source.test)) & set(keys(source.train))


def test_the_newest_version_is_read_unless_one_is_named(tmp_path):
    rows = [{"text": b"text %d" % i, "label": i % 2} for i in range(50)]
    for version, size in (("9.0.0", 30), ("10.0.0", 40)):
        prepare(
            tmp_path / "mine" / version,
            {"text": TEXT, "label": LABEL},
            {"train": rows[:size]},
        )
    newest = read_source("tfds:mine", data_dir=tmp_path)
    oldest = read_source("tfds:mine:9.0.0", data_dir=tmp_path)
    assert len(newest.train.y) == 40
    assert len(oldest.train.y) == 30


@pytest.mark.parametrize(
    ("features", "parts", "match"),
    [
        (PICTURES, {"test": ROWS}, r"no examples in a part called 'train'.* test \(30"),
        (PICTURES, {"train": HIDDEN * 9}, "label -1 of example 0 is not .* 0 to 1"),
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
    assert len(read_source("tfds:mnist", data_dir=tmp_path).test) == 6
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
        "import sys; import classp_jax.continual.data.streams; "
        "print({'sklearn', 'tensorflow_datasets', 'PIL'} & {*sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"
