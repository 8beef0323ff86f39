"""What an environment needs of this machine: toolchain, devices, driver, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

from trainyard.doctor.cluster_checks import Served
from trainyard.doctor.report import Check, fail, failed, ok, warn
from trainyard.errors import TrainyardError
from trainyard.lanes.neuron_device import driver_version
from trainyard.lanes.neuron_support import driver_problem
from trainyard.lanes.registry import get_lane
from trainyard.settings import Settings

LEAST_FREE_GIB = 5.0
"""Below it nothing worth serving can be restored."""


def local_checks(
    settings: Settings,
    served: Sequence[Served],
    *,
    driver: Callable[[], str] = driver_version,
) -> Iterator[Check]:
    """Yield all that is looked at on this machine."""
    for lane in sorted({each.target.lane for each in served}):
        name = f"toolchain: {lane}"
        try:
            found = get_lane(lane).toolchain(settings.serving_interpreter)
        except TrainyardError as error:
            yield failed(name, error)
            continue
        versions = ", ".join(f"{package} {version}" for package, version in sorted(found.items()))
        yield ok(name, f"{settings.serving_interpreter} has {versions}.")
    yield from _driver(served, driver())
    folder = settings.home if settings.home.exists() else settings.home.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_FREE_GIB:
        yield fail("disk", f"{free:.1f} GiB are free at {folder}.", "Free some space.")
    else:
        yield ok("disk", f"{free:.0f} GiB are free at {folder}.")


def _driver(served: Sequence[Served], driver: str) -> Iterator[Check]:
    sdks = sorted({each.target.neuron.sdk for each in served if each.target.neuron})
    for sdk in sdks:
        problem = driver_problem(sdk, driver) if driver else ""
        if not driver:
            yield warn(
                "driver",
                f"This machine has no Neuron driver, and SDK {sdk} needs one to serve.",
                "Run it on a node with devices; only `compile.on: cpu` can do without.",
            )
        elif problem:
            yield fail("driver", problem)
        else:
            yield ok("driver", f"Nothing is known against driver {driver} with SDK {sdk}.")
