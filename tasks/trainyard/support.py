"""The preflight table: image by driver by instance by lane, as proven, unproven or refused.

Refused is what is known not to work, from `trainyard.lanes.neuron_support`. Proven is what a signed
transcript of `trainyard doctor neuron` says of the very image, instance and lane. All the rest is
unproven, however well documented.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from trainyard.lanes.neuron_support import (
    DRIVER_SOURCE,
    IMAGES,
    INSTANCES,
    Instance,
    NeuronLaneName,
    driver_problem,
    known_drivers,
    parse_image,
    preflight,
)
from trainyard.proofs import Proofs

State = Literal["proven", "unproven", "refused"]


@dataclass(frozen=True)
class Row:
    """One image on one instance with one lane, for some drivers."""

    image: str
    drivers: str
    """Versions of the host's driver, in words."""
    instance: str
    lane: str
    state: State
    reason: str
    """One sentence, with the remedy if there is one."""
    source: str


@dataclass(frozen=True)
class _Found:
    state: State
    reason: str
    source: str


def table(
    proofs: Proofs,
    *,
    images: Sequence[str] = (),
    instance: str = "",
    driver: str = "",
    lane: str = "",
) -> list[Row]:
    """Return the rows of the table, images of AWS in their order, those of transcripts after.

    Args:
        proofs: what was proven on devices.
        images: only these; empty: all that are known.
        instance: only this one; empty: all.
        driver: only this version of the driver; empty: all that are known, told in words.
        lane: only this one; empty: both.
    """
    proven_images = sorted({proof.image for proof in proofs.proofs if proof.image} - {*IMAGES})
    wanted = images or (*IMAGES, *proven_images)
    drivers = (driver,) if driver else known_drivers()
    return [
        row
        for image in wanted
        for each in INSTANCES.values()
        if instance in ("", each.name)
        for lane_name in get_args(NeuronLaneName)
        if lane in ("", lane_name)
        for row in _rows(image, each, lane_name, drivers, proofs)
    ]


def _rows(
    image: str,
    instance: Instance,
    lane: NeuronLaneName,
    drivers: Sequence[str],
    proofs: Proofs,
) -> Iterator[Row]:
    pair = _of_pair(image, instance, lane, proofs)
    if pair is None:
        return
    if pair.state == "refused":
        yield _row(image, "any", instance, lane, pair)
        return
    tag = parse_image(image)
    problems = {each: driver_problem(tag.sdk, each) if tag else "" for each in drivers}
    old = [each for each in drivers if problems[each]]
    if old:
        refused = _Found("refused", problems[old[0]], DRIVER_SOURCE)
        yield _row(image, ", ".join(old), instance, lane, refused)
    fine = [each for each in drivers if not problems[each]]
    if fine:
        yield _row(image, ", ".join(fine), instance, lane, pair)


def _of_pair(image: str, instance: Instance, lane: NeuronLaneName, proofs: Proofs) -> _Found | None:
    """Return what is known of an image on an instance with a lane; None: no such image."""
    proof = proofs.find(image, instance.name, lane)
    if proof is not None:
        reason = (
            f"Proven on {proof.created_at:%Y-%m-%d} with driver {proof.driver or 'unknown'}, with "
            f"{proof.model} {proof.revision}."
        )
        return _Found("proven", reason, f"transcript {proof.proof_id}")
    tag = parse_image(image)
    if tag is None:
        return _Found("unproven", "Its tag does not tell its SDK.", "")
    if tag.lane != lane:
        # An image holds one lane; the other's row would say nothing.
        return None
    known = preflight(tag.sdk, lane, instance.family)
    return _Found(known.state, f"{known.reason} {known.remedy}".strip(), known.source)


def _row(image: str, drivers: str, instance: Instance, lane: NeuronLaneName, found: _Found) -> Row:
    return Row(image, drivers, instance.name, lane, found.state, found.reason, found.source)
