"""The store's promises and rights, tried by writing and removing."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from trainyard.doctor.report import Check, exit_code, fail, failed, guarded, ok, warn
from trainyard.doctor.store_checks import EVERY, WRITERS, store_checks
from trainyard.errors import BadInput, Transient
from trainyard.store.folder import FolderStore


class Narrow(FolderStore):
    """A store whose identity may write some keys only."""

    patterns: tuple[str, ...] = ()

    def create(self, key: str, data: bytes) -> str:
        """Write where it may."""
        if not any(fnmatchcase(key, pattern) for pattern in self.patterns):
            raise BadInput(f"AccessDenied: {key}")
        return super().create(key, data)


class Forgetful(FolderStore):
    """A store that ignores the condition of a replacement, as some do."""

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        """Replace whatever is there."""
        return self.put(key, data)


class Keeping(FolderStore):
    """A store whose identity may remove nothing."""

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Refuse."""
        raise BadInput(f"AccessDenied: {key}")


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def narrow(folder: Path, *patterns: str) -> Narrow:
    store = Narrow(folder)
    store.patterns = patterns
    return store


def test_a_good_store_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert set(states(list(store_checks(store))).values()) == {"ok"}
    assert list(store.list("")) == []


def test_a_store_that_ignores_conditions_is_found_out(tmp_path: Path) -> None:
    found = list(store_checks(Forgetful(tmp_path)))
    assert states(found)["store: conditional writes"] == "fail"
    assert list(FolderStore(tmp_path).list("")) == []


def test_who_may_remove_nothing_is_told_what_is_left(tmp_path: Path) -> None:
    found = states(list(store_checks(Keeping(tmp_path))))
    assert found["store: left behind"] == "warn"
    assert found["store: rights"] == "ok"


@pytest.mark.parametrize("identity", WRITERS)
def test_each_identity_has_rights_of_its_own(tmp_path: Path, identity: str) -> None:
    exact = list(store_checks(narrow(tmp_path, *WRITERS[identity]), identity))
    assert states(exact)["store: rights"] == "ok"
    if WRITERS[identity]:
        nothing = list(store_checks(narrow(tmp_path), identity))
        assert states(nothing)["store: rights"] == "fail"
    everything = list(store_checks(narrow(tmp_path, *EVERY), identity))
    (rights,) = [check for check in everything if check.name == "store: rights"]
    assert rights.state == "warn"
    assert "no need of" in rights.found


def test_a_step_that_writes_its_part_of_a_folder_is_not_told_it_lacks_the_rest(
    tmp_path: Path,
) -> None:
    """Verdicts lie beside promotions and rejections, which are not `publish`'s to write."""
    store = narrow(tmp_path, *WRITERS["publish"])
    assert states(list(store_checks(store, "publish")))["store: rights"] == "ok"
    store.patterns = (*WRITERS["publish"], "attestations/*")
    assert states(list(store_checks(store, "publish")))["store: rights"] == "warn"


def test_without_an_identity_rights_are_only_told(tmp_path: Path) -> None:
    for patterns in ((), ("plans/*",)):
        (rights,) = [
            check
            for check in store_checks(narrow(tmp_path, *patterns))
            if check.name == "store: rights"
        ]
        assert rights.state == "warn"


def test_the_exit_code_says_whether_looking_again_can_help() -> None:
    for_now = failed("store", Transient("It is away."))
    assert exit_code([ok("a", "b"), warn("c", "d")]) == 0
    assert exit_code([ok("a", "b"), for_now]) == 30
    assert exit_code([for_now, fail("e", "f")]) == 10

    def broken() -> list[Check]:
        raise BadInput("No bucket.", hint="Make one.")

    (check,) = guarded("store", broken)
    assert (check.state, check.remedy) == ("fail", "Make one.")
