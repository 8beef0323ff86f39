"""Sources in a spec: each kind has its own keys, and contradictions are found without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.yard import SPEC

from trainyard.spec.check import Problem, check_files
from trainyard.spec.loader import load_spec
from trainyard.spec.model import HuggingFaceSource, ModelSpec, S3Source
from trainyard.spec.partial import partial
from trainyard.spec.patterns import selected

HUB = {"kind": "huggingface", "repo": "organization/model"}
S3 = {"kind": "s3", "uri": "s3://models/adder/"}
TOKEN = "hf_" + "A1b2C3d4" * 4


def write(folder: Path, source: Any) -> Path:
    path = folder / "adder.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "source": source}), encoding="utf-8")
    return path


def found(folder: Path, source: Any) -> dict[str, Problem]:
    return {problem.key: problem for problem in check_files([write(folder, source)])}


@pytest.mark.parametrize(
    "source",
    [
        HUB,
        {**HUB, "repo": "gpt2", "revision": "refs/pr/3"},
        {**HUB, "allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["original/"]},
        {**HUB, "allow_files": ["modeling_x.py"], "ignore_patterns": ["*.bin"]},
        S3,
        {"kind": "s3", "uri": "s3://models"},
        {**S3, "layout": "snapshot", "revision": "0123456789ab"},
        {**S3, "latest": "modified"},
    ],
)
def test_what_is_fine(tmp_path: Path, source: dict[str, Any]) -> None:
    assert found(tmp_path, source) == {}
    spec = load_spec(tmp_path / "adder.yaml")
    assert isinstance(spec.source, HuggingFaceSource | S3Source)
    assert ModelSpec.model_validate_json(spec.model_dump_json(by_alias=True), strict=True) == spec
    data = json.loads(json.dumps({**SPEC, "source": source}))
    assert partial(ModelSpec, data, set()) == spec


@pytest.mark.parametrize(
    ("source", "key", "words"),
    [
        ({"kind": "hub", "repo": "a/b"}, "source.kind", "local, huggingface, s3"),
        ({"repo": "a/b"}, "source.kind", "is missing. Possible: local, huggingface, s3"),
        ({"kind": 3}, "source.kind", "not possible"),
        ("models", "source", "a mapping"),
        ({"kind": "huggingface"}, "source.repo", "is missing"),
        ({**HUB, "path": "x"}, "source.path", "Possible: kind, repo, revision"),
        ({**S3, "repo": "x"}, "source.repo", "Possible: kind, uri, layout"),
        ({**HUB, "repo": "https://hub/a/b"}, "source.repo", "organization/model"),
        ({**HUB, "repo": "a/b/c"}, "source.repo", "organization/model"),
        ({**HUB, "repo": "a/b..c"}, "source.repo", "no name that the Hub gives"),
        ({**HUB, "revision": "a..b"}, "source.revision", "'..'"),
        ({**HUB, "revision": "/main"}, "source.revision", "a branch"),
        ({**S3, "uri": "https://models/x"}, "source.uri", "s3://BUCKET/PREFIX/"),
        ({**S3, "uri": "s3://models/../x"}, "source.uri", "mean nothing in S3"),
        ({**S3, "layout": "folders"}, "source.layout", "subfolders, snapshot"),
        ({**S3, "layout": "snapshot", "latest": "modified"}, "source.latest", "has none"),
        ({**HUB, "allow_patterns": ["/etc/*"]}, "source.allow_patterns[0]", "match nothing"),
        ({**HUB, "ignore_patterns": ["a/../*"]}, "source.ignore_patterns[0]", "match nothing"),
        ({**S3, "ignore_patterns": ["a\\*"]}, "source.ignore_patterns[0]", "match nothing"),
        ({**HUB, "allow_patterns": ["*.safetensors"]}, "source.allow_patterns", "config.json"),
        ({**HUB, "ignore_patterns": ["*.json"]}, "source.ignore_patterns", "tokenizer.json"),
        ({**HUB, "allow_files": ["*.py"]}, "source.allow_files[0]", "exact name"),
        ({**HUB, "allow_files": ["code/x.py"]}, "source.allow_files[0]", "exact name"),
        ({**S3, "allow_files": ["../x.py"]}, "source.allow_files[0]", "exact name"),
        ({**S3, "allow_files": ["x.py", "x.py"]}, "source.allow_files[1]", "twice"),
        (
            {**HUB, "allow_files": ["x.py"], "ignore_patterns": ["*.py"]},
            "source.allow_files[0]",
            "one of the two",
        ),
        (
            {"kind": "local", "path": "x", "allow_files": ["a/b.py"]},
            "source.allow_files[0]",
            "exact name",
        ),
    ],
)
def test_what_is_wrong(tmp_path: Path, source: Any, key: str, words: str) -> None:
    problems = found(tmp_path, source)
    assert key in problems
    assert words in f"{problems[key].message} {problems[key].remedy}"
    assert problems[key].message.endswith(".")
    assert "The rule is" not in problems[key].remedy


@pytest.mark.parametrize(
    "source",
    [
        {**HUB, "token": TOKEN},
        {**HUB, "hf_token": TOKEN},
        {**HUB, "revision": TOKEN.replace("_", "-").replace("hf-", "hf_")},
        {**HUB, "repo": f"https://user:{TOKEN}@hub/a/b"},
        {**HUB, "ignore_patterns": [TOKEN]},
        {**S3, "secret_access_key": "wJalrXUtnFEMI"},
        {**S3, "uri": "s3://AKIAEXAMPLE:wJalrXUtnFEMI@models/x"},
    ],
)
def test_credentials_have_another_place(tmp_path: Path, source: Any) -> None:
    text = "\n".join(str(problem) for problem in found(tmp_path, source).values())
    assert text
    assert TOKEN not in text
    assert "wJalrXUtnFEMI" not in text
    assert (
        "TRAINYARD_HUB_TOKEN" in text or "without credentials" in text or "name on the Hub" in text
    )


def test_only_a_source_is_suspected_of_credentials(tmp_path: Path) -> None:
    target = {**SPEC["targets"][0], "max_num_batched_token": 64}
    path = tmp_path / "adder.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "targets": [target]}), encoding="utf-8")
    (problem,) = check_files([path])
    assert "Did you mean max_num_batched_tokens?" in problem.remedy


@given(
    st.text(st.sampled_from("ab*?/.[]"), min_size=1, max_size=8),
    st.lists(st.text(st.sampled_from("ab*?/.[]"), min_size=1, max_size=6), max_size=2),
    st.lists(st.text(st.sampled_from("ab*?/.[]"), min_size=1, max_size=6), max_size=2),
)
def test_patterns_mean_what_they_mean_to_huggingface_hub(
    path: str, allow: list[str], ignore: list[str]
) -> None:
    theirs = filter_repo_objects(
        [path], allow_patterns=allow or None, ignore_patterns=ignore or None
    )
    assert selected(path, allow=allow, ignore=ignore) == (list(theirs) == [path])
