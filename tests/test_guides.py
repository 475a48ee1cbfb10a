"""The code of the guides runs, from top to bottom, in one namespace a page."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax
from tests.continual import forks

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["your-own-loop.md", "checkpoints.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: pathlib.Path):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": forks.QUICK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_limit_of_bad_steps_that_is_shown_is_never_reached():
    text = (DOCS / "your-own-loop.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"max_consecutive_errors=(.*)\)", text)
    assert shown == "2**31 - 1"
    good, bad = jnp.array([1.0, 1.0]), jnp.array([jnp.nan, 1.0])

    def after_three(limit: int, count: int = 0) -> Any:
        tx: Any = optax.apply_if_finite(classp_jax.classp(0.1), limit)
        update = jax.jit(tx.update)
        _, state = update(good, tx.init(good))
        state = state._replace(notfinite_count=jnp.asarray(count, jnp.int32))
        for _ in range(3):
            _, state = update(bad, state)
        return classp_jax.accumulators(state)

    assert np.isnan(after_three(2)[0])  # what the page warns of
    for count in (0, 2**31 - 3):
        np.testing.assert_array_equal(after_three(2**31 - 1, count), good)
