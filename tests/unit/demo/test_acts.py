"""The four releases of the demonstration fit the model, its spec and the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from trainyard.demo.acts import ACTS, ENVIRONMENT, MODEL, PROMOTE_DAG, RELEASE_DAG, Ending
from trainyard.demo.training import RECIPES, answer, held_out
from trainyard.documents.plan import ReleaseRequest
from trainyard.spec.loader import Catalogue, load_environments
from trainyard.spec.model import Gates
from trainyard.steps.plan import lane_rules
from trainyard.steps.planning import choose_targets

DAGS = Path(__file__).parents[3] / "dags"


def test_every_ending_is_shown_once() -> None:
    assert sorted(act.ending for act in ACTS) == sorted(get_args(Ending))


def test_the_first_one_has_nothing_to_be_compared_with() -> None:
    assert ACTS[0].ending == "first stable release"


def test_every_act_asks_for_what_exists_and_is_allowed() -> None:
    spec = Catalogue(DAGS / "models").load(MODEL)
    environments = load_environments(DAGS / "environments.yaml").environments
    assert ENVIRONMENT in environments
    for act in ACTS:
        assert act.revision in RECIPES
        request = ReleaseRequest(
            model=MODEL,
            revision=act.revision,
            environments=(ENVIRONMENT,),
            overrides=dict(act.overrides),
        )
        targets = choose_targets(request, spec, lane_rules=lane_rules)
        assert [t.name for t in targets] == [environments[ENVIRONMENT].target]
        for name, value in act.overrides.items():
            assert getattr(targets[0], name) == value


def test_the_gate_lies_between_the_good_and_the_bad_revision() -> None:
    gates: Gates = Catalogue(DAGS / "models").load(MODEL).gates
    bound = gates.accuracy.tasks[0]
    bad, good, better = RECIPES["r3"], RECIPES["r1"], RECIPES["r2"]
    assert bound.min is not None
    # The sample of 200 sums differs from all held-out sums by some 0.03 once in twenty.
    assert bad.highest + 0.1 < bound.min < good.lowest - 0.05
    # A second run starts with a worse release than the one that was stable before.
    assert better.lowest > good.highest


def test_the_task_asks_for_sums_that_were_never_trained() -> None:
    lines = (DAGS / "models" / "adder" / "addition.jsonl").read_text().splitlines()
    sums = [json.loads(line) for line in lines]
    assert len(sums) == 200
    for each in sums:
        left, right = each["prompt"].removesuffix("=").split("+")
        assert held_out(int(left), int(right))
        assert each["answer"] == answer(int(left), int(right)).removesuffix(".")


def test_the_dags_are_those_of_the_environment() -> None:
    assert RELEASE_DAG == "neuron_release"
    assert f"neuron_promote__{ENVIRONMENT}" == PROMOTE_DAG
