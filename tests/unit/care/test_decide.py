"""Decisions about what is kept: nothing that can be reached goes, whatever lies in a store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from trainyard.care.decide import ORDER, Decision, Policy, decide, deletion_order
from trainyard.care.facts import ChannelFacts, Facts, NamingFacts, TrackFacts
from trainyard.store.objects import group
from trainyard.store.protocol import Entry

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
DAY = 86400.0
POLICY = Policy(
    grace_s=DAY,
    keep_releases_s=10 * DAY,
    keep_plans_s=5 * DAY,
    keep_rollouts_s=20 * DAY,
    keep_previous=1,
)

NUMBERS = range(4)
RELEASES = [f"releases/adder/adder-00000000000{n}.json" for n in NUMBERS]
PLANS = [f"plans/p{n}.json" for n in NUMBERS]
NAMED = [
    *(f"checkpoints/adder/v{n}" for n in NUMBERS),
    *(f"bundles/b{n}" for n in NUMBERS),
    *(f"measurements/m{n}.json" for n in NUMBERS),
    *(f"evals/e{n}" for n in NUMBERS),
    *(f"verdicts/p{n}" for n in NUMBERS),
]
OTHERS = [
    *(f"status/p{n}" for n in NUMBERS),
    *(f"rollouts/adder/staging/{n}" for n in NUMBERS),
    *(f"locks/l{n}.json" for n in NUMBERS),
    "channels/adder/staging.json",
    "archive/channels/x",
    "toolchains/0a1b.json",
    "refreshes/adder.json",
    "attestations/adder/adder-000000000000",
    "strange/key",
]
ALL = [*RELEASES, *PLANS, *NAMED, *OTHERS]
FOLDERS = {"checkpoints", "bundles", "evals", "verdicts", "status", "rollouts", "attestations"}

ages = st.sampled_from([0.0, 0.5, 3.0, 7.0, 15.0, 50.0])


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """A listing: of every object none, some, or all parts, each of its own age."""
    found = []
    for prefix in draw(st.lists(st.sampled_from(ALL), unique=True, max_size=len(ALL))):
        names = [prefix]
        if prefix.split("/")[0] in FOLDERS:
            parts = draw(st.lists(st.sampled_from(["a", "manifest.json"]), min_size=1, unique=True))
            names = [f"{prefix}/{part}" for part in parts]
        for name in names:
            age = draw(st.one_of(st.none(), ages))
            modified_at = None if age is None else NOW - timedelta(days=age)
            found.append(Entry(name, 1, modified_at=modified_at))
    return found


@st.composite
def stores(draw: st.DrawFn) -> Facts:
    objects = group(draw(entries()))
    tracks = st.builds(
        TrackFacts,
        release=st.sampled_from(RELEASES),
        role=st.just("stable"),
        rank=st.integers(0, 3),
        warm_until=st.sampled_from([None, NOW - timedelta(days=1), NOW + timedelta(days=1)]),
    )
    channel = ChannelFacts("channels/adder/staging.json", tuple(draw(st.lists(tracks, max_size=3))))

    def namings(keys: list[str], named: list[str]) -> tuple[NamingFacts, ...]:
        return tuple(
            NamingFacts(key, frozenset(draw(st.sets(st.sampled_from(named), max_size=5))))
            for key in keys
            if key in objects
        )

    return Facts(
        objects=objects,
        channels=(channel,) if draw(st.booleans()) else (),
        releases=namings(RELEASES, [*NAMED, *PLANS]),
        plans=namings(PLANS, [*NAMED, *RELEASES]),
        held={draw(st.sampled_from(ALL)): "a step"} if draw(st.booleans()) else {},
        evidence=frozenset(draw(st.sets(st.sampled_from(OTHERS[4:8]), max_size=2))),
    )


def doomed(decisions: tuple[Decision, ...]) -> set[str]:
    return {each.object.prefix for each in decisions if not each.keep}


@given(stores())
def test_nothing_that_can_be_reached_goes(facts: Facts) -> None:
    gone = doomed(decide(facts, NOW, POLICY))

    for channel in facts.channels:
        for track in channel.tracks:
            if track.rank <= 1 or (track.warm_until and track.warm_until > NOW):
                assert track.release not in gone
    for release in facts.releases:
        if release.key not in gone:
            assert not release.names & gone
    for plan in facts.plans:
        stored = facts.objects[plan.key]
        if stored.modified_at is None or NOW - stored.modified_at < timedelta(days=5):
            assert not ({plan.key} | plan.names) & gone
    assert not facts.held.keys() & gone
    assert not facts.evidence & gone


@given(stores())
def test_nothing_young_unknown_or_kept_for_audits_goes(facts: Facts) -> None:
    for prefix in doomed(decide(facts, NOW, POLICY)):
        stored = facts.objects[prefix]
        assert stored.kind in ORDER
        for entry in stored.entries:
            assert entry.modified_at is not None
            assert NOW - entry.modified_at >= timedelta(seconds=POLICY.least_age_s(stored.kind))


@given(stores())
def test_every_object_gets_one_decision_with_a_reason(facts: Facts) -> None:
    decisions = decide(facts, NOW, POLICY)

    assert [each.object.prefix for each in decisions] == sorted(facts.objects)
    assert all(each.reason.endswith(".") for each in decisions)


@given(stores(), st.randoms())
def test_the_order_in_which_facts_were_read_does_not_matter(facts: Facts, random: object) -> None:
    def shuffled(values: tuple[NamingFacts, ...]) -> tuple[NamingFacts, ...]:
        mixed = list(values)
        random.shuffle(mixed)  # type: ignore[attr-defined]
        return tuple(mixed)

    mixed = replace(facts, releases=shuffled(facts.releases), plans=shuffled(facts.plans))

    assert doomed(decide(mixed, NOW, POLICY)) == doomed(decide(facts, NOW, POLICY))


@given(stores(), st.sampled_from(RELEASES), st.sampled_from(ALL), st.sets(st.sampled_from(NAMED)))
def test_one_who_needs_more_never_costs_anybody_anything(
    facts: Facts, release: str, held: str, names: set[str]
) -> None:
    track = TrackFacts(release, "stable")
    more = replace(
        facts,
        channels=(*facts.channels, ChannelFacts("channels/adder/moon.json", (track,))),
        plans=(*facts.plans, NamingFacts("plans/p0.json", frozenset(names))),
        held={**facts.held, held: "a step"},
    )

    assert doomed(decide(more, NOW, POLICY)) <= doomed(decide(facts, NOW, POLICY))


@given(stores(), st.integers(0, 100))
def test_what_goes_today_goes_tomorrow(facts: Facts, days: int) -> None:
    later = NOW + timedelta(days=days)

    assert doomed(decide(facts, NOW, POLICY)) <= doomed(decide(facts, later, POLICY))


@given(stores())
def test_releases_go_first(facts: Facts) -> None:
    order = [each.kind for each in deletion_order(decide(facts, NOW, POLICY))]

    assert order == sorted(order, key=ORDER.index)


@given(stores())
def test_deleting_what_is_doomed_dooms_nothing_that_was_named(facts: Facts) -> None:
    """A second run, after the first, frees no more of what releases and channels need."""
    gone = doomed(decide(facts, NOW, POLICY))
    after = replace(
        facts,
        objects={prefix: each for prefix, each in facts.objects.items() if prefix not in gone},
        releases=tuple(each for each in facts.releases if each.key not in gone),
        plans=tuple(each for each in facts.plans if each.key not in gone),
    )

    assert doomed(decide(after, NOW, POLICY)) == set()


def test_the_last_rollout_of_a_channel_stays_so_that_numbers_only_grow() -> None:
    old = NOW - timedelta(days=500)
    facts = Facts(
        group(
            Entry(f"rollouts/adder/staging/{n}/looks/1.json", 1, modified_at=old) for n in (9, 10)
        )
    )

    assert doomed(decide(facts, NOW, POLICY)) == {"rollouts/adder/staging/9"}
