"""What the accuracy gate expects of the server's behaviour: that every check of it held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from trainyard.documents.behaviour import BehaviourCase, BehaviourRecord
from trainyard.documents.measurement import Measurement
from trainyard.gates.expectations import Expectation
from trainyard.spec.model import BehaviourGate, BehaviourName

PREFIX = "behaviour "
"""How `Check.what` of such an expectation begins."""

_TITLES: Mapping[BehaviourName, str] = {
    "batching": "alone and in a full batch",
    "prefix_cache": "with the prefix cache cold and warm",
    "penalties": "sampling penalties",
    "stop_strings": "stop strings",
    "streaming": "streamed and not",
    "longest_prompt": "the longest prompt and one over it",
    "concurrency": "more requests than fit at once",
    "cancellation": "clients that go away",
}

_ADVICE: Mapping[BehaviourName, str] = {
    "batching": "Answers depend on who else asks: compare with batching off (`max_num_seqs: 1`), "
    "and with other batch buckets.",
    "prefix_cache": "Cached prefixes give other answers: set `enable_prefix_caching: false` until "
    "the plugin is mended.",
    "penalties": "The sampler leaves penalties out: sample on the CPU, or waive `penalties` if no "
    "client sends any.",
    "stop_strings": "Clients would see text after their stop string: look at the tokenizer and at "
    "vLLM's version.",
    "streaming": "Streaming clients get other text: look at the tokenizer and at vLLM's version.",
    "longest_prompt": "Compile for the whole `max_model_len`, or lower it to what works; requests "
    "that are too long must be refused and nothing else.",
    "concurrency": "Requests are lost under load: lower `max_num_seqs`, or give the KV cache more "
    "memory.",
    "cancellation": "Requests go on after their clients are gone and take the place of others: "
    "look at vLLM's version and at what lies before it.",
}


def behaviour_expectations(
    gate: BehaviourGate, measurement: Measurement
) -> tuple[Expectation, ...]:
    """Return what `gate` expects of `measurement`: no case of any check is broken.

    A check that the lane does not support, or that could tell nothing, is a warning; one that was
    not made fails, unless the spec skips it.
    """
    return tuple(
        expectation
        for name in get_args(BehaviourName)
        for expectation in _expectations(name, gate, measurement)
    )


def _expectations(
    name: BehaviourName, gate: BehaviourGate, measurement: Measurement
) -> Iterator[Expectation]:
    figure, what = f"behaviour/{name}", f"{PREFIX}{name}"
    waiver = gate.waivers.get(name)
    if waiver is not None and waiver.severity == "skip":
        reason = f"The spec skips it: {waiver.reason}"
        yield Expectation(f"{figure}/broken", f"{what}: broken cases", None, "<= 0", skipped=reason)
        return
    record = _find(measurement, name)
    if record is None or not record.cases:
        note = "It was not checked. Start a new release of this revision: it is measured then."
        yield Expectation(
            f"{figure}/broken", f"{what}: broken cases", None, "<= 0", maximum=0.0, note=note
        )
        return
    if record.capability.ability == "unsupported":
        yield Expectation(
            f"{figure}/unsupported",
            f"{what}: not supported by the lane",
            1.0,
            "<= 0",
            maximum=0.0,
            severity="warning",
            note=_unsupported(record),
        )
        return
    note = _note(name, record)
    if waiver is not None:
        note = f"{note} Only a warning by the spec: {waiver.reason}".strip()
    yield Expectation(
        f"{figure}/broken",
        f"{what}: broken cases",
        float(record.count("broken")),
        "<= 0",
        maximum=0.0,
        severity="critical" if waiver is None else "warning",
        note=note,
    )
    if not record.count("broken") and not record.count("held"):
        yield Expectation(
            f"{figure}/held",
            f"{what}: cases that could tell",
            0.0,
            ">= 1",
            minimum=1.0,
            severity="warning",
            note=_said(record.cases[0]),
        )


def _find(measurement: Measurement, name: BehaviourName) -> BehaviourRecord | None:
    records = measurement.behaviour.records if measurement.behaviour else ()
    found = [record for record in records if record.name == name]
    return found[0] if len(found) == 1 else None


def _note(name: BehaviourName, record: BehaviourRecord) -> str:
    """Return how it went, and what to do where it went wrong."""
    broken, unclear = record.count("broken"), record.count("unclear")
    words = [f"{_TITLES[name].capitalize()}: {record.count('held')} of {len(record.cases)} held"]
    words[0] += f", {unclear} could not be told." if unclear else "."
    if record.remark:
        words.append(record.remark)
    first = record.first("broken")
    if broken and first is not None:
        words += [_said(first), _ADVICE[name]]
    return " ".join(words)


def _unsupported(record: BehaviourRecord) -> str:
    source = f" ({record.capability.source})" if record.capability.source else ""
    broken = record.count("broken")
    seen = f"{broken} of {len(record.cases)} cases were broken." if broken else "No case broke."
    return f"{record.capability.why}{source} {seen}"


def _said(case: BehaviourCase) -> str:
    return f"Sent: {case.sent}. Came: {case.came}. Expected: {case.expected}."
