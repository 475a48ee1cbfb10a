"""What is compared, at which new abilities, with how many trials and seeds."""

from typing import NamedTuple


class Plan(NamedTuple):
    """The comparison of a problem."""

    targets: tuple[float, ...]
    """The new abilities at which methods are compared: % of test data, or -100 nats."""
    margin: float
    """How far beyond the target a chosen setting got on validation data."""
    trials: int = 8
    """Of every method."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """What is reported."""


PLANS = {
    "fashion": Plan((65.0, 70.0), 5.0),
    "digits": Plan((95.0,), 1.0),
    "language": Plan((-540.0,), 5.0, trials=6),
}

SOURCES = {"fashion": "protect(AdamW), frozen", "language": "CLASSP, filled"}
"""With which method importance from other sources is tried."""

TUNING_SEED = 1000

OLD_EXAMPLES = 1000
"""How many old examples importance and Fisher diagonals are measured on."""
