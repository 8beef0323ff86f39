"""What differs between two keys, releases or plans, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import yard
from tests.unit.lanes.neuron_targets import TOOLCHAINS, native

from trainyard.canonical import digest
from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.plan import Plan
from trainyard.documents.release import Release
from trainyard.errors import BadInput, NotFound
from trainyard.explain import ABSENT, FieldDifference, difference, explain, find_identity
from trainyard.lanes.registry import get_lane
from trainyard.releases import release_id_of, store_release
from trainyard.signing.keys import signing_key
from trainyard.store.documents import create_document
from trainyard.store.layout import bundle_manifest_key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats(0, 3) | st.sampled_from(["", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner)
    ),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(st.sampled_from(["a", "b", "a.b"]), JSON)


@given(MAPPINGS, MAPPINGS)
def test_something_differs_exactly_if_the_digests_do(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    assert bool(difference(left, right)) == (digest(left) != digest(right))
    mirrored = tuple(
        FieldDifference(each.path, each.right, each.left, each.why)
        for each in difference(left, right)
    )
    assert difference(right, left) == mirrored


def test_fields_are_named_by_their_path() -> None:
    left = {"lnc": 2, "neuron_config": {"num_seqs_buckets": [1, 8], "ep_degree": 2}, "same": 1}
    right = {"lnc": 1, "neuron_config": {"num_seqs_buckets": [8]}, "same": 1}
    assert difference(left, right) == (
        FieldDifference("lnc", 2, 1, "physical cores of one logical core"),
        FieldDifference(
            "neuron_config.ep_degree", 2, ABSENT, "how the graph is cut over the cores"
        ),
        FieldDifference(
            "neuron_config.num_seqs_buckets", [1, 8], [8], "each bucket is a graph of its own"
        ),
    )


@pytest.mark.parametrize("lane", ["neuron-native", "neuron-nxdi", "cpu"])
def test_every_input_of_a_key_says_what_it_is(lane: str) -> None:
    from tests.unit.lanes.neuron_targets import BASES

    from trainyard.spec.model import Target

    inputs = get_lane(lane).key_inputs(
        Target.model_validate(BASES[lane]),
        architecture_digest="a",
        draft_architecture_digest="d",
        toolchain=TOOLCHAINS[lane],
    )
    fields = [each for each in difference(inputs, {}) if not isinstance(each.left, dict)]
    nested = [
        each
        for name, value in inputs.items()
        if isinstance(value, dict)
        for each in difference(value, {}, below=f"{name}.")
    ]
    assert [each.path for each in (*fields, *nested) if not each.why] == []


def bundle(home: yard.Yard, **changes: Any) -> str:
    """Store a bundle of a native target and return its compile key."""
    inputs = get_lane("neuron-native").key_inputs(
        native(**changes), architecture_digest="a", toolchain=TOOLCHAINS["neuron-native"]
    )
    key = digest(inputs)
    create_document(
        home.store,
        bundle_manifest_key(key),
        BundleManifest(
            compile_key=key,
            lane="neuron-native",
            key_inputs=inputs,
            files=(),
            digest="d",
            toolchain={},
            compile_s=1.0,
        ),
    )
    return key


def release(home: yard.Yard, compile_key: str, *, weights: str, served: str = "adder") -> str:
    """Store a release of a bundle and return its id."""
    serving = {"served_model_name": served}
    release_id = release_id_of(
        "adder", checkpoint_digest=weights, compile_key=compile_key, serving_digest=digest(serving)
    )
    document = Release(
        release_id=release_id,
        model="adder",
        target=native(),
        lane="neuron-native",
        checkpoint_key="c",
        checkpoint_digest=weights,
        revision="r1",
        compile_key=compile_key,
        bundle_digest="d",
        serving=serving,
        serving_digest=digest(serving),
        served_model_name=served,
        toolchain={},
        measurement_id="m",
        spec=yard.spec(),
    )
    store_release(home.store, document, signing_key(home.settings))
    return release_id


@pytest.fixture
def home(tmp_path: Path) -> yard.Yard:
    return yard.Yard(tmp_path)


def paths(home: yard.Yard, left: str, right: str) -> tuple[list[str], str]:
    found = explain(find_identity(home.store, left), find_identity(home.store, right))
    return [
        each.path for each in (*found.code, *found.serving, *found.checkpoint)
    ], found.consequence


def test_two_compile_keys(home: yard.Yard) -> None:
    one, other = bundle(home), bundle(home, neuron__num_gpu_blocks=512)
    expected = (["num_gpu_blocks"], "The compile keys differ in 1 field: the code is compiled "
                "anew for each.")  # fmt: skip
    assert paths(home, one, other) == expected
    assert paths(home, one[:8], other[:8]) == expected
    assert paths(home, one, one) == ([], "Nothing differs.")


def test_two_releases(home: yard.Yard) -> None:
    key = bundle(home)
    first = release(home, key, weights="w1")
    fields, words = paths(home, first, release(home, key, weights="w2"))
    assert fields == ["checkpoint_digest"]
    assert words == "The same compiled code serves both; other weights are another release."
    fields, words = paths(home, first, release(home, key, weights="w1", served="sums"))
    assert fields == ["served_model_name"]
    assert words == "The same compiled code serves both; another serving is another release."
    fields, words = paths(home, first, release(home, key, weights="w2", served="sums"))
    assert fields == ["served_model_name", "checkpoint_digest"]
    assert "other weights and other serving settings" in words


def test_a_key_beside_a_release_knows_no_weights(home: yard.Yard) -> None:
    key = bundle(home)
    assert paths(home, key, release(home, key, weights="w1")) == ([], "Nothing differs.")


def several(home: yard.Yard) -> Plan:
    """Store a plan of two targets that were never compiled."""
    planned = yard.plan("adder-two").targets[0]
    inputs = {"lane": "cpu", "dtype": "float32"}
    other = planned.model_copy(
        update={
            "target": planned.target.model_copy(update={"name": "second"}),
            "key_inputs": inputs,
            "compile_key": digest(inputs),
        }
    )
    return home.keep_plan(yard.plan("adder-two").model_copy(update={"targets": (planned, other)}))


def test_plans_and_keys_that_were_only_planned(home: yard.Yard) -> None:
    plan = several(home)
    fields, _ = paths(home, "adder-two/cpu", "adder-two/second")
    assert fields == ["dtype"]
    found = find_identity(home.store, plan.targets[1].compile_key[:10])
    assert found.key_inputs == {"lane": "cpu", "dtype": "float32"}
    assert found.name.startswith("planned key ")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("adder-two", BadInput, "several targets"),
        ("adder-two/third", NotFound, "no target 'third'"),
        ("adder-0123456789ab", NotFound, "no compile key, release or plan"),
        ("../adder", BadInput, "not valid"),
        ("abcdef", NotFound, "begins with 'abcdef'"),
        ("abc", NotFound, "no compile key, release or plan 'abc'"),
        ("", BadInput, "not valid"),
    ],
)  # fmt: skip
def test_what_means_nothing_or_too_much_is_said(
    home: yard.Yard, text: str, kind: type[Exception], words: str
) -> None:
    several(home)
    with pytest.raises(kind, match=words):
        find_identity(home.store, text)


def test_digits_that_mean_several_keys_are_not_enough(
    home: yard.Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        create_document(
            home.store,
            bundle_manifest_key(f"abcdef{number}"),
            BundleManifest(
                compile_key=f"abcdef{number}", lane="cpu", key_inputs={}, files=(), digest="d",
                toolchain={}, compile_s=1.0,
            ),
        )  # fmt: skip
    with pytest.raises(BadInput, match="abcdef0, abcdef1"):
        find_identity(home.store, "abcdef")
