from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trainyard.node_cache.policy import Eviction, Held, choose_evictions

LIMIT = 100


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    held = [Held("old", 30, 1.0), Held("older", 30, 0.5), Held("new", 30, 2.0)]
    eviction = choose_evictions(held, keep=(), incoming_bytes=20, limit_bytes=LIMIT)
    assert eviction == Eviction(("older",), 80, 0)


def test_what_must_stay_stays_and_the_excess_is_told() -> None:
    held = [Held("pinned", 90, 0.0), Held("free", 5, 1.0)]
    eviction = choose_evictions(held, keep={"pinned"}, incoming_bytes=30, limit_bytes=LIMIT)
    assert eviction == Eviction(("free",), 120, 20)


def test_without_a_limit_nothing_goes() -> None:
    eviction = choose_evictions([Held("a", 90, 0.0)], keep=(), incoming_bytes=30, limit_bytes=None)
    assert eviction == Eviction((), 120, 0)


class CacheMachine(RuleBasedStateMachine):
    """Releases of several files come, are pinned, served, forgotten; room is made before each."""

    releases = Bundle("releases")
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sizes: dict[str, int] = {}
        self.used: dict[str, float] = {}
        self.pinned: set[frozenset[str]] = set()
        self.live: list[frozenset[str]] = []
        self.told_over = 0

    @rule(
        target=releases,
        files=st.dictionaries(st.sampled_from("abcdefghijkl"), st.just(0), min_size=1, max_size=5),
    )
    def known_release(self, files: dict[str, int]) -> frozenset[str]:
        return frozenset(files)

    @rule(target=sessions, release=releases, size=st.integers(0, 60))
    def restore(self, release: frozenset[str], size: int) -> frozenset[str]:
        """Make room, then bring what is missing; from now on it is in use."""
        self.now += 1
        self.live.append(release)
        missing = sorted(release - self.sizes.keys())
        incoming = dict.fromkeys(missing, size)
        self.make_room(incoming_bytes=sum(incoming.values()))
        self.sizes |= incoming
        self.used |= dict.fromkeys(release, self.now)
        assert release <= self.sizes.keys()
        return release

    @rule(session=consumes(sessions))
    def stop(self, session: frozenset[str]) -> None:
        self.live.remove(session)

    @rule(release=releases)
    def pin(self, release: frozenset[str]) -> None:
        self.pinned.add(release)

    @rule(release=releases)
    def unpin(self, release: frozenset[str]) -> None:
        self.pinned.discard(release)

    @rule()
    def evict(self) -> None:
        self.make_room(incoming_bytes=0)

    def kept(self) -> frozenset[str]:
        return frozenset().union(*self.pinned, *self.live)

    def make_room(self, incoming_bytes: int) -> None:
        held = [Held(name, size, self.used[name]) for name, size in self.sizes.items()]
        kept = self.kept()
        eviction = choose_evictions(
            held, keep=kept, incoming_bytes=incoming_bytes, limit_bytes=LIMIT
        )
        removed = [each for each in held if each.name in eviction.remove]
        left = [each for each in held if each.name not in eviction.remove]
        assert not kept & set(eviction.remove)
        assert eviction.bytes_after == sum(each.size for each in left) + incoming_bytes
        assert eviction.over_bytes == max(0, eviction.bytes_after - LIMIT)
        free = [each for each in left if each.name not in kept and each.size]
        if eviction.over_bytes:
            assert not free, "it grew over its limit although something could go"
        if removed and free:
            assert max(each.used_at for each in removed) <= min(each.used_at for each in free)
        if removed:
            last = next(each for each in held if each.name == eviction.remove[-1])
            assert eviction.bytes_after + last.size > LIMIT, "more went than had to"
        for name in eviction.remove:
            del self.sizes[name]
        self.told_over = eviction.over_bytes

    @invariant()
    def what_is_served_is_here(self) -> None:
        for release in self.live:
            assert release <= self.sizes.keys()

    @invariant()
    def it_never_grows_silently(self) -> None:
        assert sum(self.sizes.values()) <= LIMIT + self.told_over


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
