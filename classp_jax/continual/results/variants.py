"""Which runs belong together, what they are called, and how results are merged."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.records import Results, Run


class Variant(NamedTuple):
    """One method with one group of settings: a line of a table, a curve."""

    label: str
    """The method's name, with the settings that tell it from the method's others."""
    runs: tuple[Run, ...]
    """One per seed, by ascending seed."""

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def settings(self) -> dict[str, float | str]:
        return self.runs[0].settings


def variants(runs: Sequence[Run]) -> tuple[Variant, ...]:
    """Groups runs by method and settings, in the order in which they first appear.

    Two runs of one method, seed and group of settings whose outcomes differ, as on two
    machines or after a change of the method's code, are a variant each.

    Example:
      >>> runs = [Run(method="classp", seed=0, settings={"eps": eps, "power": 1.0},
      ...             matrix=[[0.1], [0.9]]) for eps in (1e-3, 0.5)]
      >>> [variant.label for variant in variants(runs)]
      ['classp (eps=0.001)', 'classp (eps=0.5)']
    """
    groups: dict[Any, list[Run]] = {}
    repeats: collections.Counter[Any] = collections.Counter()
    for run in runs:
        group = (run.method, frozenset(run.settings.items()))
        repeats[group, run.seed] += 1
        groups.setdefault((*group, repeats[group, run.seed]), []).append(run)
    siblings: dict[str, list[dict[str, Any]]] = {}
    for (method, _, repeat), group in groups.items():
        siblings.setdefault(method, []).append(
            group[0].settings | ({"repeat": repeat} if repeat > 1 else {})
        )
    following = {method: iter(_distinctions(s)) for method, s in siblings.items()}
    return tuple(
        Variant(
            f"{method} ({difference})"
            if (difference := next(following[method]))
            else method,
            tuple(sorted(group, key=lambda run: run.seed)),
        )
        for (method, _, _), group in groups.items()
    )


def _distinctions(siblings: list[dict[str, Any]]) -> list[str]:
    """What tells each of a method's groups of settings from the others."""
    names = dict.fromkeys(name for settings in siblings for name in settings)
    differing = [
        name
        for name in names
        if any(s.get(name) != siblings[0].get(name) for s in siblings)
    ]

    def texts(number: str) -> list[str]:
        return [
            ", ".join(
                f"{name}={settings[name]:{number}}"
                if isinstance(settings[name], float)
                else f"{name}={settings[name]}"
                for name in differing
                if name in settings
            )
            for settings in siblings
        ]

    short = texts("g")
    return short if len(set(short)) == len(short) else texts("")


def merge(parts: Sequence[Results]) -> Results:
    """Puts runs over the same stream, trained the same way, together.

    Args:
      parts: one or more results.

    Returns:
      Every run of every part, in order. A run that is there already, with the same
      method, settings, seed and outcome to the last bit, is kept once, the first as it
      is; only an ``ulp_spread`` that it lacks is taken from the other.

    Raises:
      ResultsError: if there is no part, or the parts' data, network or training
        differ; the message is one line that says in what.
    """
    if not parts:
        raise ResultsError("There are no results to merge.")
    first = parts[0]
    runs: dict[Any, Run] = {}
    params = {}
    for part in parts:
        if differences := _differences(first, part):
            raise ResultsError(
                "Only results of the same data, network and training can stand "
                f"together; here {'; '.join(differences)}."
            )
        for run in part.runs:
            known = runs.setdefault(_outcome(run), run)
            if known.ulp_spread is None and run.ulp_spread is not None:
                runs[_outcome(run)] = dataclasses.replace(
                    known, ulp_spread=run.ulp_spread
                )
        params = part.params | params
    return dataclasses.replace(first, runs=tuple(runs.values()), params=params)


def _outcome(run: Run) -> Any:
    """What makes a run another run: all but time and provenance, with NaN equal."""
    fields = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name
        not in ("settings", "seconds", "compile_seconds", "ulp_spread", "provenance")
    }
    return msgspec.json.encode(fields), frozenset(run.settings.items())


def _differences(a: Results, b: Results) -> list[str]:
    first, second = (
        {"stream": plain(r.stream), **plain(r.configuration)} for r in (a, b)
    )
    return differences(first, second)


_MEANINGS = {
    "fingerprint": " (the data differ)",
    "program": " (the networks differ, or JAX traces them otherwise)",
}
"""Said after a hash, which tells nobody anything."""


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two nested tables of JSON's types, in words.

    Example:
      >>> differences({"training": {"epochs": 1}}, {"training": {"epochs": 2}})
      ['training.epochs is 1 and 2']
    """
    first, second = _flat(a), _flat(b)
    names = [
        name
        for name in dict.fromkeys([*first, *second])
        if first.get(name, _ABSENT) != second.get(name, _ABSENT)
    ]
    texts = [
        f"{name} is {_short(first.get(name, _ABSENT))} and "
        f"{_short(second.get(name, _ABSENT))}"
        + _MEANINGS.get(name.rpartition(".")[2], "")
        for name in names
    ]
    return texts if len(texts) <= 3 else [*texts[:3], f"and {len(texts) - 3} more"]


class _Absent:
    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with names such as ``training.epochs``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: tuples as lists, numpy's as Python's."""
    return msgspec.json.decode(encode(value))


def encode(value: Any) -> bytes:
    """JSON, with NaN as null and arrays as lists.

    Raises:
      ResultsError: if something in it has no place in JSON.
    """
    try:
        return msgspec.json.encode(value, enc_hook=_encode_other)
    except (TypeError, ValueError, OverflowError) as error:
        raise ResultsError(f"These results cannot be stored: {error}.") from None


def _encode_other(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def is_undefined(value: Any) -> bool:
    """Whether a cell has nothing to show: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
