"""The table of SDKs, images, drivers and instances is whole, and its rules are kept."""

from __future__ import annotations

import pytest
from tests.unit.lanes.neuron_targets import native, nxdi

from trainyard.lanes.neuron_common import lnc_of
from trainyard.lanes.neuron_support import (
    FAMILIES,
    INSTANCES,
    RELEASES,
    as_version,
    driver_problem,
    family_of,
    parse_image,
    preflight,
    same_version,
)


def test_every_row_has_its_source() -> None:
    for row in (*INSTANCES.values(), *RELEASES.values(), *FAMILIES):
        assert row.source


def test_releases_are_listed_from_the_newest() -> None:
    versions = [as_version(version) for version in RELEASES]
    assert versions == sorted(versions, reverse=True)


@pytest.mark.parametrize("name", INSTANCES)
def test_the_default_lnc_is_that_of_the_chip(name: str) -> None:
    instance = INSTANCES[name]
    make = native if instance.family in ("trn2", "trn3") else nxdi
    assert lnc_of(make(instance=name)) == instance.default_lnc
    assert family_of(name) == instance.family


def test_cores_are_logical() -> None:
    trn2 = INSTANCES["trn2.48xlarge"]
    assert (trn2.logical_cores(2), trn2.logical_cores(1)) == (64, 128)
    assert INSTANCES["inf2.48xlarge"].logical_cores(1) == 24


def test_sizes_that_are_not_in_the_table_have_a_kind_of_chip() -> None:
    assert family_of("trn2u.96xlarge") == "trn2"
    assert family_of("trn1n.32xlarge") == "trn1"
    assert family_of("p5.48xlarge") is None
    assert family_of("inf1.xlarge") is None


def test_images_tell_their_lane_and_sdk() -> None:
    native_tag = parse_image(
        "r.example/v:0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04@sha256:" + "a" * 64
    )
    assert native_tag is not None
    assert (native_tag.lane, native_tag.sdk, native_tag.python) == (
        "neuron-native",
        "2.32.0",
        "313",
    )
    nxdi_tag = parse_image("r.example/v:0.13.0-neuronx-py312-sdk2.28.0-ubuntu24.04")
    assert nxdi_tag is not None
    assert (nxdi_tag.lane, nxdi_tag.vllm) == ("neuron-nxdi", "0.13.0")
    assert parse_image("r.example/our-own:7") is None
    assert parse_image("") is None


@pytest.mark.parametrize(
    ("sdk", "driver", "refused"),
    [
        ("2.31.0", "2.26.10", True),
        ("2.31.0", "2.27.4", False),
        ("2.29.0", "2.25.4", False),
        ("2.33.0", "2.31.7.0", False),
    ],
)
def test_images_need_a_driver_that_is_new_enough(sdk: str, driver: str, refused: bool) -> None:
    assert bool(driver_problem(sdk, driver)) == refused


def test_what_nobody_refused_is_unproven() -> None:
    assert preflight("2.32.0", "neuron-native", "trn2").state == "unproven"
    assert preflight("2.28.1", "neuron-nxdi", "inf2").state == "unproven"
    assert preflight("2.32.0", "neuron-native", "inf2").state == "refused"


def test_builds_of_a_version_count_as_it() -> None:
    assert same_version("2.27.5334", "2.27.5334.0+ab12")
    assert not same_version("2.27.5334", "2.27.53340")
    assert not same_version("2.27.5334", "2.26.6360")
