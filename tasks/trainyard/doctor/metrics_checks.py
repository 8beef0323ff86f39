"""Can an environment's figures be read, by whoever runs this?"""

from __future__ import annotations

from collections.abc import Iterator

from trainyard.doctor.report import Check, ok, warn
from trainyard.rollout.readers.prometheus import PrometheusReader
from trainyard.spec.metrics import DEVICES_UNSEEN, MetricsSource

NAME = "metrics"


def metrics_checks(source: MetricsSource, *, on_neuron: bool = False) -> Iterator[Check]:
    """Yield how the source of an environment's metrics stands.

    Args:
        source: of the environment.
        on_neuron: does it serve on Neuron devices?

    Raises:
        Refused, Transient: it refuses us, or gives no good answer.
    """
    if source.source == "scrape":
        yield ok(NAME, "The rollout asks each server itself; there is nothing else to reach.")
        if on_neuron:
            what, _, remedy = DEVICES_UNSEEN.partition(". ")
            yield warn(NAME, f"{what}.", remedy)
        return
    seen = PrometheusReader(source, version_of=lambda _: None).seen_servers()
    if seen:
        yield ok(NAME, f"{source.url} has fresh figures of {seen} servers.")
        return
    labels = source.labels
    yield warn(
        NAME,
        f"{source.url} answers, and has no figures of any server from the last "
        f"{source.freshness_s + source.delay_s:.0f} s.",
        f"Before a first release there are none. Else look whether it scrapes the servers, whether "
        f"their series have the labels {labels.release} and {labels.pod}, and at metrics.match.",
    )
