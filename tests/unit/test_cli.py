"""The command line: every command explains itself, and errors are said as they are."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from tests.unit.yard import MOMENT, Yard, measurement, plan
from typer.main import get_command
from typer.testing import CliRunner, Result

from trainyard import cli
from trainyard.documents.channel import Channel, HistoryEntry
from trainyard.documents.status import StepStatus
from trainyard.errors import (
    BadInput,
    Busy,
    CorruptFile,
    NotFound,
    OutOfCapacity,
    Refused,
    TrainyardError,
    Transient,
)
from trainyard.platform.control import Address
from trainyard.platform.paths import PlatformPaths
from trainyard.releases import load_release, release_id_of, store_release
from trainyard.settings import get_settings
from trainyard.signing.keys import signing_key, trusted_keys
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.store.folder import RESERVED, FolderStore
from trainyard.store.layout import channel_key, status_key

REPOSITORY = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]
OPTIONS = [
    (name, parameter)
    for name, command in sorted(COMMANDS.items())
    for parameter in command.params
    if parameter.name != "help"
]
TRICKY = "tail[-1] has [bold]no[/bold] [/end], path [/tmp/x], :smile: and 100 %"
"""Reads like the markup and the emoji codes of the library that prints it."""


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    """A home for the command line, with the repository's catalogue."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.setenv("TRAINYARD_CATALOGUE", str(REPOSITORY / "dags" / "models"))
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(REPOSITORY / "dags" / "environments.yaml"))
    # Narrower than most lines.
    monkeypatch.setenv("COLUMNS", "60")
    get_settings.cache_clear()
    yield Yard(tmp_path)
    get_settings.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="trainyard")


def counted(function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    """Return the function, which counts its calls under its name."""

    def call(*arguments: Any, **named: Any) -> Any:
        calls[function.__name__] += 1
        return function(*arguments, **named)

    return call


def flat(text: str) -> str:
    """Return a page of help without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


class TestHelp:
    def test_it_lists_the_commands_in_the_order_of_a_release(self) -> None:
        text = run("--help").stdout
        shown = [name for name in re.findall(r"│ ([\w-]+) ", text) if name in COMMANDS]
        steps = ["plan", "download", "tasks", "compile", "measure", "logits", "gate", "publish"]
        assert shown[: len(steps)] == steps
        hidden = {name for name, command in COMMANDS.items() if command.hidden}
        assert hidden == {"agent", "guard", "proxy"}
        assert set(shown) == set(COMMANDS) - hidden

    @pytest.mark.parametrize("name", sorted(COMMANDS))
    def test_every_command_says_what_it_does(self, name: str) -> None:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert flat(COMMANDS[name].help) in flat(result.stdout)
        assert all(cell_len(line) <= 100 for line in result.stdout.splitlines())

    @pytest.mark.parametrize(
        ("name", "parameter"), OPTIONS, ids=[f"{name} {p.name}" for name, p in OPTIONS]
    )
    def test_every_option_and_argument_is_explained(self, name: str, parameter: Any) -> None:
        assert parameter.help
        assert parameter.help.endswith(".")
        assert flat(parameter.help).split()[0] in flat(run(name, "--help").stdout)

    def test_brackets_in_help_are_shown(self) -> None:
        assert '"targets": […]' in flat(run("plan", "--help").stdout)

    def test_the_short_option_does_the_same(self) -> None:
        assert run("-h").stdout == run("--help").stdout

    def test_without_a_command_it_shows_the_help(self) -> None:
        assert "Steps of a release" in run().output

    def test_the_version_is_that_of_the_package(self) -> None:
        from trainyard import __version__

        assert run("--version").stdout == f"trainyard {__version__}\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (BadInput(TRICKY, hint=f"Do {TRICKY}"), 10),
            (Refused(TRICKY, hint=f"Do {TRICKY}"), 20),
            (Transient(TRICKY, hint=f"Do {TRICKY}"), 30),
            (OutOfCapacity(TRICKY, hint=f"Do {TRICKY}"), 40),
            (Busy(TRICKY, hint=f"Do {TRICKY}"), 75),
        ],
    )
    def test_an_error_is_printed_as_it_is_and_gives_its_code(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch, error: TrainyardError, code: int
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("trainyard.platform.control.down", fail)
        result = run("down")
        assert result.exit_code == code
        assert result.stderr == f"Error: {TRICKY}\nWhat to do: Do {TRICKY}\n"
        assert result.stdout == ""

    def test_what_a_command_says_is_printed_as_it_is(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "trainyard.platform.control.down", lambda settings, say: say(f"Stops {TRICKY}")
        )
        assert run("down").stdout == f"Stops {TRICKY}\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["plan"], "Give either --request or --model."),
            (["plan", "--model", "adder", "--request", "{}"], "Give either --request or --model."),
            (
                ["plan", "--request", "{}", "--revision", "r1"],
                "--revision, --environment and --accept-unproven go",
            ),
            (["plan", "--request", "{}", "--environment", "staging"], "go with --model only."),
            (["plan", "--request", "{"], "The request is not valid: request: Invalid JSON"),
            (["plan", "--request", '{"revision": "r1"}'], "model: Field required"),
            (["plan", "--request", '{"model": "adder", "x": 1}'], "x: Extra inputs"),
            (["plan", "--model", "../adder"], "Model '../adder' is not a valid name."),
            (["plan", "--request", '{"model": "../adder"}'], "Model '../adder' is not a valid"),
            (["plan", "--model", "ader"], "There is no model 'ader'"),
            (["releases", "../adder"], "Model '../adder' is not a valid name."),
            (["releases", "ader"], "Did you mean adder?"),
            (["channel", "ader", "production"], "There is no model 'ader'"),
            (["channel", "adder", "moon"], "There is no environment 'moon'"),
            (["channel", "adder", "../x"], "Environment '../x' is not a valid name."),
            (["status", "adder-none"], "adder-none has no channel, and no step of a plan"),
            (["status", "../x"], "Model '../x' is not a valid name."),
            (["status", "adder", "moon"], "There is no environment moon"),
            (["status", "nomodel", "staging"], "nomodel has no channel in staging"),
            (["pause", "adder", "staging", "--reason", "x"], "No rollout of adder is under way"),
            (["pause", "adder", "staging"], "A pause needs a reason."),
            (["resume", "adder", "staging"], "No rollout of adder is under way"),
            (["promote-now", "adder", "staging", "--reason", "x"], "No rollout of adder is"),
            (["abort", "adder", "staging", "--reason", "x"], "No rollout of adder is under way"),
            (["rollback", "adder", "staging", "--reason", "x"], "has no earlier release"),
            (["rollback", "adder", "staging", "--to", "x", "--reason", "x"], "not a release id"),
            (["explain", "adder-none", "abcdef"], "no compile key, release or plan 'adder-none'"),
            (["download", "--plan", "adder-none"], "adder-none.json does not exist"),
            (["compile", "--plan", "adder-none", "--target", "cpu"], "does not exist"),
            (["import-bundle", "x", "--model", "../x", "--target", "cpu"], "Model '../x' is not"),
            (["import-bundle", "x", "--model", "adder", "--target", "../x"], "Target '../x' is"),
            (["import-bundle", "x", "--model", "adder", "--target", "cpu"], "no folder x"),
        ],
    )
    def test_bad_input_exits_with_10_and_leaves_no_documents(
        self, yard: Yard, arguments: list[str], words: str
    ) -> None:
        # A store without anything in it may be one that is not mounted.
        (yard.store.root / RESERVED).mkdir(parents=True)
        result = run(*arguments)
        assert result.exit_code == 10, result.output
        assert words in flat(result.output)
        assert "Traceback" not in result.output
        stored = [entry.key for entry in yard.store.list("")]
        assert [key for key in stored if not key.startswith(("locks/", "status/"))] == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["status"],
            ["status", "adder"],
            ["status", "adder", "staging"],
            ["watch"],
            *(
                [command, "adder", "staging", "--reason", "x"]
                for command in ("pause", "resume", "promote-now", "abort", "rollback")
            ),
        ],
    )
    def test_a_store_that_is_away_is_no_answer(
        self, yard: Yard, arguments: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = yard.store.root
        away = run(*arguments)
        assert (away.exit_code, away.stdout) == (30, "")
        assert f"The store {root} does not exist. What to do: If it" in flat(away.stderr)
        root.mkdir()
        assert f"The store {root} is empty." in flat(run(*arguments).stderr)
        assert list(root.iterdir()) == []
        monkeypatch.setenv("TRAINYARD_STORE", "/etc/passwd")
        get_settings.cache_clear()
        other = run(*arguments)
        assert other.exit_code == 10
        assert "The store /etc/passwd is no folder." in flat(other.stderr)

    def test_a_wrong_setting_is_named_by_its_variable(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRAINYARD_AIRFLOW_PORT", "[many]")
        monkeypatch.setenv("TRAINYARD_STEP_LOCK_S", "long")
        result = run("where")
        assert result.exit_code == 10
        assert "TRAINYARD_AIRFLOW_PORT: Input should be a valid integer" in result.stderr
        assert "TRAINYARD_STEP_LOCK_S" in result.stderr
        assert "Traceback" not in result.output

    def test_an_unknown_option_is_a_mistake_in_the_call(self) -> None:
        result = run("plan", "--modell", "adder")
        assert result.exit_code == 2
        assert "No such option" in result.output


class TestCheck:
    def test_a_good_file_is_good(self, yard: Yard) -> None:
        result = run("check", str(REPOSITORY / "dags" / "models" / "adder.yaml"))
        assert result.exit_code == 0
        assert result.stdout == "1 file: no problems.\n"

    def test_every_problem_has_its_place_and_its_remedy(self, yard: Yard, tmp_path: Path) -> None:
        folder = tmp_path / "a folder [bold] whose name is long, so that lines are wide"
        folder.mkdir()
        path = folder / "broken.yaml"
        text = (REPOSITORY / "dags" / "models" / "adder.yaml").read_text()
        path.write_text(text.replace("lane: cpu", "lane: '[red]gpu[/red]'"))
        line = text[: text.index("lane: cpu")].count("\n") + 1
        result = run("check", str(path))
        assert result.exit_code == 10
        assert f"{path}:{line} targets[0].lane: " in result.stderr
        assert "[red]gpu[/red]" in result.stderr
        assert re.search(r"^    \S.*cpu.*\.$", result.stderr, re.MULTILINE)
        assert re.search(r"^\d+ problems?\.$", result.stderr, re.MULTILINE)

    def neuron_file(self, tmp_path: Path, config: str) -> Path:
        path = tmp_path / "adder.yaml"
        shipped = REPOSITORY / "dags" / "models"
        shutil.copytree(shipped / "adder", tmp_path / "adder")
        target = (
            "targets:\n  - name: trn2\n    lane: neuron-native\n    instance: trn2.48xlarge\n"
            "    max_model_len: 256\n    max_num_batched_tokens: 256\n    max_num_seqs: 8\n"
            f"    neuron:\n      sdk: 2.32.0\n    native:\n      {config}\n\ngates:"
        )
        text = (shipped / "adder.yaml").read_text()
        path.write_text(re.sub(r"targets:.*?gates:", target, text, flags=re.DOTALL))
        return path

    def test_what_a_lane_lets_pass_is_a_warning(self, yard: Yard, tmp_path: Path) -> None:
        path = self.neuron_file(tmp_path, "extra_neuron_config: {num_seq_buckets: [8]}")
        result = run("check", str(path))
        assert (result.exit_code, result.stdout) == (0, "1 file: no problems.\n")
        assert f"Warning: {path}: target trn2: extra_neuron_config.num_seq_buckets" in result.stderr

    def test_devices_whose_errors_nobody_sees_are_a_warning(
        self, yard: Yard, tmp_path: Path
    ) -> None:
        spec = self.neuron_file(tmp_path, "{}")
        rules = tmp_path / "environments.yaml"
        serving = "{target: trn2, devices: 2"
        rules.write_text(
            f"schema: trainyard/v1\nenvironments:\n  blind: {serving}}}\n"
            f"  seeing: {serving}, metrics: {{source: prometheus, url: 'http://127.0.0.1:9'}}}}\n"
        )
        result = run("check", str(rules), str(spec))
        assert (result.exit_code, result.stdout) == (0, "2 files: no problems.\n")
        told = [line for line in result.stderr.splitlines() if "no errors of accelerators" in line]
        assert len(told) == 1
        assert told[0].startswith(f"Warning: {rules}: environment blind: metrics.source scrape")

    def test_a_misspelt_key_of_a_plugin_is_refused(self, yard: Yard, tmp_path: Path) -> None:
        path = self.neuron_file(tmp_path, "neuron_config: {num_seq_buckets: [8]}")
        result = run("check", str(path))
        assert result.exit_code == 10
        assert "targets[0].native.neuron_config.num_seq_buckets: There is no key" in result.stderr
        assert "Did you mean num_seqs_buckets?" in result.stderr

    def test_a_rule_of_a_neuron_lane_is_kept(self, yard: Yard, tmp_path: Path) -> None:
        path = self.neuron_file(tmp_path, "neuron_config: {num_seqs_buckets: [4]}")
        result = run("check", str(path))
        assert result.exit_code == 10
        assert "The largest of num_seqs_buckets must be max_num_seqs (8)" in result.stderr

    def test_a_file_that_is_missing_is_named(self, yard: Yard) -> None:
        result = run("check", "nowhere.yaml")
        assert result.exit_code == 10
        assert "nowhere.yaml:1: There is no file nowhere.yaml." in result.stderr


class TestTables:
    def test_the_status_of_a_plan(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        status = StepStatus(
            plan_id="adder-plan",
            step="compile",
            target="cpu",
            state="failed",
            exit_code=20,
            reason=TRICKY,
            hint="Do it.",
            started_at=MOMENT,
            updated_at=MOMENT + timedelta(seconds=7),
        )
        yard.store.put(status_key("adder-plan", "compile", "cpu"), status.to_bytes())
        result = run("status", "adder-plan")
        assert result.exit_code == 0
        assert f"failed  7 s   {TRICKY} Do it." in result.stdout

    def test_a_channel(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        entry = HistoryEntry(
            at=datetime(2026, 11, 22, tzinfo=UTC), event="withdrawn", detail={"why": TRICKY}
        )
        document = Channel(model="adder", environment="staging", generation=1, history=(entry,))
        yard.store.put(channel_key("adder", "staging"), document.to_bytes())
        assert f"why {TRICKY}" in run("channel", "adder", "staging").stdout
        assert run("channel", "adder", "staging", "--json").stdout == document.to_bytes().decode()

    def test_a_damaged_channel_hides_no_other(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        document = Channel(model="adder", environment="staging", generation=1)
        yard.store.put(channel_key("adder", "staging"), document.to_bytes())
        broken = channel_key("other", "staging")
        yard.store.put(broken, document.to_bytes()[:200])
        table = run("status")
        assert table.exit_code == 10
        assert "empty" in table.stdout
        assert "cannot be read" in table.stdout
        assert f"{broken} is not a valid Channel" in table.stderr
        assert "backup" in table.stderr
        assert run("status", "adder").exit_code == 0
        as_json = run("status", "--json")
        assert as_json.exit_code == 10
        assert [each["model"] for each in json.loads(as_json.stdout)] == ["adder"]

    def test_a_channel_that_nobody_used_yet_is_empty(self, yard: Yard) -> None:
        result = run("channel", "adder", "staging")
        assert result.exit_code == 0
        assert "No rollout yet." in result.stdout

    def test_a_model_without_releases_has_an_empty_table(self, yard: Yard) -> None:
        result = run("releases", "adder")
        assert result.exit_code == 0
        assert "Release" in result.stdout


class TestExplain:
    def test_the_fields_that_differ_and_what_follows(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        for name, dtype in (("one", "bfloat16"), ("two", TRICKY)):
            made = plan(f"adder-{name}")
            target = made.targets[0].model_copy(update={"key_inputs": {"dtype": dtype}})
            yard.keep_plan(made.model_copy(update={"targets": (target,)}))

        result = run("explain", "adder-one", "adder-two")

        assert result.exit_code == 0
        assert "plan adder-one/cpu" in result.stdout
        assert re.search(r"^code +dtype +bfloat16 +", result.stdout, re.MULTILINE)
        assert TRICKY in result.stdout
        assert "number format inside the graph" in result.stdout
        assert "compiled anew" in result.stdout

    def test_what_is_the_same_is_the_same(self, yard: Yard) -> None:
        yard.keep_plan(plan("adder-one"))
        result = run("explain", "adder-one", "adder-one")
        assert (result.exit_code, result.stdout) == (0, "Nothing differs.\n")


def test_the_schemas_are_printed_as_json(yard: Yard) -> None:
    assert json.loads(run("schema").stdout)["title"] == "Trainyard model spec"
    assert "environments" in json.loads(run("schema", "environments").stdout)["properties"]


def test_where_tells_that_nothing_runs(yard: Yard) -> None:
    result = run("where")
    assert result.exit_code == 0
    assert "The platform does not run." in result.stdout


def test_where_tells_addresses_and_the_databases_socket(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Address("http://127.0.0.1:1", "admin", "word", "http://127.0.0.1:2")
    monkeypatch.setattr("trainyard.platform.control.address", lambda settings: found)
    socket = PlatformPaths(yard.settings.home.resolve()).postgres / "socket"
    lines = run("where").stdout
    assert "http://127.0.0.1:1  (user admin, password word)" in lines
    assert f"Database  {socket}" in lines
    monkeypatch.setenv("TRAINYARD_AIRFLOW_DATABASE", "sqlite")
    get_settings.cache_clear()
    assert "Database" not in run("where").stdout


def test_the_database_goes_only_if_that_is_asked_for(yard: Yard) -> None:
    cluster = PlatformPaths(yard.settings.home.resolve()).postgres
    (cluster / "data").mkdir(parents=True)
    assert run("down").exit_code == 0
    assert cluster.exists()
    assert run("down", "--remove-database").exit_code == 0
    assert not cluster.exists()


class TestKeys:
    def test_without_a_key_it_is_said_how_one_comes(self, yard: Yard) -> None:
        result = run("keys", "list")
        assert result.exit_code == 0
        assert "There is none yet." in result.stdout

    def test_a_key_is_replaced_revoked_and_listed(
        self, yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        first = run("keys", "new").stdout
        second = run("keys", "new").stdout

        assert first.startswith("Signs from now on: ")
        assert second.splitlines()[0].startswith("Retired: ")
        old = second.splitlines()[0].removeprefix("Retired: ")[:12]
        pem = second[second.index("-----BEGIN") :]
        (tmp_path / "yard.pem").write_text(pem)
        assert (
            "ed25519" in run("keys", "add", str(tmp_path / "yard.pem"), "--comment", "yard").stdout
        )
        assert run("keys", "revoke", old, "--reason", "Leaked [x].").exit_code == 0
        listed = run("keys", "list").stdout
        assert f"{old} │ ed25519 │" in listed
        assert "revoked: Leaked [x]." in listed
        assert "│ yard " in listed
        assert re.search(r"│ valid +│", listed)

    def test_a_key_is_retired_by_the_beginning_of_its_id(self, yard: Yard) -> None:
        run("keys", "new")
        key_id = trusted_keys(yard.settings).keys[0].key_id

        assert run("keys", "retire", key_id[:8]).stdout == f"Retired: {key_id}.\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["add"], "Give either the file of a public key or --kms."),
            (["add", "absent.pem"], "absent.pem cannot be read"),
            (["revoke", "fff", "--reason", "x"], "No key 'fff' is known here."),
            (["retire", "fff"], "No key 'fff' is known here."),
        ],
    )
    def test_bad_input_exits_with_10(self, yard: Yard, arguments: list[str], words: str) -> None:
        result = run("keys", *arguments)

        assert result.exit_code == 10
        assert words in result.stderr


class TestReleases:
    @pytest.fixture
    def release_id(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> str:
        """A published release."""
        monkeypatch.setenv("COLUMNS", "250")
        yard.keep_artifacts()
        yard.keep_plan(plan())
        yard.keep(measurement())
        for name in ("accuracy", "latency"):
            gate(plan(), "cpu", name, yard.context)
        return str(publish(plan(), "cpu", yard.context).detail["release_id"])

    def test_a_narrow_terminal_has_room_for_the_id(
        self, yard: Yard, release_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        assert f" {release_id} " in run("releases", "adder").stdout

    def test_the_list_says_who_signed(self, yard: Yard, release_id: str) -> None:
        key = signing_key(yard.settings).public
        assert f"this installation {key.short_id}" in run("releases", "adder").stdout

        run("keys", "revoke", key.short_id, "--reason", "Leaked.")

        assert "a revoked key" in run("releases", "adder").stdout

    def test_the_list_reads_each_release_a_fixed_number_of_times(
        self, yard: Yard, release_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_release(yard.store, "adder", release_id, yard.settings)
        for number in range(3):
            digests = {"serving_digest": f"s{number}"}
            another = release_id_of(
                "adder",
                checkpoint_digest=first.checkpoint_digest,
                compile_key=first.compile_key,
                **digests,
            )
            made = first.model_copy(update={"release_id": another, "signature": None, **digests})
            store_release(yard.store, made, signing_key(yard.settings))
        calls: Counter[str] = Counter()
        for name in ("read", "list"):
            monkeypatch.setattr(FolderStore, name, counted(getattr(FolderStore, name), calls))

        shown = run("releases", "adder").stdout

        assert shown.count("this installation") == 4
        assert (calls["read"], calls["list"]) == (2 * 4, 1)

    def test_the_provenance_is_shown(self, yard: Yard, release_id: str) -> None:
        shown = run("provenance", "adder").stdout

        for text in (release_id, "this installation", "(ed25519)", "file:models v1", "unchanged"):
            assert text in shown
        statement = json.loads(run("provenance", "adder", release_id, "--json").stdout)
        assert statement["predicateType"] == "https://slsa.dev/provenance/v1"

    def test_the_report_is_written_as_one_page(
        self, yard: Yard, release_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        assert run("report", release_id).stdout.strip() == f"{release_id}.html"
        run("report", "adder", "--out", str(tmp_path / "latest.html"))

        page = (tmp_path / f"{release_id}.html").read_text()
        assert page == (tmp_path / "latest.html").read_text()
        assert "Accuracy gate" in page
        assert "Signed" in page

    def test_a_report_needs_a_release_and_a_place(
        self, yard: Yard, release_id: str, tmp_path: Path
    ) -> None:
        assert run("report", "adder-000000000000").exit_code == NotFound.exit_code
        assert run("report", "nothing").exit_code == NotFound.exit_code
        refused = run("report", release_id, "--out", str(tmp_path / "no" / "such.html"))
        assert refused.exit_code == 10
        assert "cannot be written" in refused.stderr

    def test_a_document_that_is_gone_is_named(self, yard: Yard, release_id: str) -> None:
        yard.store.delete("measurements/candidate.json")

        result = run("provenance", "adder")

        assert result.exit_code == CorruptFile.exit_code
        assert "measurements/candidate.json: GONE OR CHANGED" in result.stdout
        assert "measurements/candidate.json is gone" in result.stderr

    def test_an_export_needs_the_address_of_a_repository(self, yard: Yard, release_id: str) -> None:
        result = run("export", "adder", "latest", "registry.example/models")

        assert result.exit_code == 10
        assert "names no repository" in result.stderr

    def test_a_publication_with_a_wrong_address_does_not_begin(self, yard: Yard) -> None:
        result = run("publish", "--plan", "p", "--target", "cpu", "--to", "nowhere")

        assert result.exit_code == 10
        assert "names no repository" in result.stderr
        assert list(yard.store.list("")) == []
