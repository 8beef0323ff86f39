"""Presets: accepted as they are, sourced, and what they run is what the golden files say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.unit.presets.golden_files import FOLDER, expected
from typer.testing import CliRunner

from trainyard import cli
from trainyard.lanes.command_text import ARGUMENTS, NATIVE_KEYS, script
from trainyard.lanes.neuron_support import INSTANCES, parse_image, preflight
from trainyard.lanes.protocol import ServerCommand
from trainyard.presets.known import NOT_YET, Preset, presets
from trainyard.settings import get_settings
from trainyard.spec.neuron import NativeConfig
from trainyard.steps.plan import check_files_with_lanes

EVERY = presets()
DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("preset", EVERY, ids=lambda preset: preset.name)
def test_a_preset_has_no_problem_and_says_where_its_recipe_is(preset: Preset) -> None:
    assert check_files_with_lanes([preset.path]) == []
    assert "AWS Neuron SDK 2.32," in preset.source
    assert preset.source.endswith(".")
    assert preset.spec.model == preset.name
    for target in preset.spec.targets:
        assert target.instance in INSTANCES
        assert target.neuron is not None
        tag = parse_image(target.neuron.image)
        assert tag is not None
        assert (tag.sdk, tag.lane) == (target.neuron.sdk, target.lane)


def test_there_are_presets_for_every_family_that_has_recipes() -> None:
    targets = [target for preset in EVERY for target in preset.spec.targets]
    families = {INSTANCES[target.instance].family for target in targets}
    assert families == {"inf2", "trn1", "trn2"}
    assert {target.lane for target in targets} == {"neuron-native", "neuron-nxdi"}


def test_what_a_preset_runs_is_what_its_golden_file_says() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.sh")}
    assert found == expected(), "If it should: python -m tests.unit.presets.golden_files"


@pytest.mark.parametrize("name", sorted(expected()))
def test_every_line_of_a_golden_file_has_its_source(name: str) -> None:
    text = expected()[name]
    unsourced = [line for line in text.splitlines() if "no source on record" in line]
    allowed = "extra_neuron_config" if name.startswith("qwen3-235b") else None
    for line in unsourced:
        assert allowed, line
    lines = [line for line in text.splitlines() if line.startswith(("export ", "  "))]
    assert all("  # " in line or line.startswith("  # ") for line in lines)


def test_a_golden_file_is_a_script_that_bash_can_read() -> None:
    for text in expected().values():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_the_script_starts_is_the_command() -> None:
    argv = ("/bin/echo", "serve", "/model", '--additional-config={"neuron_config":{"a b":"\'"}}')
    text = script(ServerCommand(argv, {"A": "x y"}), title="a test")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == " ".join(argv[1:])


def test_keys_that_the_spec_knows_have_their_source() -> None:
    assert set(NATIVE_KEYS) == set(NativeConfig.model_fields)
    assert all(name.startswith("-") or name == "serve" for name in ARGUMENTS)


def test_what_is_not_supported_yet_is_listed_with_the_reason() -> None:
    assert any("several nodes" in each.what for each in NOT_YET)
    for each in NOT_YET:
        assert each.reason.endswith(".")
        assert each.source


class TestCommands:
    @pytest.fixture(autouse=True)
    def catalogue(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TRAINYARD_CATALOGUE", str(tmp_path / "models"))
        get_settings.cache_clear()
        return tmp_path / "models"

    def run(self, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["presets", *words], env={"COLUMNS": "400"})
        return result.exit_code, result.output

    def test_the_list_has_all_and_what_is_missing(self) -> None:
        code, text = self.run("ls")
        assert code == 0
        assert all(preset.name in text for preset in EVERY)
        assert "UltraServer" in text

    def test_a_preset_is_written_once_and_is_a_model_then(self, catalogue: Path) -> None:
        assert self.run("write", "gpt-oss-20b")[0] == 0
        path = catalogue / "gpt-oss-20b.yaml"
        assert check_files_with_lanes([path]) == []
        path.write_text("mine")
        code, text = self.run("write", "gpt-oss-20b")
        assert (code, path.read_text()) == (10, "mine")
        assert "--force" in text
        assert self.run("write", "gpt-oss-20b", "--force")[0] == 0
        assert path.read_text() != "mine"

    def test_a_preset_is_shown_as_it_is_or_as_commands(self) -> None:
        (first, *_) = EVERY
        assert self.run("show", first.name)[1] == first.text
        code, text = self.run("show", first.name, "--commands")
        assert code == 0
        assert "--additional-config" in text
        assert "VLLM_NEURON_DISABLE_WARMUP_COMPILE=1" in text

    def test_a_name_that_is_not_there_is_told_with_the_nearest(self) -> None:
        code, text = self.run("show", "gpt-oss-2b")
        assert code == 10
        assert "gpt-oss-20b" in text


def test_nothing_in_a_preset_is_known_not_to_work() -> None:
    for preset in EVERY:
        for target in preset.spec.targets:
            assert target.neuron is not None
            family = INSTANCES[target.instance].family
            assert preflight(target.neuron.sdk, target.lane, family).state == "unproven"
