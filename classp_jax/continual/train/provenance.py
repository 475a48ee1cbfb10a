"""Where a result comes from: time, machine, versions."""

import datetime
import importlib.metadata
import os
import platform

import jax

from classp_jax.continual.results.records import Provenance


def provenance(command: str | None = None) -> Provenance:
    """When, where and with what something is computed now."""
    names = ("classp-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Provenance(now, device_name(), versions, command)


def device_name() -> str:
    """The machine in words: the accelerator, or the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    count = getattr(os, "process_cpu_count", os.cpu_count)
    return f"CPU ({platform.machine()}, {count()} cores)"
