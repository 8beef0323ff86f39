from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from trainyard import cli
from trainyard.documents.evidence import Block
from trainyard.errors import BadInput
from trainyard.rollout.block_log import dump_blocks, parse_blocks, parse_judge_spec
from trainyard.rollout.judge import replay


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["judge", *arguments], env={"COLUMNS": "200"})


def log_of(figures: Callable[[str], dict[str, Any]], *, minutes: int = 6) -> list[Block]:
    """Return the log of two pods a side; `figures` has what a track's rows do not share."""
    return [
        Block.model_validate(
            {
                "t": 30.0 * (i + 1),
                "duration_s": 30.0,
                "release": f"m-{track}",
                "track": track,
                "pod": f"{track}-{pod}",
                "weight_candidate": 50,
                **figures(track),
            }
        )
        for i in range(2 * minutes)
        for track in ("stable", "candidate")
        for pod in range(2)
    ]


def blocks(*, failed: int, minutes: int = 6) -> list[Block]:
    """Return a log in which the candidate fails `failed` of 100 requests a slice."""
    errors = {"metric": "errors", "kind": "count", "requests": 100}
    bad = {"stable": 0, "candidate": failed}
    return log_of(lambda track: {**errors, "bad": bad[track]}, minutes=minutes)


def latencies(total: float) -> list[Block]:
    """Return a log in which a slice's times to the first token add up to `total`."""
    ttft = {"metric": "ttft", "kind": "mean", "requests": 60, "total": total}
    return log_of(lambda _: ttft, minutes=3)


@pytest.mark.parametrize(
    ("spec", "total"),
    [
        ("max_duration_s: 1800\ncovariance: {sb2: 1.0e+300}\n", 12.0),
        ("max_duration_s: 1800\n", 1e308),
    ],
)
def test_figures_out_of_all_proportion_are_bad_input(
    tmp_path: Path, spec: str, total: float
) -> None:
    (tmp_path / "spec.yaml").write_text(spec)
    (tmp_path / "blocks.jsonl").write_text(dump_blocks(latencies(total)))
    result = run("--blocks", str(tmp_path / "blocks.jsonl"), "--spec", str(tmp_path / "spec.yaml"))
    assert result.exit_code == BadInput.exit_code
    assert "The judge cannot compute with these figures" in result.output
    assert "`covariance`" in result.output


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(
        """
max_duration_s: 600
metrics:
  - {name: errors, kind: count, harm_margin: 2, promote_margin: 3, harm_floor: 0.005,
     promote_ceiling: 0.008, harm_alpha: 0.01}
"""
    )
    return path


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "blocks.jsonl"
    path.write_text(dump_blocks(blocks(failed=10)))
    return path


def test_a_log_is_replayed_look_by_look(log_file: Path, spec_file: Path) -> None:
    result = run("--blocks", str(log_file), "--spec", str(spec_file))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if " s  " in line]
    assert len(lines) == 12
    assert "UNDECIDED" in lines[0]
    assert "HARM" in lines[-1]
    assert "errors 10.00% against 0.00%" in lines[-1]


def test_a_metric_that_can_only_show_harm_has_no_evidence_of_quality(
    log_file: Path, spec_file: Path
) -> None:
    only = "{name: empty, kind: count, harm_margin: 2, promote_margin: 2, harm_alpha: 0.0001"
    spec_file.write_text(f"{spec_file.read_text()}  - {only}, harm_only: true}}\n")
    result = run("--blocks", str(log_file), "--spec", str(spec_file))
    assert result.exit_code == 0, result.output
    assert "no closed block yet" not in result.stdout
    row = next(line for line in result.stdout.splitlines() if "empty" in line)
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    assert cells[1:4] == ["no data", "-", "-"]
    assert cells[5] == "-"


def test_programs_get_every_verdict_as_a_line_of_json(log_file: Path, spec_file: Path) -> None:
    result = run("--blocks", str(log_file), "--spec", str(spec_file), "--json")
    spec = parse_judge_spec(
        {
            "max_duration_s": 600,
            "metrics": [
                {
                    "name": "errors",
                    "kind": "count",
                    "harm_margin": 2,
                    "promote_margin": 3,
                    "harm_floor": 0.005,
                    "promote_ceiling": 0.008,
                    "harm_alpha": 0.01,
                }
            ],
        },
        name="spec",
    )
    expected = [json.loads(v.model_dump_json()) for v in replay(blocks(failed=10), spec)]
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


def test_a_log_survives_being_written_and_read() -> None:
    log = blocks(failed=3)
    assert parse_blocks(dump_blocks(log), name="log") == log


def test_blocks_can_be_saved(log_file: Path, spec_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    run("--blocks", str(log_file), "--spec", str(spec_file), "--save-blocks", str(copy))
    assert copy.read_text() == log_file.read_text()


def test_a_specification_without_metrics_has_the_default_ones() -> None:
    names = [metric.name for metric in parse_judge_spec({"max_duration_s": 60}, name="s").metrics]
    assert names == ["ttft", "tpot", "errors", "ttft_tail"]


def test_a_wrong_line_is_named(spec_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(dump_blocks(blocks(failed=0)[:2]) + '\n{"t": 1}\n')
    result = run("--blocks", str(path), "--spec", str(spec_file))
    assert result.exit_code == BadInput.exit_code
    assert f"Line 4 of {path} is no block" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--blocks", "LOG"),
        ("--blocks", "LOG", "--spec", "SPEC", "--rollout", "adder", "staging", "1"),
        ("--blocks", "nowhere.jsonl", "--spec", "SPEC"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_advice(
    arguments: tuple[str, ...], log_file: Path, spec_file: Path
) -> None:
    named = {"LOG": str(log_file), "SPEC": str(spec_file)}
    result = run(*(named.get(each, each) for each in arguments))
    assert result.exit_code == BadInput.exit_code
    assert "What to do:" in result.stderr


@pytest.mark.parametrize(
    "text", ["- 1", "max_duration_s: -1", "max_duration_s: 60\nmargin: 2", "{"]
)
def test_a_wrong_specification_is_refused(text: str, log_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    result = run("--blocks", str(log_file), "--spec", str(path))
    assert result.exit_code == BadInput.exit_code
    assert str(path) in result.stderr


def test_history_alone_is_no_log(spec_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    early = [b.model_copy(update={"t": -30.0, "weight_candidate": 0}) for b in blocks(failed=0)[:1]]
    path.write_text(dump_blocks(early))
    result = run("--blocks", str(path), "--spec", str(spec_file))
    assert result.exit_code == BadInput.exit_code
    assert "nothing but history" in result.stderr
