"""Where an optimizer state keeps accumulators."""

from typing import Any

import jax


def accumulators_in(state: Any) -> list[Any]:
    """Every accumulator tree within a state."""
    found = []
    map_accumulators(found.append, state)
    return found


def map_accumulators(function: Any, state: Any, *others: Any) -> Any:
    """The state with ``function`` of its and the others' accumulators, tree by tree.

    States may stand in one another.
    """

    def is_accumulating(node: Any) -> bool:
        return "accumulator" in getattr(type(node), "_fields", ())

    def mapped(*nodes: Any) -> Any:
        if not is_accumulating(nodes[0]):
            return nodes[0]
        fields = [node._asdict() for node in nodes]
        sums = function(*[field.pop("accumulator") for field in fields])
        rest = map_accumulators(function, *fields)
        return nodes[0]._replace(accumulator=sums, **rest)

    return jax.tree.map(mapped, state, *others, is_leaf=is_accumulating)


def no_accumulator() -> ValueError:
    """For a state that does not hold what is needed."""
    return ValueError(
        "This optimizer state holds no CLASSP accumulator: it does not come from "
        "classp, protect, classp_published or scale_by_generalized_adagrad."
    )
