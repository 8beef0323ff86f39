"""What is asked follows from the model's files, the spec's prompts and the seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.measure.behaviour.test_batching import SETTING

from trainyard.errors import BadInput
from trainyard.measure.behaviour.setting import PROBES, probes_of, read_texts, read_vocabulary


def files(folder: Path, **contents: Any) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_vocabulary_has_no_special_tokens(tmp_path: Path) -> None:
    model = files(
        tmp_path,
        config={"vocab_size": 12, "bos_token_id": 0, "eos_token_id": [1, 2]},
        generation_config={"pad_token_id": 3},
        tokenizer={
            "added_tokens": [{"id": 4, "special": True}, {"id": 5, "special": False}],
            "model": {"vocab": {str(number): number for number in range(10)}},
        },
    )
    assert read_vocabulary(model) == (5, 6, 7, 8, 9)


def test_the_vocabulary_may_be_that_of_the_text_part(tmp_path: Path) -> None:
    model = files(tmp_path, config={"text_config": {"vocab_size": 4, "eos_token_id": 3}})
    assert read_vocabulary(model) == (0, 1, 2)


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="vocab_size"):
        read_vocabulary(files(tmp_path, config={}))


def test_half_of_the_probes_are_the_specs_prompts() -> None:
    texts = ["1+1=", "1+1=", "2+2=", "x" * 1000, "3+3=", "4+4=", "5+5="]
    setting = replace(SETTING, max_model_len=64, vocabulary=(7, 8, 9))
    probes = probes_of(texts, setting)
    assert probes[:4] == ("1+1=", "2+2=", "3+3=", "4+4=")
    assert len(probes) == PROBES
    assert all(set(probe) <= {7, 8, 9} for probe in probes[4:])
    assert probes == probes_of(texts, setting)
    assert probes[4:] != probes_of(texts, replace(setting, seed=1))[4:]


def test_prompts_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1="}\n\n{"prompt": "2+2="}\n')
    assert read_texts(path) == ("1+1=", "2+2=")
    assert read_texts(None) == ()
