"""Whole training steps of large decoders, compiled for slices of TPUs; none is run.

``python benchmarks/scale.py`` compiles what ``docs/scale.json`` lacks (extra
``tpu-compiler``; minutes per step, and it may be stopped and started again) and writes
the table of ``docs/scale.md``; ``--page`` only writes the table.
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import ahead
import decoder
import jax
import jax.numpy as jnp
import optax
import page
from jax.sharding import NamedSharding, PartitionSpec

import classp_jax
from classp_jax import regularizers

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "scale.json"
MODELS = ("1B", "7B")
SLICES = (
    "v5e:2x4",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x2",
    "v5p:4x4x4",
    "v5p:4x8x8",
)
BASELINE = "sgd"


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Every contestant by name, the baseline first."""
    classp, adamw = classp_jax.classp(0.1), optax.adamw(1e-3)
    return {
        BASELINE: optax.sgd(0.1),
        "classp": classp,
        "adamw": adamw,
        "protect(adamw)": classp_jax.protect(adamw),
        "ewc, classp": optax.chain(regularizers.ewc(1.0), classp),
        "adagrad": optax.adagrad(0.1),
    }


def work() -> Iterator[tuple[str, str, str, str]]:
    """What is to be compiled, the quick ones first: part, model, slice, optimizer."""
    for part in ("update", "step"):
        for model, slice_ in itertools.product(MODELS[::-1], SLICES):
            yield from ((part, model, slice_, name) for name in optimizers())


def lowered(part: str, model: str, slice_: str, name: str) -> Any:
    """A ``step`` (loss, gradients, update) to compile, or its ``update`` alone.

    Parameters and state are donated.
    """
    size, chips = decoder.SIZES[model], ahead.mesh(f"tpu:{slice_}")
    loss = decoder.loss_function(size, chips)
    params = decoder.parameters(size)
    shardings = decoder.shardings(chips, params)
    tx = optimizers()[name]

    def update(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        return *update(params, state, gradients), value

    state = jax.eval_shape(tx.init, params)
    tokens = jax.ShapeDtypeStruct(
        (chips.size, size.tokens),
        jnp.int32,
        sharding=NamedSharding(chips, PartitionSpec(ahead.AXIS)),
    )
    params, state = ahead.placed((params, state), params, shardings, chips)
    function, last = (step, tokens) if part == "step" else (update, params)
    return jax.jit(function, donate_argnums=(0, 1)).lower(params, state, last)


def measure(part: str, model: str, slice_: str, name: str) -> dict[str, Any]:
    """One cell: bytes per chip and collectives, or that it does not fit."""
    start = time.perf_counter()
    cell: dict[str, Any] = {
        "part": part,
        "model": model,
        "slice": slice_,
        "optimizer": name,
    }
    try:
        step = lowered(part, model, slice_, name)
        module, text = ahead.compiled_with_text(step)
        memory = module.memory_analysis()
        cell |= {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "collectives": ahead.collectives(text),
        }
    except jax.errors.JaxRuntimeError as error:
        if "Ran out of memory" not in str(error):
            raise
        print(error)
        used, there = _needed_and_available(str(error))
        cell |= {"needs": used, "has": there}
    seconds = round(time.perf_counter() - start)
    return cell | ahead.provenance() | {"seconds to compile": seconds}


def _needed_and_available(error: str) -> tuple[str, str]:
    """What a message of the compiler says: of all memory, or of temporaries alone."""
    for form in (r"Used (\S+) of (\S+) hbm", r"\((\S+)\) exceeds .*HBM \((\S+)\)"):
        if found := re.search(form, error):
            return found[1], found[2]
    raise ValueError(f"No sizes are in the compiler's message: {error}")


def load() -> list[dict[str, Any]]:
    """The stored cells."""
    if not RESULTS.exists():
        return []
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def chips(slice_: str) -> str:
    """A slice in words, such as ``8 v5e``."""
    kind, _, shape = slice_.partition(":")
    return f"{math.prod(int(n) for n in shape.split('x'))} {kind}"


def tables(cells: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of ``docs/scale.md``; what is not compiled yet is left out."""
    found = {(cell["part"], cell["model"], cell["slice"]): {} for cell in cells}
    for cell in cells:
        place = (cell["part"], cell["model"], cell["slice"])
        found[place][cell["optimizer"]] = cell
    updates, steps = [], []
    for model, slice_ in itertools.product(MODELS, SLICES):
        if row := found.get(("update", model, slice_)):
            updates.append(
                [model, chips(slice_)]
                + [
                    _gib(row[name]["arguments"]) if name in row else ""
                    for name in optimizers()
                ]
                + [_gib(max(cell["temporary"] for cell in row.values()))]
                + [str(sum(sum(cell["collectives"].values()) for cell in row.values()))]
            )
        row = found.get(("step", model, slice_), {})
        for name in (name for name in optimizers() if name in row):
            steps.append(
                [
                    model,
                    chips(slice_),
                    f"`{name}`",
                    *_step(row[name], row.get(BASELINE)),
                ]
            )
    names = [f"`{name}`" for name in optimizers()]
    return {
        "updates": page.table(
            ["model", "chips", *names, "temporary", "collectives"], updates, words=2
        ),
        "steps": page.table(
            ["model", "chips", "optimizer", "arguments", "temporary", "added"],
            steps,
            words=3,
        ),
    }


def _step(cell: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    if "needs" in cell:
        return [f"does not fit: {cell['needs']} of {cell['has']}", "", ""]
    added = _added(cell["collectives"], (baseline or {}).get("collectives", {}))
    return [_gib(cell["arguments"]), _gib(cell["temporary"]), added]


def _added(here: dict[str, int], there: dict[str, int]) -> str:
    """The collectives that the baseline's step does not have."""
    more = {kind: here.get(kind, 0) - there.get(kind, 0) for kind in {**here, **there}}
    return ", ".join(f"{n:+d} {kind}" for kind, n in more.items() if n) or "0"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def main() -> None:
    """Compiles what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the tables")
    only_page = parser.parse_args().page
    cells = load()
    done = {(c["part"], c["model"], c["slice"], c["optimizer"]) for c in cells}
    for place in work():
        if only_page or place in done:
            continue
        cells.append(measure(*place))
        RESULTS.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
        print(cells[-1], flush=True)
    page.write(DOCS / "scale.md", tables(cells))


if __name__ == "__main__":
    main()
