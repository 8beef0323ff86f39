"""Which toolchain a plan names when the steps are pods, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.kubernetes.step_work import IMAGES, place, target
from tests.unit.lanes.neuron_targets import TOOLCHAINS

from trainyard.documents.toolchain import ToolchainRecord
from trainyard.errors import BadInput
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.neuron_native import NativeLane
from trainyard.lanes.neuron_toolchain import differences, toolchain_of_image
from trainyard.lanes.registry import get_lane
from trainyard.settings import Settings
from trainyard.steps.toolchains import KnownToolchain, record_toolchain, toolchain_for
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import toolchain_key

NATIVE = IMAGES["neuron-native"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, image=NATIVE)


@pytest.fixture
def store(settings: Settings) -> FolderStore:
    return FolderStore(settings.store_root)


def known(lane: str, settings: Settings, store: FolderStore, where: Any = None) -> KnownToolchain:
    return toolchain_for(
        target(lane),
        get_lane(lane),
        model="m",
        place=where or place(),
        settings=settings,
        store=store,
    )


def test_what_was_recorded_in_the_image_is_the_toolchain(
    settings: Settings, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = dict(TOOLCHAINS["neuron-native"])
    monkeypatch.setattr(NativeLane, "toolchain", lambda _lane, _python: there)
    made = record_toolchain(settings, store, lane="neuron-native", image=NATIVE)
    assert read_document(store, toolchain_key(NATIVE, "neuron-native"), ToolchainRecord) == made
    assert known("neuron-native", settings, store) == KnownToolchain(there)


def test_a_new_record_takes_the_place_of_the_old_one(
    settings: Settings, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        monkeypatch.setattr(NativeLane, "toolchain", lambda _l, _p, v=version: {"nki": v})
        record_toolchain(settings, store, lane="neuron-native", image=NATIVE)
    assert known("neuron-native", settings, store).versions == {"nki": "2"}


def test_an_image_that_nobody_asked_is_known_by_the_table(
    settings: Settings, store: FolderStore
) -> None:
    found = known("neuron-native", settings, store)
    assert found.versions == {
        "image": NATIVE,
        "neuronx-cc": "2.27.5334",
        "nki": "0.6.0",
        "vllm-neuron": "0.24.0.1.1.0",
    }
    assert "Record it with `trainyard toolchain`" in found.warning
    assert NativeLane().toolchain_problems(target("neuron-native"), found.versions) == ()


def test_the_table_of_the_other_lane(settings: Settings, store: FolderStore) -> None:
    assert known("neuron-nxdi", settings, store).versions == {
        "image": IMAGES["neuron-nxdi"],
        "neuronx-cc": "2.23.6484",
        "neuronx-distributed-inference": "0.8.16251",
        "vllm": "0.13.0",
    }


def test_two_images_never_share_a_key_by_the_table() -> None:
    keys = [
        NativeLane().key_inputs(
            target("neuron-native"),
            architecture_digest="a",
            toolchain=toolchain_of_image(image, "2.32.0", "neuron-native"),
        )
        for image in ("registry.example/a:1", "registry.example/a:2")
    ]
    assert keys[0] != keys[1]


def test_the_cpu_lane_must_be_asked(settings: Settings, store: FolderStore) -> None:
    with pytest.raises(BadInput, match=r"The toolchain of image registry\.example") as refused:
        known("cpu", settings, store)
    assert (
        "trainyard toolchain --lane cpu --image registry.example/trainyard@" in refused.value.hint
    )


def test_an_unknown_sdk_must_be_asked(settings: Settings, store: FolderStore) -> None:
    new = target("neuron-native", neuron__sdk="2.99.0", neuron__image="registry.example/new:1")
    with pytest.raises(BadInput, match=r"does not have SDK 2\.99\.0"):
        toolchain_for(new, NativeLane(), model="m", place=place(), settings=settings, store=store)


def test_here_the_interpreter_is_asked(
    settings: Settings, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuLane, "toolchain", lambda _lane, python: {"python": str(python)})
    found = toolchain_for(
        target("cpu"), CpuLane(), model="m", place=None, settings=settings, store=store
    )
    assert found == KnownToolchain({"python": str(settings.serving_interpreter)})


def test_a_record_needs_the_name_of_its_image(tmp_path: Path, store: FolderStore) -> None:
    with pytest.raises(BadInput, match="Nobody said in which image this runs"):
        record_toolchain(Settings(home=tmp_path), store, lane="cpu", image="")


class TestDifferences:
    TABLE = {"image": NATIVE, "neuronx-cc": "2.27.5334", "nki": "0.6.0"}  # noqa: RUF012
    NOW = {"neuronx-cc": "2.27.5334.0+ab", "nki": "0.6.0", "torch": "2.11"}  # noqa: RUF012

    def test_builds_of_the_tables_versions_are_the_same(self) -> None:
        assert differences(self.TABLE, self.NOW, NATIVE) == []

    @pytest.mark.parametrize("image", ["", "registry.example/other:1"])
    def test_another_image_is_another_toolchain(self, image: str) -> None:
        (found,) = differences(self.TABLE, self.NOW, image)
        assert found == f"image {NATIVE} -> {image or 'absent'}"

    def test_another_version_or_none_is_told(self) -> None:
        now = {"neuronx-cc": "2.28.1"}
        assert differences(self.TABLE, now, NATIVE) == [
            "neuronx-cc 2.27.5334 -> 2.28.1",
            "nki 0.6.0 -> absent",
        ]

    def test_what_was_recorded_must_be_the_same_to_the_letter(self) -> None:
        assert differences({"nki": "0.6.0"}, {"nki": "0.6.0.1", "torch": "2"}, NATIVE) == [
            "nki 0.6.0 -> 0.6.0.1",
            "torch absent -> 2",
        ]
