"""The section of the documentation on data of one's own runs as it stands."""

import pathlib
import re

import numpy as np
import pytest

from classp_jax.continual.data.streams import StreamMaker

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "experiments.md"


def test_the_examples_on_own_data_run(capsys):
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("## Your own data\n")[1].split("\n## ")[0]
    first, *others = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    printed = capsys.readouterr().out
    assert "arrays, task 1: 300 vectors (60 for testing), float32 [16]" in printed
    assert "sgd" in printed
    assert "classp" in printed
    for code in others:
        exec(code, names)
    maker = names["stream"]
    assert isinstance(maker, StreamMaker)
    assert [task.name for task in maker(0).tasks] == ["digits", "digits (2)"]
    assert np.all([len(task.train) == 1295 for task in maker(0).tasks])
