"""Faults, made on purpose: of machines, runs, checkpoints, devices, data and numbers.

    python benchmarks/faults.py

It takes tens of minutes on two cores, stores what came out in ``docs/faults.json`` and
writes the table of ``docs/scale.md``. ``--only WORD`` repeats the faults whose name has
the word in it, ``--page`` only writes the table. A fault is a function of an empty
folder that returns how often it was tried and what came out, and raises if that is not
what the page promises; add it to :data:`FAULTS`.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import faults_devices as devices
import faults_runs as runs
import jax
import page
from faults_common import Outcome

from classp_jax.continual.train.provenance import device_name

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "faults.json"

FAULTS: tuple[tuple[str, Callable[[pathlib.Path], Outcome]], ...] = (
    ("SIGKILL at a random moment of training", runs.killed_at_random),
    ("SIGKILL inside the write of a checkpoint", runs.killed_in_a_write),
    ("SIGKILL of two processes that train together", runs.two_killed),
    ("SIGTERM during training", runs.terminated),
    ("Disk full in the middle of a checkpoint", runs.disk_full),
    ("Disk full for one of two processes", runs.full_for_one_of_two),
    ("Unwritable folder", runs.not_writable),
    ("Checkpoint of another configuration", runs.other_configuration),
    ("File of a checkpoint cut off", runs.truncated),
    ("Bit of a checkpoint flipped", runs.flipped),
    ("All checkpoints damaged", runs.all_damaged),
    ("Restored onto another number of devices", runs.other_devices),
    ("Restored into another optimizer", runs.other_optimizer),
    ("Devices, runs and batches that do not divide", devices.do_not_divide),
    ("Unreachable coordinator", devices.absent_coordinator),
    ("Process that never comes", devices.absent_process),
    ("Batches whose source fails halfway", devices.reader_fails),
    ("Training data larger than memory would hold", devices.memory_of_batches),
    ('Batch of NaN, `nonfinite="stop"`', devices.nan_stops),
    ('Batch of NaN, `nonfinite="skip"`', devices.nan_is_skipped),
    ("float16 gradients that overflow", devices.overflow),
)


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    rows = [
        (name, results[name]["outcome"], str(results[name]["times"]))
        for name, _ in FAULTS
        if name in results
    ]
    return page.table(("fault", "what comes out", "tried"), rows, words=2)


def _stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _try(fault: Callable[[pathlib.Path], Outcome]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return fault(pathlib.Path(folder))


def main() -> int:
    """Does everything that was asked for; 1 if anything ended otherwise."""
    parser = argparse.ArgumentParser(description="Faults, tried on purpose.")
    parser.add_argument("--only", default="", help="faults with this word")
    parser.add_argument("--page", action="store_true", help="only write the table")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    failed = False
    for name, fault in () if options.page else FAULTS:
        if options.only.lower() not in name.lower():
            continue
        try:
            times, outcome = _try(fault)
        except Exception as error:
            failed = True
            print(f"{name}: NOT AS EXPECTED: {error!r}", flush=True)
            continue
        print(f"{name}: {times} times: {outcome}", flush=True)
        # Another process may have tried another fault meanwhile.
        results = _stored()
        results[name] = {
            "times": times,
            "outcome": outcome,
            "date": datetime.date.today().isoformat(),
            "device": device_name(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write(DOCS / "scale.md", {"faults": table(_stored())})
    print(table(_stored()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
