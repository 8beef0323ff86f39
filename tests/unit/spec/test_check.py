"""Every mistake is found at once, with its line, in plain words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainyard.errors import BadInput, NotFound
from trainyard.spec.check import InvalidSpec, Problem, check_files
from trainyard.spec.loader import Catalogue, load_environments, load_spec
from trainyard.spec.model import Target

DAGS = Path(__file__).parents[3] / "dags"
FILES = Path(__file__).parent / "files"
"""A catalogue that stays as it is when the shipped one is tuned."""

TEN_MISTAKES = """\
schema: trainyard/v1
model: broken
source: {kind: local, path: "${HOME}/models"}
targets:
  - name: CPU
    lane: gpu
    max_modell_len: 256
    max_num_batched_tokens: 8
  - name: second
    lane: cpu
    max_model_len: 64
    max_num_seqs: "16"
gates:
  accuracy:
    tasks:
      - {name: addition, path: ../addition.yaml, min: 95}
  latency:
    levels:
      - name: one
        max_concurrency: 8
        num_prompts: 4
        input_len: 64
        output_len: 64
        bounds:
          ttft_p98_ms: {max: 1}
          tpot_p50_ms: {}
rollout:
  steps:
    - {weight: 50, hold_s: 10}
    - {weight: 50, hold_s: 10}
  on_undecided: wait
  judge:
    margins:
      ttft: {harm: 0.5, promote: 0.2}
refresh:
  cron: "61 * * * *"
"""


def found(path: Path) -> dict[str, Problem]:
    return {problem.key: problem for problem in check_files([path])}


def write(folder: Path, text: str, name: str = "broken.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_files_have_no_mistakes() -> None:
    files = [DAGS / "models" / "adder.yaml", DAGS / "environments.yaml"]

    assert check_files(files) == []
    assert load_spec(files[0]).model == "adder"
    assert list(load_environments(files[1]).environments) == ["staging", "production"]


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    problems = check_files([write(tmp_path, TEN_MISTAKES)])

    assert [(problem.line, problem.key) for problem in problems] == [
        (1, "owner"),
        (3, "source.path"),
        (5, "targets[0].name"),
        (6, "targets[0].lane"),
        (7, "targets[0].max_modell_len"),
        (8, "targets[0].max_num_batched_tokens"),
        (12, "targets[1].max_num_seqs"),
        (16, "gates.accuracy.tasks[0].path"),
        (16, "gates.accuracy.tasks[0].min"),
        (21, "gates.latency.levels[0].num_prompts"),
        (23, "gates.latency.levels[0].output_len"),
        (25, "gates.latency.levels[0].bounds.ttft_p98_ms"),
        (26, "gates.latency.levels[0].bounds.tpot_p50_ms"),
        (30, "rollout.steps[1].weight"),
        (31, "rollout.on_undecided"),
        (34, "rollout.judge.margins.ttft.harm"),
        (36, "refresh.cron"),
    ]
    assert all(problem.message.endswith(".") and problem.remedy for problem in problems)
    text = "\n".join(map(str, problems)).lower()
    for jargon in ("pydantic", "http", "input should", "valid dictionary", "value_error"):
        assert jargon not in text


def test_messages_say_what_would_be_right(tmp_path: Path) -> None:
    problems = found(write(tmp_path, TEN_MISTAKES))

    assert "max_model_len" in problems["targets[0].max_modell_len"].remedy.split("?")[0]
    assert "cpu, neuron-native, neuron-nxdi" in problems["targets[0].lane"].remedy
    assert "without quotes" in problems["targets[1].max_num_seqs"].remedy
    assert "at most 1" in problems["gates.accuracy.tasks[0].min"].remedy
    bound = "gates.latency.levels[0].bounds.ttft_p98_ms"
    assert "Did you mean ttft_p9" in problems[bound].remedy
    assert "of target second" in problems["gates.latency.levels[0].output_len"].message
    assert "who answers" in problems["owner"].remedy.lower()


def test_a_target_whose_value_is_wrong_is_not_judged_by_its_default(tmp_path: Path) -> None:
    text = (FILES / "models" / "adder.yaml").read_text(encoding="utf-8")
    shutil.copytree(FILES / "models" / "adder", tmp_path / "adder")
    # The default of max_num_batched_tokens, 2048, would be below max_num_seqs.
    text = text.replace("max_num_batched_tokens: 256", "max_num_batched_tokens: lots")
    text = text.replace("max_num_seqs: 16", "max_num_seqs: 4000")

    problems = check_files([write(tmp_path, text, "adder.yaml")])

    assert [problem.key for problem in problems] == ["targets[0].max_num_batched_tokens"]


def waived(line: str) -> str:
    """Return the end of the gates with a waiver, and what follows them."""
    return f"\n  behaviour:\n    waivers:\n      {line}\n\nrollout:"


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("weight: 50", "weight: 95", "rollout.steps[1].weight", "more than the 90 %"),
        (
            "    - {weight: 10, hold_s: 20}\n    - {weight: 50",
            "    - {weight: 60",
            "rollout.steps[0].weight",
            "never be compared",
        ),
        ("max_duration_s: 300", "max_duration_s: 40", "rollout.max_duration_s", "hold for 50 s"),
        ("block_s: 5", "block_s: 200", "rollout.judge.block_s", "do not fit"),
        (
            "tpot: {harm: 0.5, promote: 0.6",
            "errors: {harm: 0.5, promote: 3",
            "rollout.judge.margins.errors.harm",
            "ratio",
        ),
        (
            "ttft: {harm: 0.5",
            "ttft: {harm_floor: 0.1, harm: 0.5",
            "rollout.judge.margins.ttft.harm_floor",
            "average",
        ),
        (
            "      tpot: {harm: 0.5, promote: 0.6}",
            "      errors: {harm: 2, promote: 3, harm_floor: 0.1, promote_ceiling: 0.01}",
            "rollout.judge.margins.errors.harm_floor",
            "above promote_ceiling",
        ),
        ("block_s: 5", "block_s: 5\n    endings: {empty: {harm: 0.5}}",
         "rollout.judge.endings.empty.harm", "out of range"),
        ("block_s: 5", "block_s: 5\n    endings: {rejected: {judged: false}}",
         "rollout.judge.endings.rejected", "not possible"),
        ("name: busy", "name: one", "gates.latency.levels[1].name", "another level"),
        ("tpot_p90_ms: {max: 300}", "tpot_p90_ms: {min: 400, max: 300}",
         "gates.latency.levels[1].bounds.tpot_p90_ms.min", "nothing can pass"),
        ("path: adder/addition.yaml", "path: adder/none.yaml",
         "gates.accuracy.tasks[0].path", "no file"),
        ("path: adder/addition.yaml", "path: adder.yaml",
         "gates.accuracy.tasks[0].path", "beside the spec"),
        ("name: addition", "name: adding", "gates.accuracy.tasks[0].path", "not 'adding'"),
        ("prompts: adder/prompts", "prompts: /etc/prompts", "prompts", "leaves the folder"),
        ("model: adder", "model: subtracter", "model", "named adder.yaml"),
        ("kv_cache_gib: 1", "block_size: 512", "targets[0].block_size", "more than max_model_len"),
        ("  steps:\n    - {weight: 10, hold_s: 20}\n    - {weight: 50, hold_s: 30}",
         "  steps: []", "rollout.steps", "all traffic at once"),
        ("revision: r1", "revision: 20260101", "source.revision", "not text"),
        ("owner: trainyard-demo", "owner: no\nowner: yes", "owner", "twice"),
        ("\nrollout:", waived("penalty: {severity: skip, reason: None is sent.}"),
         "gates.behaviour.waivers.penalty", "'penalty' is not possible"),
        ("\nrollout:", waived("penalties: {severity: critical, reason: None is sent.}"),
         "gates.behaviour.waivers.penalties.severity", "'critical' is not possible"),
        ("\nrollout:", waived("penalties: {severity: skip}"),
         "gates.behaviour.waivers.penalties.reason", "'reason' is missing"),
        ("\nrollout:", waived("penalties: {severity: skip, reason: ' '}"),
         "gates.behaviour.waivers.penalties.reason", "Nobody can tell why"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path: Path, old: str, new: str, key: str, words: str) -> None:
    text = (FILES / "models" / "adder.yaml").read_text(encoding="utf-8")
    shutil.copytree(FILES / "models" / "adder", tmp_path / "adder")
    assert old in text

    problems = check_files([write(tmp_path, text.replace(old, new, 1), "adder.yaml")])

    assert [problem.key for problem in problems] == [key]
    assert words in problems[0].message
    line = (tmp_path / "adder.yaml").read_text(encoding="utf-8").splitlines()[problems[0].line - 1]
    assert key.rsplit(".", 1)[-1].split("[")[0] in line or line in new


def test_a_task_folder_holds_data_only(tmp_path: Path) -> None:
    shutil.copy(FILES / "models" / "adder.yaml", tmp_path)
    folder = tmp_path / "adder"
    shutil.copytree(FILES / "models" / "adder", folder)
    (folder / "utils.py").write_text("print('hello')\n")
    task = folder / "addition.yaml"
    task.write_text(task.read_text() + "process_results: !function utils.score\n")
    (folder / "away.json").symlink_to("/etc/hostname")

    messages = [problem.message for problem in check_files([tmp_path / "adder.yaml"])]

    assert len(messages) == 3
    assert any("utils.py does not belong" in message for message in messages)
    assert any("`!function` is a tag" in message for message in messages)
    assert any("away.json is no ordinary file" in message for message in messages)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ('{"prompt": "a"}\nnot json\n', "line 2"),
        ('{"question": "a"}\n', "no prompt"),
        ('["a"]\n', "no prompt"),
    ],
)
def test_prompts_are_checked(tmp_path: Path, content: str, words: str) -> None:
    shutil.copy(FILES / "models" / "adder.yaml", tmp_path)
    shutil.copytree(FILES / "models" / "adder", tmp_path / "adder")
    (tmp_path / "adder" / "prompts.jsonl").write_text(content)

    problems = check_files([tmp_path / "adder.yaml"])

    assert [problem.key for problem in problems] == ["prompts"]
    assert words in problems[0].message


def with_probes(folder: Path, probes: str, lines: list[str] | None = None) -> list[Problem]:
    """Return what is wrong with the shipped spec once it has probes."""
    text = (FILES / "models" / "adder.yaml").read_text(encoding="utf-8")
    shutil.copytree(FILES / "models" / "adder", folder / "adder", dirs_exist_ok=True)
    (folder / "adder" / "probes.jsonl").write_text("\n".join(lines or [SUM] * 100))
    text = text.replace("\nrollout:\n", f"\nrollout:\n  probes: {probes}\n")
    return check_files([write(folder, text, "adder.yaml")])


SUM = '{"prompt": "1+1=", "answer": "2"}'


def test_probes_that_are_right_are_no_trouble(tmp_path: Path) -> None:
    assert with_probes(tmp_path, "{prompts: adder/probes.jsonl, stop: [.]}") == []


@pytest.mark.parametrize(
    ("probes", "lines", "key", "words"),
    [
        ("{prompts: adder/none.jsonl}", None, "prompts", "no file adder/none.jsonl"),
        ("{prompts: ../probes.jsonl}", None, "prompts", "leaves the folder"),
        ("{prompts: adder/addition.yaml}", None, "prompts", "no JSONL file"),
        ("{prompts: adder/prompts.jsonl}", None, "prompts", "line 1: there is no answer"),
        ("{prompts: adder/probes.jsonl}", [SUM] * 99, "prompts", "fewer than 100"),
        ("{prompts: adder/probes.jsonl, scoring: none}", [SUM] * 24, "prompts", "fewer than 25"),
        ("{prompts: adder/probes.jsonl, pairs_per_s: 0}", None, "pairs_per_s", "out of range"),
        ("{prompts: adder/probes.jsonl, scoring: fuzzy}", None, "scoring", "not possible"),
        ("{prompts: adder/probes.jsonl, max_tokens: 1}", None, "max_tokens", "out of range"),
        ("{prompts: adder/probes.jsonl, stop: ['']}", None, "stop[0]", "nothing here"),
        ("{pairs_per_s: 1}", None, "prompts", "'prompts' is missing"),
    ],
)
def test_probes_are_checked(
    tmp_path: Path, probes: str, lines: list[str] | None, key: str, words: str
) -> None:
    (problem,) = with_probes(tmp_path, probes, lines)
    assert problem.key == f"rollout.probes.{key}"
    assert words in problem.message
    assert problem.remedy


def test_fewer_prompts_will_do_where_more_worse_answers_are_allowed(tmp_path: Path) -> None:
    margins = "\n      quality: {harm: 2, promote: 3, harm_floor: 0.1, promote_ceiling: 0.2}"
    assert with_probes(tmp_path, "{prompts: adder/probes.jsonl}", [SUM] * 30)
    spec = tmp_path / "adder.yaml"
    spec.write_text(spec.read_text().replace("    margins:", f"    margins:{margins}"))
    assert check_files([spec]) == []


def test_probes_need_two_releases_and_quality_needs_probes(tmp_path: Path) -> None:
    probes = "{prompts: adder/probes.jsonl}"
    text = (FILES / "models" / "adder.yaml").read_text(encoding="utf-8")
    assert "  capacity: surge\n" in text
    assert with_probes(tmp_path, probes) == []
    single = text.replace("  capacity: surge\n", f"  capacity: single\n  probes: {probes}\n")
    assert set(found(write(tmp_path, single, "adder.yaml"))) == {"rollout.probes"}
    alone = text.replace("    margins:", "    margins:\n      quality: {harm: 2, promote: 3}")
    problems = found(write(tmp_path, alone, "adder.yaml"))
    assert set(problems) == {"rollout.judge.margins.quality"}
    assert "there are none" in problems["rollout.judge.margins.quality"].message


ENVIRONMENTS = """\
schema: trainyard/v1
environments:
  one:
    target: cpu
    requires: [two]
  two:
    target: cpu
    requires: [three, one]
  small:
    target: gpu
    capacity: single
    soak_s: 60
  tiny:
    target: cpu
    devices: 1
    requires: [tiny, smal]
"""


def test_environments_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, ENVIRONMENTS, "environments.yaml")

    problems = check_files([FILES / "models" / "adder.yaml", path])

    assert {(problem.line, problem.key) for problem in problems} == {
        (5, "environments.one.requires"),
        (8, "environments.two.requires[0]"),
        (10, "environments.small.target"),
        (11, "environments.small.capacity"),
        (12, "environments.small.soak_s"),
        (13, "environments.tiny.capacity"),
        (16, "environments.tiny.requires"),
        (16, "environments.tiny.requires[1]"),
    }
    circles = {problem.message for problem in problems if "each other" in problem.message}
    assert circles == {
        "The environments require each other: one → two → one.",
        "The environments require each other: tiny → tiny.",
    }
    assert "Did you mean small?" in next(
        problem.remedy for problem in problems if problem.key == "environments.tiny.requires[1]"
    )


PLACES = """\
schema: trainyard/v1
environments:
  nowhere: {target: cpu, platform: kubernetes}
  both: {target: cpu, kubernetes: {namespace: serving, image: serve}}
  right: {target: cpu, platform: kubernetes, kubernetes: {namespace: serving, image: serve}}
"""


def test_a_place_in_a_cluster_belongs_to_platform_kubernetes(tmp_path: Path) -> None:
    problems = check_files([write(tmp_path, PLACES, "environments.yaml")])
    assert [problem.key for problem in problems] == [
        "environments.nowhere.platform",
        "environments.both.kubernetes",
    ]
    assert "`kubernetes: {namespace: …}`" in problems[0].remedy
    assert "set platform: kubernetes" in problems[1].remedy


def test_servers_in_a_cluster_need_an_image(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    text = PLACES.split("  nowhere")[0] + (
        "  bare: {target: cpu, platform: kubernetes, kubernetes: {namespace: serving}}\n"
    )
    environments = write(tmp_path, text, "environments.yaml")
    models = sorted((tmp_path / "models").glob("*.yaml"))
    problems = [each for each in check_files([*models, environments]) if "bare" in each.key]
    assert [(each.key, each.remedy) for each in problems] == [
        ("environments.bare.kubernetes", "Give kubernetes.image there.")
    ]
    assert "target cpu (lane cpu) in environment bare" in problems[0].message


SOURCES = """\
schema: trainyard/v1
environments:
  plain: {target: cpu, metrics: {source: prometheus}}
  both: {target: cpu, metrics: {url: "http://prometheus:9090"}}
  open: {target: cpu, metrics: {source: prometheus, url: "http://prometheus:9090", auth: bearer}}
  secret: {target: cpu, metrics: {source: prometheus, url: "https://me:word@prometheus/"}}
  near: {target: cpu, metrics: {source: prometheus, url: "http://127.0.0.1:9090", auth: bearer}}
  good: {target: cpu, metrics: {source: prometheus, url: "https://aps/ws/1", auth: sigv4}}
"""


def test_sources_of_metrics_are_checked(tmp_path: Path) -> None:
    problems = check_files([write(tmp_path, SOURCES, "environments.yaml")])
    assert [(problem.line, problem.key) for problem in problems] == [
        (3, "environments.plain.metrics.source"),
        (4, "environments.both.metrics.url"),
        (5, "environments.open.metrics.url"),
        (6, "environments.secret.metrics.url"),
    ]
    assert "in the clear" in problems[2].message
    assert all("word" not in str(problem).replace("password", "") for problem in problems)


PEOPLE = """\
schema: trainyard/v1
groups: {managers: [ada, bob]}
release: {groups: [manager]}
environments:
  one:
    target: cpu
    allowed:
      promote: {groups: [managers]}
      approve: {users: [ada], groups: [managers]}
    approval: {needs: 3}
    notify:
      - {kind: email, connection: mail}
      - {kind: slack, connection: slack, topic: "arn:aws:sns:us-west-2:123456789012:yard"}
      - {kind: sns, connection: aws, topic: yard, events: [promotedd]}
      - {kind: webhook, connection: hook, events: [promoted]}
"""


def test_people_and_notices_are_checked(tmp_path: Path) -> None:
    problems = check_files([write(tmp_path, PEOPLE, "environments.yaml")])
    assert {(problem.line, problem.key) for problem in problems} == {
        (3, "release.groups[0]"),
        (10, "environments.one.approval.needs"),
        (12, "environments.one.notify[0].to"),
        (13, "environments.one.notify[1].topic"),
        (14, "environments.one.notify[2].topic"),
        (14, "environments.one.notify[2].events[0]"),
    }
    said = {problem.key: str(problem) for problem in problems}
    assert "Did you mean managers?" in said["release.groups[0]"]
    assert "3 people have to approve, and allowed.approve names 2." in "".join(said.values())
    assert "Write the ARN of the topic" in said["environments.one.notify[2].topic"]


def test_order_of_environments(tmp_path: Path) -> None:
    text = """\
schema: trainyard/v1
environments:
  production: {target: cpu, requires: [staging]}
  staging: {target: cpu}
"""
    (problem,) = check_files([write(tmp_path, text, "environments.yaml")])

    assert problem.key == "environments.production.requires[0]"
    assert "Move staging above production" in problem.remedy


def test_refresh_is_checked_against_the_environments(tmp_path: Path) -> None:
    text = (FILES / "models" / "adder.yaml").read_text(encoding="utf-8")
    shutil.copytree(FILES / "models" / "adder", tmp_path / "adder")
    text += "\nrefresh:\n  cron: 0 3 * * mon\n  environments: [production, stagging, production]\n"
    text = text.replace("replicas: 1", "replicas: 2")
    spec = write(tmp_path, text, "adder.yaml")
    strict = write(
        tmp_path,
        "schema: trainyard/v1\nenvironments:\n  staging: {target: cpu}\n"
        "  production: {target: cpu, requires: [staging]}\n",
        "environments.yaml",
    )

    messages = [problem.message for problem in check_files([spec, strict])]

    assert len(messages) == 4
    assert any("requires staging" in message for message in messages)
    assert any("no environment 'stagging'" in message for message in messages)
    assert any("named twice" in message for message in messages)
    assert any("need 4 servers" in message for message in messages)


def test_two_files_for_one_model(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(FILES / "models" / "adder.yaml", tmp_path / folder)
        shutil.copytree(FILES / "models" / "adder", tmp_path / folder / "adder")

    (problem,) = check_files([tmp_path / name / "adder.yaml" for name in ("a", "b")])

    assert problem.file == tmp_path / "b" / "adder.yaml"
    assert "describes this model as well" in problem.message


def test_lane_rules_are_asked_for_whole_targets_only(tmp_path: Path) -> None:
    asked: list[Target] = []

    def lane_rules(target: Target) -> list[str]:
        asked.append(target)
        return ["This lane is not available. Choose cpu."]

    path = write(tmp_path, TEN_MISTAKES)
    whole = FILES / "models" / "adder.yaml"

    problems = check_files([path, whole], lane_rules=lane_rules)

    assert [target.name for target in asked] == ["cpu"]
    assert [problem.message for problem in problems if problem.file == whole] == [
        "This lane is not available. Choose cpu."
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"- a\n- b\n", "a list where a mapping belongs"),
        (b"hello\n", "a single value where a mapping belongs"),
        (b"a: [1, 2\nb: 3\n", "not valid YAML"),
        (b"a: \xff\n", "not UTF-8"),
        (b"a: 1\n---\nb: 2\n", "second document"),
        (b"a: \x07\n", "control character"),
        (b"? [a, b]\n: c\n", "not plain text"),
        (b"a: " + b"[" * 5000, "deeper than"),
    ],
)
def test_files_that_are_no_specs(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)

    problems = check_files([path])

    assert any(words in problem.message for problem in problems)


def test_missing_and_huge_files(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"a: 1\n" * 100_000)

    problems = check_files([tmp_path / "none.yaml", huge, tmp_path])

    assert {problem.file: problem.message.split(" ", 1)[1] for problem in problems} == {
        tmp_path / "none.yaml": f"is no file {tmp_path / 'none.yaml'}.",
        huge: "is larger than 256 KiB.",
        tmp_path: "cannot be read: Is a directory.",
    }


def test_load_spec_names_every_problem(tmp_path: Path) -> None:
    path = write(tmp_path, TEN_MISTAKES)

    with pytest.raises(InvalidSpec) as caught:
        load_spec(path)

    assert len(caught.value.problems) == 17
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)


def test_load_environments_refuses_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="has 7 problems"):
        load_environments(write(tmp_path, ENVIRONMENTS, "environments.yaml"))


def test_catalogue(tmp_path: Path) -> None:
    catalogue = Catalogue(FILES / "models")

    assert catalogue.names() == ["adder"]
    assert catalogue.load("adder").client_model_name == "adder"
    with pytest.raises(NotFound, match="Did you mean adder"):
        catalogue.load("addr")
    with pytest.raises(BadInput, match="not a valid name"):
        catalogue.load("../adder")
    assert Catalogue(tmp_path / "none").names() == []
    with pytest.raises(NotFound, match="There is no model"):
        Catalogue(tmp_path).load("adder")
