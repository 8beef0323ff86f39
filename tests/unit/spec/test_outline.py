"""Who is refreshed, read quickly and without letting one spec spoil the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.refresh_world import write_spec

from trainyard.spec import loader
from trainyard.spec.loader import load_environments
from trainyard.spec.outline import refresh_outlines
from trainyard.spec.yaml_source import parse_yaml

REPOSITORY = Path(__file__).parents[3]


def test_models_with_a_refresh_are_found_with_it(tmp_path: Path) -> None:
    write_spec(tmp_path, "nightly", environments=["production"])
    write_spec(tmp_path, "by-hand", cron=None)
    (found,) = refresh_outlines(tmp_path)
    assert (found.model, found.owner, found.problem) == ("nightly", "yard crew", "")
    assert found.refresh is not None
    assert (found.refresh.cron, found.refresh.environments) == ("0 3 * * *", ("production",))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"0 3 * * *"', '"61 3 * * *"', "'61' is no minute"),
        ('"cron"', '"crom"', "The key 'cron' is missing. Add `cron:`"),
        ('"environments": [', '"environments": "x", "y": [', "is not a list"),
    ],
)
def test_a_mistake_is_named_and_costs_no_other_model_its_dag(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    write_spec(tmp_path, "broken")
    write_spec(tmp_path, "whole")
    path = tmp_path / "broken.yaml"
    path.write_text(path.read_text().replace(old, new))
    broken, whole = refresh_outlines(tmp_path)
    assert broken.refresh is None
    assert broken.problem.startswith("broken.yaml:")
    assert words in broken.problem
    assert whole.refresh is not None


def test_a_file_that_is_no_yaml_keeps_its_dag_if_it_had_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: a\nrefresh:\n  cron: [\n")
    (tmp_path / "b.yaml").write_text("model: b\n  targets: [\n")
    (tmp_path / "Not a name.yaml").write_text("refresh: {cron: 0 3 * * *}\n")
    (found,) = refresh_outlines(tmp_path)
    assert found.model == "a"
    assert found.problem


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "tasks" / "trainyard" / "presets").glob("*.yaml"))
)
def test_the_quick_parser_reads_the_same(path: Path) -> None:
    raw = path.read_bytes()
    slow, quick = parse_yaml(raw, path), parse_yaml(raw, path, quick=True)
    assert quick == slow
    assert quick.data


def test_environments_are_parsed_once_for_all_that_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "environments.yaml"
    path.write_text("schema: trainyard/v1\nenvironments: {one: {target: cpu}}\n")
    parsed = []
    real = loader.parse_yaml
    monkeypatch.setattr(loader, "parse_yaml", lambda *a, **k: parsed.append(a) or real(*a, **k))
    first = load_environments(path)
    assert load_environments(path) is first
    path.write_text("schema: trainyard/v1\nenvironments: {two: {target: cpu}}\n")
    assert list(load_environments(path).environments) == ["two"]
    assert len(parsed) == 2
