"""`trainyard materialize` and `trainyard node-cache` at the command line."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tests.unit.test_restore import World
from typer.testing import CliRunner, Result

from trainyard import cli, restore_report
from trainyard.documents.release import Release
from trainyard.documents.restore import RestoreStatus
from trainyard.restore_report import RestoreReport
from trainyard.settings import get_settings


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    monkeypatch.setenv("TRAINYARD_HOME", str(made.settings.home))
    monkeypatch.setenv("TRAINYARD_STORE", made.settings.store)
    monkeypatch.setenv("TRAINYARD_NODE_CACHE", str(made.settings.node_cache))
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    yield made
    get_settings.cache_clear()


@pytest.fixture
def release(world: World) -> Release:
    return world.publish("v1")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="trainyard")


def test_it_says_where_the_release_is(world: World, release: Release) -> None:
    done = run("materialize", release.release_id, str(world.root / "pod"))
    assert done.exit_code == 0, done.output
    assert f"model  {world.root / 'pod' / 'model'}" in done.output
    assert (world.root / "pod" / "model" / "config.json").exists()


def test_machines_get_json(world: World, release: Release) -> None:
    done = run("materialize", release.release_id, str(world.root / "pod"), "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model_dir"] == str(world.root / "pod" / "model")
    assert result["over_limit_bytes"] == 0
    assert result["size_bytes"] > 5000


def status_of(world: World) -> RestoreStatus:
    return RestoreStatus.model_validate_json((world.root / "status.json").read_bytes())


def test_the_outcome_is_in_the_status(world: World, release: Release) -> None:
    arguments = ["materialize", release.release_id, str(world.root / "pod")]
    assert run(*arguments, "--status", str(world.root / "status.json")).exit_code == 0
    found = status_of(world)
    assert (found.release_id, found.state, found.exit_code) == (release.release_id, "done", 0)
    assert found.done_bytes == found.total_bytes > 5000
    assert found.model_dir == str(world.root / "pod" / "model")
    assert [path.name for path in world.root.glob("*status*")] == ["status.json"]


def test_so_is_why_it_failed(world: World) -> None:
    arguments = ["materialize", "adder-0123456789ab", str(world.root / "pod")]
    done = run(*arguments, "--status", str(world.root / "status.json"))
    found = status_of(world)
    assert (found.state, found.exit_code) == ("failed", done.exit_code)
    assert "adder-0123456789ab" in found.reason


def test_a_status_that_cannot_be_written_is_said_at_once(world: World, release: Release) -> None:
    nowhere = world.root / "missing" / "status.json"
    done = run("materialize", release.release_id, str(world.root / "pod"), "--status", str(nowhere))
    assert done.exit_code != 0
    assert not (world.root / "pod").exists()


def test_a_release_that_is_not_there_has_the_exit_code_of_bad_input(world: World) -> None:
    done = run("materialize", "adder-0123456789ab", str(world.root / "pod"))
    assert done.exit_code == 10
    assert "There is no release adder-0123456789ab" in done.output


def test_a_node_cache_is_looked_after(world: World, release: Release) -> None:
    run("materialize", release.release_id, str(world.root / "pod"), "--pin", "canary")
    listed = run("node-cache", "ls").output
    assert release.release_id in listed
    assert "pinned by canary; in use by a restored folder" in listed
    assert "no limit" in listed
    pinned = run("node-cache", "pin", release.release_id, "--owner", "me")
    assert pinned.output == f"{release.release_id} stays until me takes the pin back.\n"
    assert "1 pin of canary taken back" in run("node-cache", "unpin", "canary").output
    shutil.rmtree(world.root / "pod")
    assert "more than wanted" in run("node-cache", "evict", "--to-gib", "0").output
    assert "1 pin of me taken back" in run("node-cache", "unpin", "me").output
    assert "files removed; 0.00 GiB left." in run("node-cache", "evict", "--to-gib", "0").output


def test_what_is_not_in_the_cache_cannot_be_pinned(world: World) -> None:
    done = run("node-cache", "pin", "adder-0123456789ab", "--owner", "me")
    assert done.exit_code == 10
    assert "is not in the cache" in done.output


def test_without_a_cache_there_is_nothing_to_look_after(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINYARD_NODE_CACHE")
    get_settings.cache_clear()
    for command in (["ls"], ["evict"], ["unpin", "me"]):
        done = run("node-cache", *command)
        assert done.exit_code == 10
        assert "TRAINYARD_NODE_CACHE is not set" in done.output


class TestProgress:
    def test_a_terminal_has_a_bar(self) -> None:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=100)
        with RestoreReport(console, "adder-0123456789ab", as_json=False) as report:
            report.total(1 << 30)
            report.moved(1 << 29)
        assert "adder-0123456789ab" in out.getvalue()
        assert "GiB" in out.getvalue()

    def test_a_status_tells_how_far_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(restore_report, "_STATUS_INTERVAL_S", 0.0)
        path = tmp_path / "status.json"
        seen = []
        with RestoreReport(Console(file=io.StringIO()), "x", as_json=False, status=path) as report:
            for size in (0, 3, 4):
                report.total(10)
                report.moved(size)
                seen.append(RestoreStatus.model_validate_json(path.read_bytes()))
        assert [each.done_bytes for each in seen] == [0, 3, 7]
        assert {(each.state, each.total_bytes) for each in seen} == {("running", 10)}

    @pytest.mark.parametrize("as_json", [True, False])
    def test_elsewhere_there_are_lines_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch, as_json: bool
    ) -> None:
        monkeypatch.setattr(restore_report, "_INTERVAL_S", 0.0)
        out = io.StringIO()
        with RestoreReport(Console(file=out, width=100), "x", as_json=as_json) as report:
            report.total(4 << 20)
            report.moved(1 << 20)
            report.moved(3 << 20)
        lines = out.getvalue().splitlines()
        if as_json:
            assert [json.loads(line)["done_bytes"] for line in lines] == [1 << 20, 4 << 20]
        else:
            assert lines == [" 25% 1 of 4 MiB", "100% 4 of 4 MiB"]
