"""Text files of labelled texts."""

import pathlib
from collections import Counter

import numpy as np

from classp_jax.continual.data.readers._common import first_line, open_error
from classp_jax.continual.data.sources import Examples, Source, make_source
from classp_jax.continual.errors import DataError


def read_tsv(path_text: str) -> Source:
    """The texts of a UTF-8 file, one per line: label, tab, text; no header row.

    Of texts that occur more than once the first line counts, whatever the labels of the
    others. Labels are numbered in the order of their names.
    """
    path = pathlib.Path(path_text).expanduser()
    label_of: dict[str, str] = {}
    lines_of: Counter[str] = Counter()
    first: tuple[int, str] | None = None
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                label, _, text = (part.strip() for part in line.partition("\t"))
                if not (label and text):
                    raise DataError(
                        f"{path}, line {number}: expected a label, a tab and a text."
                    )
                first = first or (number, label)
                lines_of[label] += 1
                label_of.setdefault(text, label)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {first_line(error)}") from error
    except OSError as error:
        raise open_error(path, error) from error
    if first is None:
        raise DataError(f"{path} is empty.")
    if lines_of[first[1]] == 1:
        raise DataError(
            f"{path}, line {first[0]}: no other line has the label {first[1]!r}; "
            "delete it if it is a header row, else give the class more examples."
        )
    class_names = sorted(set(label_of.values()))
    number_of = {label: number for number, label in enumerate(class_names)}
    texts = np.empty(len(label_of), object)
    texts[:] = list(label_of)
    labels = np.array([number_of[label] for label in label_of.values()], np.int32)
    return make_source(
        f"tsv:{path_text}", Examples("text", texts, labels), None, class_names
    )
