"""The preflight table says of every combination what is known, and from where."""

from __future__ import annotations

from tests.unit.proof_files import IMAGE, proof

from trainyard.lanes.neuron_support import IMAGES, INSTANCES, RELEASES, known_drivers, parse_image
from trainyard.proofs import Proofs
from trainyard.support import table

NOTHING = Proofs(())


def test_every_image_is_of_a_release_in_the_table() -> None:
    for image in IMAGES:
        tag = parse_image(image)
        assert tag is not None
        assert tag.sdk in RELEASES


def test_every_instance_has_a_row_for_every_image_and_each_row_a_source() -> None:
    rows = table(NOTHING)
    assert {(row.image, row.instance) for row in rows} == {
        (image, instance) for image in IMAGES for instance in INSTANCES
    }
    assert {row.state for row in rows} == {"unproven", "refused"}
    assert all(row.source and row.reason.endswith(".") for row in rows)


def test_what_is_known_not_to_work_is_refused_whatever_the_driver() -> None:
    (row,) = table(NOTHING, images=[IMAGE], instance="inf2.8xlarge")
    assert (row.state, row.drivers) == ("refused", "any")
    assert "Trn2 and Trn3 only" in row.reason


def test_old_drivers_have_a_row_of_their_own() -> None:
    refused, unproven = table(NOTHING, images=[IMAGE], instance="trn2.48xlarge")
    assert (refused.state, unproven.state) == ("refused", "unproven")
    assert "2.26.10" in refused.drivers
    assert "2.26.10" not in unproven.drivers
    assert {*refused.drivers.split(", "), *unproven.drivers.split(", ")} == {*known_drivers()}
    assert "Update the node's AMI" in refused.reason


def test_one_driver_can_be_asked_for() -> None:
    for driver, state in (("2.26.10", "refused"), ("2.31.7.0", "unproven")):
        (row,) = table(NOTHING, images=[IMAGE], instance="trn2.48xlarge", driver=driver)
        assert (row.state, row.drivers) == (state, driver)


def test_a_transcript_makes_its_row_proven_and_no_other() -> None:
    rows = table(Proofs((proof(),)), images=[IMAGE], lane="neuron-native", driver="2.31.7.0")
    proven = [row for row in rows if row.state == "proven"]
    assert [row.instance for row in proven] == ["trn2.48xlarge"]
    assert proven[0].source == "transcript adder-0123456789ab"
    assert "2026-11-22 with driver 2.31.7.0" in proven[0].reason


def test_an_image_of_ones_own_appears_once_it_was_tried() -> None:
    own = proof(image="registry.example/own:1")
    rows = table(Proofs((own,)), instance="trn2.48xlarge", lane="neuron-native")
    assert [row.state for row in rows if row.image == own.image] == ["proven"]
    (other,) = table(NOTHING, images=[own.image], instance="trn2.48xlarge", lane="neuron-native")
    assert (other.state, other.reason) == ("unproven", "Its tag does not tell its SDK.")
