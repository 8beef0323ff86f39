"""Errors of accelerators, as neuron-monitor's exporter for Prometheus counts them.

==============================  =============  =====================================================
series                          label          whose
==============================  =============  =====================================================
`execution_errors_total`        `error_type`   of a process; `runtime_tag` is its
                                               `NEURON_PROCESS_TAG`, which is the release
`hardware_ecc_events_total`     `event_type`   of a device, so of everything on the machine
==============================  =============  =====================================================

The exporter adds the newest report to its counters every five seconds, whether or not there is a
newer one, so only "more than before" means something, not how much more. While no process uses a
device it has no series at all: that is no data, and no zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from math import isfinite

from trainyard.documents.look import DeviceCounters
from trainyard.rollout.readers.counters import Sample
from trainyard.spec.metrics import MetricLabels

EXECUTION_ERRORS = "execution_errors_total"
ECC_EVENTS = "hardware_ecc_events_total"
DEVICE_SERIES = (EXECUTION_ERRORS, ECC_EVENTS)

_KINDS = {EXECUTION_ERRORS: ("execution", "error_type"), ECC_EVENTS: ("ecc", "event_type")}
_PROCESS_TAG = "runtime_tag"


def device_counters(
    samples: Iterable[Sample], labels: MetricLabels, releases: Set[str]
) -> tuple[DeviceCounters, ...]:
    """Return the errors of the releases' processes and of the devices, summed over devices.

    Args:
        samples: of the exporter's series, at about one moment.
        labels: which of them tell release and node.
        releases: whose processes count.
    """
    sums: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for sample in samples:
        group, label = _KINDS.get(sample.name, ("", ""))
        place, kind = sample.labels.get(labels.node, ""), sample.labels.get(label, "")
        if not group or not place or not kind or not isfinite(sample.value) or sample.value < 0:
            continue
        release_id = ""
        if sample.name == EXECUTION_ERRORS:
            release_id = sample.labels.get(labels.release) or sample.labels.get(_PROCESS_TAG, "")
            if release_id not in releases:
                continue
        sums[place, release_id][f"{group}/{kind}"] += int(sample.value)
    return tuple(
        DeviceCounters(place=place, release_id=release_id, errors=dict(sorted(errors.items())))
        for (place, release_id), errors in sorted(sums.items())
    )
