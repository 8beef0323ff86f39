"""`trainyard store …` shows what is there, checks it, and deletes only when it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.care.world import keys, release, serve, store_files
from tests.unit.yard import Yard
from typer.main import get_command
from typer.testing import CliRunner, Result

from trainyard import cli
from trainyard.releases import load_release, record_verdict
from trainyard.settings import get_settings
from trainyard.signing.keys import signing_key, trusted_keys
from trainyard.store.layout import release_key

REPOSITORY = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = get_command(cli.app).commands["store"].commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which one release serves; nothing here changes it but what is said."""
    home = tmp_path_factory.mktemp("store") / "home"
    yard = Yard(home)
    serve(yard, release(yard, "v1"))
    return home


@pytest.fixture
def yard(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    monkeypatch.setenv("TRAINYARD_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    yield Yard(home)
    get_settings.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["store", *arguments], prog_name="trainyard")


def released(yard: Yard) -> str:
    (key,) = keys(yard.store, "releases")
    return key.removeprefix("releases/adder/").removesuffix(".json")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_is_explained(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help.endswith(".")
    assert run(name, "--help").exit_code == 0


def test_gc_says_in_its_help_that_it_changes_nothing_unless_told() -> None:
    assert "Without `--delete` it changes nothing." in " ".join(run("gc", "--help").stdout.split())


def test_ls_shows_kinds_sizes_and_who_names_them(yard: Yard) -> None:
    lines = run("ls").stdout.splitlines()

    (checkpoint,) = [line for line in lines if "checkpoints/adder/v1" in line]
    assert "checkpoint" in checkpoint
    assert "plan adder-v1 and 1 more" in checkpoint
    (bundle,) = json.loads(run("ls", "bundle", "--json").stdout)
    assert bundle["files"] == 3
    assert bundle["complete"]
    assert bundle["named_by"] == ["plan adder-v1", f"release {released(yard)}"]
    assert {each["kind"] for each in json.loads(run("ls", "releases/", "--json").stdout)} == {
        "release"
    }


def test_ls_of_nothing_is_an_error(yard: Yard) -> None:
    result = run("ls", "nothing")
    assert result.exit_code == 10
    assert "Nothing in file:" in result.stderr


def test_show_of_a_release_tells_where_it_serves(yard: Yard) -> None:
    text = run("show", released(yard)).stdout
    assert "stable in channel staging of adder" in text
    assert "checkpoints/adder/v1" in text
    assert "gate accuracy" in text
    assert "outcome pass" in text


def test_show_of_a_release_lists_what_its_verdicts_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard = Yard(tmp_path)
    release_id = release(yard, "v1")
    subject = {"gate": "accuracy", "outcome": "warn", "plan_id": "p", "warnings": ["It drops it."]}
    record_verdict(
        yard.store,
        load_release(yard.store, "adder", release_id, yard.settings),
        subject,
        key=signing_key(yard.settings),
        trusted=trusted_keys(yard.settings),
    )
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    lines = [" ".join(line.split()) for line in run("show", release_id).stdout.splitlines()]
    get_settings.cache_clear()
    assert "│ Verdict │ gate accuracy, outcome warn, plan_id p │" in lines
    assert "│ Warning │ It drops it. │" in lines


def test_show_of_a_folder_shows_its_manifest_with_its_files(yard: Yard) -> None:
    text = run("show", "checkpoints/adder/v1").stdout
    assert "architecture_digest: architecture" in text
    assert "model.safetensors" in text


@pytest.mark.parametrize("key", ["plans/adder-v1.json", "plans/adder-v1", "releases"])
def test_show_as_json_is_what_is_stored(key: str, yard: Yard) -> None:
    if key == "releases":
        key = release_key("adder", released(yard))
    stored = yard.store.read(key if key.endswith(".json") else f"{key}.json").data
    assert run("show", key, "--json").stdout == stored.decode()


@pytest.mark.parametrize(
    ("key", "words"),
    [("plans/none", "There is no 'plans/none'"), ("../x", "Path '../x' would leave its folder.")],
)
def test_show_of_what_is_not_there(key: str, words: str, yard: Yard) -> None:
    result = run("show", key)
    assert result.exit_code == 10
    assert words in result.stderr


def test_verify_of_a_whole_store_succeeds(yard: Yard) -> None:
    result = run("verify")
    assert result.exit_code == 0
    assert ": no problems." in result.stdout


def test_verify_names_what_is_wrong_and_exits_with_10(yard: Yard) -> None:
    yard.store.create("checkpoints/adder/v1/evil.py", b"x")
    try:
        result = run("verify", "checkpoints")
        as_json = run("verify", "--json")
    finally:
        yard.store.delete("checkpoints/adder/v1/evil.py")

    assert result.exit_code == as_json.exit_code == 10
    assert "extra: checkpoints/adder/v1/evil.py: The manifest.json beside it" in result.stdout
    assert json.loads(as_json.stdout)["problems"][0]["key"] == "checkpoints/adder/v1/evil.py"


def test_du_sums_by_kind_and_model_and_tells_what_would_be_freed(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_GC_GRACE_S", "0")
    get_settings.cache_clear()
    store_files(yard.store, "bundles/cut", {"graph.bin": b"x" * 100})
    try:
        used = {
            (each["kind"], each["model"]): each for each in json.loads(run("du", "--json").stdout)
        }
        text = run("du").stdout
    finally:
        yard.store.delete("bundles/cut/graph.bin")

    assert used["bundle", ""]["freeable"] == 100
    assert used["bundle", "adder"]["freeable"] == 0
    assert used["checkpoint", "adder"]["files"] == 3
    assert "100 bytes" in text


def test_gc_deletes_only_when_it_is_told_to(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_GC_GRACE_S", "0")
    monkeypatch.setenv("TRAINYARD_GC_PAUSE_S", "0")
    get_settings.cache_clear()
    store_files(yard.store, "bundles/cut", {"graph.bin": b"x" * 100})
    before = keys(yard.store)

    dry = run("gc")
    assert keys(yard.store) == before
    assert "would delete bundles/cut (100 bytes). It has no manifest" in dry.stdout
    assert "keep channels/adder/staging.json" in dry.stdout
    assert "To delete them: trainyard store gc --delete" in dry.stdout
    by_name = {each["name"]: each for each in json.loads(run("gc", "--json").stdout)}
    assert not by_name["bundles/cut"]["keep"]

    wet = run("gc", "--delete", "--json")
    assert wet.exit_code == 0
    assert [each["name"] for each in json.loads(wet.stdout)["deleted"]] == ["bundles/cut"]
    assert keys(yard.store) == before - {"bundles/cut/graph.bin"}


def test_gc_refuses_to_judge_what_it_cannot_read(yard: Yard) -> None:
    yard.store.create("plans/broken.json", b"{}")
    try:
        result = run("gc", "--delete")
    finally:
        yard.store.delete("plans/broken.json")
    assert result.exit_code == 10
    assert "plans/broken.json is not a valid Plan" in result.stderr


def test_verify_compares_the_store_with_what_serves(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(REPOSITORY / "dags" / "environments.yaml"))
    get_settings.cache_clear()
    result = CliRunner().invoke(cli.app, ["verify", "--no-airflow", "--json"])
    found = json.loads(result.stdout)["problems"]

    # Nobody serves here.
    assert [each["message"] for each in found] == [
        f"{released(yard)} is stable and has no ready server."
    ]
    assert result.exit_code == 10


def test_verify_without_an_airflow_says_how_to_leave_it_out(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(cli.app, ["verify", "--quick"])

    assert result.exit_code == 10
    assert "--no-airflow" in result.output


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_verify_names_a_damaged_channel_once_and_compares_the_others(
    yard: Yard, quick: tuple[str, ...]
) -> None:
    key = "channels/other/production.json"
    before = run_verify(*quick)
    yard.store.put(key, b'{"model"')
    try:
        after = run_verify(*quick)
    finally:
        yard.store.delete(key)
    assert [each for each in after if each["key"] != key] == before
    (told,) = (each for each in after if each["key"] == key)
    assert told["kind"] == "wrong"
    assert "is not a valid Channel" in told["message"]


def run_verify(*arguments: str) -> list[dict[str, str]]:
    """Return the problems that the whole check finds."""
    result = CliRunner().invoke(cli.app, ["verify", "--no-airflow", "--json", *arguments])
    found: list[dict[str, str]] = json.loads(result.stdout)["problems"]
    assert result.exit_code == (10 if any(each["kind"] != "note" for each in found) else 0)
    return found
