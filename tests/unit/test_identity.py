"""The table of what changes which identity is complete, true, and in the documentation."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.lanes.neuron_targets import BASES, TOOLCHAINS, changed

from trainyard.canonical import digest
from trainyard.identity import LANES, OTHERS, TARGET, TOOLCHAIN, Effect, Row, markdown
from trainyard.lanes.registry import get_lane
from trainyard.releases import release_id_of
from trainyard.spec.model import ModelSpec, Target
from trainyard.spec.part import SpecPart
from trainyard.spec.rules import target_findings

DOCS = Path(__file__).parents[2] / "docs" / "identity.md"
ROWS = {row.path: row for row in TARGET}

SPECIAL: dict[str, Any] = {
    "name": "another",
    "neuron.sdk": "2.33.0",
    "neuron.image": "registry.example/vllm:1",
    "neuron.compiler_flags": ["--auto-cast=none"],
    "neuron.speculation.num_speculative_tokens": 7,
    "nxdi.override_neuron_config.modules_to_not_convert": ["lm_head"],
    # What is empty stands for these two being true.
    "nxdi.override_neuron_config.is_prefix_caching": False,
    "nxdi.override_neuron_config.is_block_kv_layout": False,
}
"""Other values where the type alone does not tell one."""

OTHER_LNC = {"cpu": 2, "neuron-native": 1, "neuron-nxdi": 2}
"""Not the default of the lane's instance."""

INSTANCES = {"cpu": "trn2.48xlarge", "neuron-native": "trn2.3xlarge", "neuron-nxdi": "inf2.xlarge"}
"""Another instance; with the same kind of chip on the Neuron lanes."""


def leaves(part: type[SpecPart], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the type of every value below `part`."""
    for name, field in part.model_fields.items():
        inner = part_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field.annotation
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def part_of(annotation: Any) -> type[SpecPart] | None:
    if isinstance(annotation, type) and issubclass(annotation, SpecPart):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, map(part_of, get_args(annotation))), None)
    return None


def without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(each for each in get_args(annotation) if each is not type(None))
    return annotation


def another(path: str, annotation: Any, current: Any, lane: str) -> Any:
    """Return a possible value that is not the current one."""
    by_lane = {"instance": INSTANCES, "neuron.lnc": OTHER_LNC}
    if path in by_lane:
        return by_lane[path][lane]
    if path in SPECIAL:
        return SPECIAL[path]
    kind = without_none(annotation)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != current)
    if get_origin(kind) is tuple:
        return [64, 4096]
    if get_origin(kind) is dict:
        return {"made_up": 1}
    if kind is bool:
        return not current
    number = {int: (current or 1) + 1, float: (current or 1) / 2}
    if kind in number:
        return number[kind]
    return number[get_args(kind)[0]]


def value_at(target: Target, path: str) -> Any:
    value: Any = target
    for step in path.split("."):
        value = getattr(value, step) if value is not None else None
    return value


FIELDS = dict(leaves(Target))


def change(lane: str, path: str) -> dict[str, Any]:
    """Return another value for one field of the lane's target, by its path."""
    current = value_at(Target.model_validate(BASES[lane]), path)
    return {path: another(path, FIELDS[path], current, lane)}


def identities(
    target: Target,
    *,
    toolchain: Mapping[str, str] | None = None,
    architecture: str = "architecture",
    draft: str = "draft",
    weights: str = "weights",
    served_model_name: str = "adder",
) -> tuple[str, str]:
    """Return compile key and release id, as a plan makes them."""
    lane = get_lane(target.lane)
    compile_key = digest(
        lane.key_inputs(
            target,
            architecture_digest=architecture,
            draft_architecture_digest=draft,
            toolchain=toolchain or TOOLCHAINS[target.lane],
        )
    )
    serving = lane.serving_settings(target, served_model_name=served_model_name)
    return compile_key, release_id_of(
        "adder",
        checkpoint_digest=weights,
        compile_key=compile_key,
        serving_digest=digest(serving),
    )


def effect(before: tuple[str, str], after: tuple[str, str]) -> Effect:
    if before[0] != after[0]:
        assert before[1] != after[1], "other code and the same release"
        return "compile key"
    return "neither" if before[1] == after[1] else "release id"


def base(lane: str) -> Target:
    return Target.model_validate(BASES[lane])


def refusals(target: Target) -> list[str]:
    findings = [finding.message for finding in target_findings(target)]
    return [*findings, *get_lane(target.lane).problems(target)]


def test_every_key_of_a_target_has_its_row() -> None:
    """A new key needs a row: decide what it changes, say why, and test it by that."""
    assert [row.path for row in TARGET] == list(FIELDS)


@pytest.mark.parametrize("lane", LANES)
def test_the_targets_that_are_walked_break_no_rule(lane: str) -> None:
    assert refusals(base(lane)) == []


WALK = [(lane, path) for lane in LANES for path in FIELDS if path != "lane"]


@pytest.mark.parametrize(("lane", "path"), WALK, ids=[f"{lane} {path}" for lane, path in WALK])
def test_every_key_changes_what_the_table_says(lane: str, path: str) -> None:
    expected = ROWS[path].effect(lane)
    target = changed(BASES[lane], change(lane, path))
    assert target != base(lane)

    if expected == "refused":
        assert refusals(target), f"{path} is neither refused nor in the table"
    else:
        assert effect(identities(base(lane)), identities(target)) == expected


def test_another_lane_is_another_key() -> None:
    keys = {identities(base(lane))[0] for lane in LANES}
    assert len(keys) == len(LANES)
    assert set(ROWS["lane"].effects) == {"compile key"}


@pytest.mark.parametrize("lane", LANES)
def test_every_package_of_the_toolchain_changes_what_the_table_says(lane: str) -> None:
    toolchain = TOOLCHAINS[lane]
    rows = {row.path.removeprefix("toolchain."): row.effect(lane) for row in TOOLCHAIN}
    assert {name for name, each in rows.items() if each != "refused"} == set(toolchain)
    before = identities(base(lane))
    for name in toolchain:
        for other in ({**toolchain, name: "99"}, {k: v for k, v in toolchain.items() if k != name}):
            assert effect(before, identities(base(lane), toolchain=other)) == rows[name], name


@pytest.mark.parametrize("lane", LANES)
def test_the_model_itself_changes_what_the_table_says(lane: str) -> None:
    others = {row.path: row.effect(lane) for row in OTHERS}
    before = identities(base(lane))
    found = {
        "architecture": effect(before, identities(base(lane), architecture="other")),
        "weights": effect(before, identities(base(lane), weights="other")),
        "served_model_name": effect(before, identities(base(lane), served_model_name="other")),
    }
    if lane != "cpu":
        found["architecture of the draft"] = effect(before, identities(base(lane), draft="other"))
        chip = changed(BASES[lane], {"instance": "trn3.48xlarge"})
        found["kind of chip"] = effect(before, identities(chip))
    assert found == {name: others[name] for name in found}


def test_every_key_of_a_spec_has_a_row() -> None:
    """`targets` has the rows of its keys, `schema` never changes."""
    keys = {field.alias or name for name, field in ModelSpec.model_fields.items()}
    assert keys - {"schema", "targets"} <= {row.path for row in OTHERS}


def movable(lane: str) -> list[Row]:
    return [row for row in TARGET if row.effect(lane) != "refused" and row.path != "lane"]


@given(st.sampled_from(LANES), st.data())
def test_changes_together_do_what_the_strongest_of_them_does(
    lane: str, choices: st.DataObject
) -> None:
    rows = choices.draw(st.lists(st.sampled_from(movable(lane)), unique=True, max_size=6))
    changes: dict[str, Any] = {}
    for row in rows:
        changes |= change(lane, row.path)
    effects = {row.effect(lane) for row in rows}
    strongest: Effect = "neither"
    for each in ("release id", "compile key"):
        strongest = each if each in effects else strongest  # type: ignore[assignment]

    assert effect(identities(base(lane)), identities(changed(BASES[lane], changes))) == strongest


def test_every_row_says_why() -> None:
    rows = (*TARGET, *TOOLCHAIN, *OTHERS)
    assert len({row.path for row in rows}) == len(rows)
    assert all(row.why and not row.why.endswith(".") for row in rows)


def test_the_documentation_has_the_table() -> None:
    page = DOCS.read_text(encoding="utf-8")
    start, end = "<!-- table: python -m trainyard.identity -->\n", "<!-- end of the table -->"
    assert page.count(start) == page.count(end) == 1

    shown = page.split(start)[1].split(end)[0]

    assert shown.strip() == markdown().strip(), (
        "put the output of `python -m trainyard.identity` between the two marks"
    )
