"""Plans follow from facts alone, and their ids from what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.plan import EvalAssets, Plan, ReleaseRequest
from trainyard.errors import BadInput
from trainyard.sources.protocol import ResolvedRevision, SourceFile
from trainyard.spec.environments import Environments
from trainyard.spec.loader import load_spec
from trainyard.spec.model import ModelSpec, Target
from trainyard.steps.planning import (
    Facts,
    TargetFacts,
    architecture_problems,
    choose_targets,
    destination_problems,
    explain,
    make_plan,
    refuse,
)

SPEC = load_spec(Path(__file__).parents[1] / "spec" / "files" / "models" / "adder.yaml")
TARGET = SPEC.targets[0]
FACTS = Facts(
    request=ReleaseRequest(model="adder"),
    spec=SPEC,
    resolved=ResolvedRevision(
        revision="r1",
        uri="file:///models/adder/r1",
        files=(SourceFile("config.json", 700), SourceFile("model.safetensors", 1_100_000)),
        fingerprint="f" * 64,
    ),
    architecture_digest="a" * 64,
    assets=EvalAssets(digest="e" * 64, files=("adder/addition.yaml",)),
    targets=(
        TargetFacts(
            target=TARGET,
            key_inputs={"lane": "cpu", "max_model_len": 256},
            toolchain={"vllm": "0.32.0"},
            serving={"max_num_seqs": 16},
        ),
    ),
)


def nothing(_key: str) -> bool:
    return False


def everything(_key: str) -> bool:
    return True


def changed_spec(path: str, value: Any) -> ModelSpec:
    """Return the spec with one value changed; `path` is dotted, list indices are numbers."""
    data = SPEC.model_dump(mode="json", by_alias=True)
    *way, last = path.split(".")
    inner: Any = data
    for step in way:
        inner = inner[int(step)] if isinstance(inner, list) else inner[step]
    inner[last] = value
    return ModelSpec.model_validate(data)


def waiver(severity: str) -> dict[str, Any]:
    return {"penalties": {"severity": severity, "reason": "Nobody sends any."}}


def with_target(**changes: Any) -> Facts:
    return replace(FACTS, targets=(replace(FACTS.targets[0], **changes),))


def ids(facts: Facts) -> tuple[str, str]:
    """Return plan id and measurement id."""
    plan = make_plan(facts, exists=nothing)
    return plan.plan_id, plan.targets[0].measurement_id


def test_equal_facts_give_equal_plans_whatever_exists() -> None:
    first, second = make_plan(FACTS, exists=nothing), make_plan(FACTS, exists=everything)

    assert first.plan_id == second.plan_id
    assert first.plan_id.startswith("adder-")
    assert first.targets == second.targets
    assert [step.key for step in first.steps] == [step.key for step in second.steps]
    assert Plan.model_validate_json(first.to_bytes()) == first


@pytest.mark.parametrize(
    "facts",
    [
        replace(FACTS, resolved=replace(FACTS.resolved, revision="r2")),
        replace(FACTS, resolved=replace(FACTS.resolved, fingerprint="0" * 64)),
        replace(FACTS, assets=None),
        replace(FACTS, spec=changed_spec("gates.accuracy.tasks.0.limit", 10)),
        replace(FACTS, spec=changed_spec("gates.accuracy.tasks.0.metric", "acc")),
        replace(FACTS, spec=changed_spec("gates.latency.levels.1.num_prompts", 41)),
        replace(FACTS, spec=changed_spec("gates.latency.levels.0.output_len", 33)),
        replace(FACTS, spec=changed_spec("gates.behaviour.waivers", waiver("skip"))),
        replace(FACTS, spec=changed_spec("served_model_name", "sums")),
        replace(FACTS, spec=changed_spec("model", "subtracter")),
        with_target(key_inputs={"lane": "cpu", "max_model_len": 512}),
        with_target(serving={"max_num_seqs": 1}),
        with_target(machine={"processor": "Another CPU"}),
        with_target(machine={"instance": "trn2.48xlarge", "neuron_driver": "2.31.7.0"}),
        replace(FACTS, spec=changed_spec("gates.latency.slo", {"ttft_ms": 100})),
        replace(FACTS, spec=changed_spec("gates.latency.search", {"level": "one"})),
        replace(FACTS, spec=changed_spec("gates.latency.levels.0.repeats", 3)),
    ],
)
def test_what_changes_figures_changes_both_ids(facts: Facts) -> None:
    plan_id, measurement = ids(facts)

    assert plan_id != ids(FACTS)[0]
    assert measurement != ids(FACTS)[1]


@pytest.mark.parametrize(
    "facts",
    [
        replace(FACTS, request=ReleaseRequest(model="adder", environments=("production",))),
        replace(FACTS, spec=changed_spec("gates.accuracy.tasks.0.min", 0.9)),
        replace(FACTS, spec=changed_spec("gates.accuracy.tasks.0.max_drop", None)),
        replace(
            FACTS, spec=changed_spec("gates.latency.levels.0.max_regression", {"ttft_p50_ms": 1})
        ),
        replace(
            FACTS, spec=changed_spec("gates.latency.levels.0.bounds", {"ttft_p50_ms": {"max": 5}})
        ),
        replace(FACTS, spec=changed_spec("gates.behaviour.waivers", waiver("warning"))),
        replace(FACTS, spec=changed_spec("rollout.bake_s", 99)),
        with_target(baselines={"production": "0123456789ab"}),
    ],
)  # fmt: skip
def test_what_changes_only_judgement_keeps_the_measurement(facts: Facts) -> None:
    plan_id, measurement = ids(facts)

    assert plan_id != ids(FACTS)[0]
    assert measurement == ids(FACTS)[1]


def test_warnings_are_kept_and_make_no_other_plan() -> None:
    plan = make_plan(with_target(warnings=("Know this.",)), exists=nothing)

    assert plan.targets[0].warnings == ("Know this.",)
    assert plan.plan_id == make_plan(FACTS, exists=nothing).plan_id


def test_steps_in_order_with_reasons() -> None:
    plan = make_plan(FACTS, exists=nothing, plan_id="some-plan")

    assert plan.plan_id == "some-plan"
    assert [(step.step, step.target) for step in plan.steps] == [
        ("download", ""),
        ("compile", "cpu"),
        ("measure", "cpu"),
        ("gate", "cpu"),
        ("gate", "cpu"),
        ("publish", "cpu"),
    ]
    assert [step.key for step in plan.steps] == [
        "checkpoints/adder/r1/manifest.json",
        f"bundles/{plan.targets[0].compile_key}/manifest.json",
        f"measurements/{plan.targets[0].measurement_id}.json",
        "verdicts/some-plan/cpu/accuracy.json",
        "verdicts/some-plan/cpu/latency.json",
        "releases/adder",
    ]
    lines = [str(line) for line in explain(plan)]
    assert lines[0] == ("download: will run. Revision r1 is not in the store yet: 2 files, 1.1 MB.")
    assert lines[3].startswith("accuracy gate cpu: will run. Each plan gets its own verdict;")
    assert all(": will run. " in line for line in lines)


class TestTasksOfAnImage:
    """The harness's own tasks, where the plan cannot ask what will measure."""

    OWN = replace(
        FACTS,
        spec=changed_spec("gates.accuracy.tasks", [{"name": "gsm8k_cot", "min": 0.5}]),
        asks_image=True,
    )

    def test_the_image_is_asked_before_a_device_is_taken(self) -> None:
        plan = make_plan(self.OWN, exists=nothing)
        step = plan.steps[1]
        assert (step.step, step.target, step.exists) == ("tasks", "cpu", False)
        assert step.key == f"samples/{plan.targets[0].measurement_id}/tasks.json"
        assert "asked about gsm8k_cot before a device" in step.reason
        assert plan.steps[2].step == "compile"

    def test_an_answer_is_kept(self) -> None:
        plan = make_plan(self.OWN, exists=lambda key: key.endswith("tasks.json"))
        assert plan.steps[1].exists
        assert "was asked about gsm8k_cot" in plan.steps[1].reason

    @pytest.mark.parametrize(
        ("facts", "exists"),
        [
            (replace(OWN, asks_image=False), nothing),
            (replace(OWN, spec=SPEC), nothing),
            (OWN, lambda key: key.startswith("measurements/")),
        ],
        ids=["the plan asked", "task files only", "measured already"],
    )
    def test_nobody_is_asked_for_nothing(self, facts: Facts, exists: Callable[[str], bool]) -> None:
        assert "tasks" not in {step.step for step in make_plan(facts, exists=exists).steps}


def test_code_that_the_spec_allows_is_shown() -> None:
    facts = replace(FACTS, resolved=replace(FACTS.resolved, allowed=("modeling_x.py", "a.bin")))
    for exists in (nothing, everything):
        line = str(explain(make_plan(facts, exists=exists))[0])
        assert (
            "Code or pickles that the spec allows are among its files: modeling_x.py, a.bin" in line
        )
    assert "allows" not in str(explain(make_plan(FACTS, exists=nothing))[0])


def test_what_exists_need_not_run() -> None:
    facts = replace(FACTS, checkpoint_digest="c" * 64)

    plan = make_plan(facts, exists=everything)

    release = plan.steps[-1].key.removeprefix("releases/adder/").removesuffix(".json")
    assert all(step.exists for step in plan.steps)
    assert all(": exists already. " in str(line) for line in explain(plan))
    assert release in plan.steps[-1].reason
    new = make_plan(facts, exists=nothing).steps[-1]
    assert (new.key, new.exists) == (plan.steps[-1].key, False)
    assert new.reason == f"Release {release} is new."


@given(st.dictionaries(st.sampled_from(["cpu", "vllm", "torch"]), st.text(max_size=5)))
def test_the_compile_key_covers_all_key_inputs(inputs: dict[str, str]) -> None:
    plan = make_plan(with_target(key_inputs=inputs), exists=nothing)
    other = make_plan(with_target(key_inputs={**inputs, "one": "more"}), exists=nothing)

    assert plan.targets[0].compile_key != other.targets[0].compile_key
    assert plan.targets[0].key_inputs == inputs
    assert plan.target("cpu") == plan.targets[0]


def broken_lane(target: Target) -> list[str]:
    return [f"max_num_seqs {target.max_num_seqs} is too many. Give 1."]


def no_rules(_target: Target) -> list[str]:
    return []


def test_chosen_targets_have_the_overrides() -> None:
    request = ReleaseRequest(model="adder", targets=("cpu",), overrides={"max_num_seqs": 1})

    (target,) = choose_targets(request, SPEC, lane_rules=no_rules)

    assert target == TARGET.model_copy(update={"max_num_seqs": 1})
    assert choose_targets(ReleaseRequest(model="adder"), SPEC, lane_rules=no_rules) == SPEC.targets


def test_everything_wrong_with_a_request_is_said_at_once() -> None:
    request = ReleaseRequest(
        model="adder", targets=("cpu", "cpu", "gpu"), overrides={"max_model_len": 32}
    )

    with pytest.raises(BadInput) as caught:
        choose_targets(request, SPEC, lane_rules=broken_lane)

    text = str(caught.value)
    assert "5 reasons" in text
    for words in (
        "no target 'gpu'",
        "cpu is named twice",
        "max_num_seqs 16 is too many",
        "Level one: input_len 16 + output_len 32 is 48, more than max_model_len 32",
        "Level busy:",
    ):
        assert words in text


def test_overrides_that_do_not_fit_are_refused() -> None:
    request = ReleaseRequest(model="adder", overrides={"max_seqs": 1})

    with pytest.raises(BadInput, match="max_seqs: a target has no such setting"):
        choose_targets(request, SPEC, lane_rules=no_rules)


ENVIRONMENTS = Environments.model_validate(
    {
        "schema": "trainyard/v1",
        "environments": {
            "staging": {"target": "cpu"},
            "production": {"target": "cpu", "requires": ["staging"]},
            "devices": {"target": "neuron"},
            "careful": {"target": "cpu", "capacity": "single", "devices": 1},
            "calm": {"target": "cpu", "capacity": "single", "devices": 1, "allow_downtime": True},
        },
    }
)


@pytest.mark.parametrize(
    ("wanted", "been", "words"),
    [
        ((), False, []),
        (("staging",), False, []),
        (("staging", "production"), False, []),
        (("production",), True, []),
        (("production",), False, ["requires staging, where the release has not been"]),
        (("production", "staging"), False, ["requires staging"]),
        (("prod",), True, ["no environment 'prod'. Did you mean production?"]),
        (("staging", "staging"), True, ["named twice"]),
        (("devices",), True, ["serves target 'neuron', and the release has cpu"]),
        (("careful",), True, ["does not allow downtime"]),
        (("calm",), True, []),
        (("careful", "prod"), True, ["downtime", "'prod'"]),
    ],
)
def test_destinations(wanted: tuple[str, ...], been: bool, words: list[str]) -> None:
    request = ReleaseRequest(model="adder", environments=wanted)

    problems = destination_problems(
        request, SPEC, ENVIRONMENTS, [TARGET], promoted=lambda _name: been
    )

    assert len(problems) == len(words)
    for word in words:
        assert any(word in problem for problem in problems)


@pytest.mark.parametrize(
    ("capacity", "replicas", "room"),
    [("surge", 1, True), ("surge", 2, False), ("replace", 1, True), ("replace", 2, False)],
)
def test_a_rollout_needs_room(capacity: str, replicas: int, room: bool) -> None:
    data = SPEC.model_dump(mode="json", by_alias=True)
    data["rollout"] |= {"capacity": capacity, "replicas": replicas}
    request = ReleaseRequest(model="adder", environments=("staging",))

    problems = destination_problems(
        request, ModelSpec.model_validate(data), ENVIRONMENTS, [TARGET], promoted=lambda _: True
    )

    assert (problems == []) is room
    assert all("has room for 2" in problem for problem in problems)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"max_position_embeddings": 256, "num_attention_heads": 4}, {}, []),
        ({"max_position_embeddings": 128}, {}, ["more than the model's 128 positions"]),
        ({"max_position_embeddings": 128, "rope_scaling": {"factor": 4.0}}, {}, []),
        ({"max_position_embeddings": 128, "rope_parameters": {"rope_theta": 1e4}}, {}, ["128"]),
        ({"text_config": {"max_position_embeddings": 128}}, {}, ["128 positions"]),
        ({"num_attention_heads": 4}, {"tensor_parallel_size": 8}, ["does not divide"]),
        ({"num_attention_heads": 4}, {"tensor_parallel_size": 2}, []),
        ({}, {"max_model_len": 100_000}, []),
    ],
)
def test_the_model_must_allow_the_settings(
    config: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    problems = list(architecture_problems([TARGET.model_copy(update=changes)], config))

    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem


def test_refuse_names_one_or_all() -> None:
    refuse("The request", [])
    with pytest.raises(BadInput) as one:
        refuse("The request", ["One thing."])
    with pytest.raises(BadInput) as two:
        refuse("The request", ["One.", "Two."])

    assert str(one.value) == "The request cannot be planned: One thing."
    assert str(two.value) == "The request cannot be planned for 2 reasons:\n  One.\n  Two."
