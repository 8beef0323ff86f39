from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from trainyard.node_cache.records import Pin
from trainyard.store.locks import Holder

NOW = datetime(2026, 1, 1, tzinfo=UTC)

PRINT_HOLDER = """
from trainyard.store.locks import Holder
print(Holder.me("serve").model_dump_json())
"""


def pin(**values: object) -> Pin:
    return Pin.model_validate(
        {"release_id": "adder-0123456789ab", "owner": "me", "since": NOW, **values}
    )


def test_a_named_pin_lasts() -> None:
    assert not pin().is_orphaned()


def test_a_pin_ends_with_its_process() -> None:
    assert not pin(process=Holder.me("serve")).is_orphaned()
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HOLDER], check=True, stdout=subprocess.PIPE, timeout=600
    )
    assert pin(process=Holder.model_validate_json(done.stdout)).is_orphaned()


def test_a_process_that_cannot_be_seen_from_here_may_live() -> None:
    holder = Holder.me("serve").model_copy(update={"machine": "another", "pid": 1})
    assert not pin(process=holder).is_orphaned()


def test_a_pin_ends_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pods" / "one"
    folder.mkdir(parents=True)
    assert not pin(folder=folder).is_orphaned()
    folder.rmdir()
    assert pin(folder=folder).is_orphaned()


def test_a_folder_that_cannot_be_seen_from_here_may_exist(tmp_path: Path) -> None:
    assert not pin(folder=tmp_path / "not" / "mounted" / "here").is_orphaned()
