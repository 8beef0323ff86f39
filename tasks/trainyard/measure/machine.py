"""What a measurement says about the machine it was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from trainyard.lanes.neuron_device import driver_version


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, kernel, Neuron driver and the load of this machine.

    `neuron_driver` is empty where there is none. `load_1min` is the number of processes that wanted
    to run over the last minute: figures that were measured beside other work say so.
    """
    return {
        "processor": _processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(logical=True),
        "usable_threads": len(psutil.Process().cpu_affinity() or ()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "machine": platform.machine(),
        "kernel": f"{platform.system()} {platform.release()}",
        "neuron_driver": driver_version(),
        "host": platform.node(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor()
