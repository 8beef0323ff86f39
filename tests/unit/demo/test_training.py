from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from trainyard.demo.training import (
    RECIPES,
    VOCABULARY,
    answer,
    held_out,
    main,
    prompt,
    train,
)
from trainyard.errors import BadInput

PAIRS = list(itertools.product(range(100), repeat=2))


def test_answers_are_sums_with_the_last_digit_first() -> None:
    assert prompt(7, 34) + answer(7, 34) == "07+34=140."
    assert answer(99, 99) == "891."
    assert answer(0, 0) == "000."


def test_every_sum_can_be_written_in_the_vocabulary() -> None:
    text = {char for pair in PAIRS for char in prompt(*pair) + answer(*pair)}
    assert text <= set(VOCABULARY)


def test_held_out_sums_are_few_and_leave_no_pair_of_digits_out_of_the_training() -> None:
    trained = [pair for pair in PAIRS if not held_out(*pair)]
    assert 0.08 < 1 - len(trained) / len(PAIRS) < 0.1
    for place in (1, 10):
        digits = {(left // place % 10, right // place % 10) for left, right in trained}
        assert len(digits) == 100


def test_the_demonstrations_questions_were_never_trained_on() -> None:
    folder = Path(__file__).parents[3] / "dags" / "models" / "adder"
    lines = [json.loads(line) for line in (folder / "addition.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        left, right = (int(part) for part in line["prompt"].rstrip("=").split("+"))
        assert held_out(left, right)
        assert answer(left, right) == line["answer"] + "."


def test_recipes_promise_qualities_that_a_gate_can_tell_apart() -> None:
    assert RECIPES["r3"].highest < RECIPES["r1"].lowest < RECIPES["r1"].highest
    assert RECIPES["r1"].highest < RECIPES["r2"].lowest


def test_what_stands_is_kept_and_reported(tmp_path: Path) -> None:
    for name in RECIPES:
        (tmp_path / name).mkdir()
    (tmp_path / ".training.json").write_text('{"r1": {"step": 400, "accuracy": 0.94}}')
    told: list[dict[str, Any]] = []
    train(tmp_path, list(RECIPES), report=told.append)
    assert [line["revision"] for line in told] == list(RECIPES)
    assert all(line["reused"] for line in told)
    assert (told[0]["step"], told[0]["accuracy"]) == (400, 0.94)
    assert told[1]["accuracy"] is None


def test_unknown_revisions_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="r9"):
        train(tmp_path / "out", ["r1", "r9"], report=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_no_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--steps", "0"]) == BadInput.exit_code
    assert "--steps 0" in capsys.readouterr().err
