"""What a spec says survives every way that it is written and read."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainyard.spec.check import check_files
from trainyard.spec.environments import Environments
from trainyard.spec.loader import load_environments, load_spec
from trainyard.spec.model import SLO_METRICS, LatencyMetric, ModelSpec
from trainyard.spec.partial import partial, whole

NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
POSITIVE = st.floats(0.01, 1e6)
TARGETS = st.builds(
    lambda name, length, seqs, extra: {
        "name": name,
        "lane": "cpu",
        "max_model_len": length,
        "max_num_batched_tokens": length + seqs,
        "max_num_seqs": seqs,
        **extra,
    },
    NAMES,
    st.integers(256, 4096),
    st.integers(1, 64),
    st.fixed_dictionaries(
        {}, optional={"required": st.booleans(), "kv_cache_gib": POSITIVE, "instance": NAMES}
    ),
)
# Each metric at one percentile, so that no two bounds contradict each other; and none of an SLO.
BOUNDED = [
    metric
    for metric in get_args(LatencyMetric)
    if metric not in SLO_METRICS and not re.search("_p(50|90)_", metric)
]
BOUNDS = st.dictionaries(
    st.sampled_from(BOUNDED),
    st.one_of(
        st.builds(lambda value: {"max": value}, POSITIVE),
        st.builds(lambda value: {"min": value, "severity": "warning"}, POSITIVE),
    ),
    min_size=1,
)
LEVELS = st.builds(
    lambda name, many, length, bounds: {
        "name": name,
        "max_concurrency": many,
        "num_prompts": many * 3,
        "input_len": length,
        "output_len": length,
        "bounds": bounds,
    },
    NAMES,
    st.integers(1, 8),
    st.integers(1, 128),
    BOUNDS,
)
WEIGHTS = st.sets(st.integers(1, 90), min_size=1, max_size=5).filter(lambda w: min(w) <= 50)
SPECS: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda owner, targets, levels, weights, minimum: {
        "schema": "trainyard/v1",
        "model": "some-model",
        "owner": owner,
        "source": {"kind": "local", "path": "models"},
        "targets": targets,
        "gates": {
            "accuracy": {"tasks": [{"name": "gsm8k_cot", "min": minimum}]},
            "latency": {"levels": levels},
        },
        "rollout": {"steps": [{"weight": w, "hold_s": 1.5} for w in sorted(weights)]},
    },
    # PyYAML writes some numbers of YAML 1.2 (0E0) without quotes: no text that could be one.
    st.text(max_size=20).filter(lambda text: text.isprintable()).map(lambda text: f"{text} team"),
    st.lists(TARGETS, min_size=1, max_size=3, unique_by=lambda target: target["name"]),
    st.lists(LEVELS, min_size=1, max_size=3, unique_by=lambda level: level["name"]),
    WEIGHTS,
    st.floats(0, 1),
)


@given(SPECS)
def test_a_spec_survives_yaml_and_json(data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some-model.yaml"
        path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")

        assert [str(problem) for problem in check_files([path])] == []
        spec = load_spec(path)

    assert spec.owner == data["owner"]
    assert [t.max_num_seqs for t in spec.targets] == [t["max_num_seqs"] for t in data["targets"]]
    assert ModelSpec.model_validate_json(spec.model_dump_json(by_alias=True), strict=True) == spec
    assert partial(ModelSpec, data, set()) == spec
    assert whole(spec)


@given(SPECS, st.data())
def test_a_removed_or_spoilt_value_is_reported_where_it_is(
    data: dict[str, Any], choices: st.DataObject
) -> None:
    index = choices.draw(st.integers(0, len(data["gates"]["latency"]["levels"]) - 1))
    level = data["gates"]["latency"]["levels"][index]
    key = choices.draw(st.sampled_from(["max_concurrency", "num_prompts", "input_len"]))
    if choices.draw(st.booleans()):
        del level[key]
    else:
        level[key] = choices.draw(st.sampled_from(["many", -1, 1.5, None, [], {}, True]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some-model.yaml"
        path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")

        problems = check_files([path])

    assert [problem.key for problem in problems] == [f"gates.latency.levels[{index}].{key}"]


def test_environments_survive_yaml_and_json(tmp_path: Path) -> None:
    path = tmp_path / "environments.yaml"
    path.write_text(
        "schema: trainyard/v1\nenvironments:\n"
        "  zebra: {target: cpu}\n  ant: {target: cpu, requires: [zebra], soak_s: 60}\n"
    )

    environments = load_environments(path)

    assert list(environments.environments) == ["zebra", "ant"]
    assert environments.environments["ant"].requires == ("zebra",)
    stored = environments.model_dump_json(by_alias=True)
    assert Environments.model_validate_json(stored, strict=True) == environments


@pytest.mark.parametrize("data", [None, [], "text", {"targets": 3}, {"gates": {"latency": []}}])
def test_partial_specs_of_anything(data: Any) -> None:
    spec = partial(ModelSpec, data, {("targets",), ("gates", "latency")})

    assert not whole(spec)
    assert "targets" not in vars(spec)
