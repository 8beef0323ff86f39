"""Whatever is done in whatever order, the folder store behaves like a dictionary."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trainyard.errors import Conflict, NotFound
from trainyard.store.folder import FolderStore
from trainyard.store.protocol import Entry

KEYS = st.sampled_from(["a", "b/c", "b/d", "b-x", "b/e/f", "g.json"])
CONTENTS = st.binary(max_size=3)


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FolderStoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="trainyard-tests-"))
        self.store = FolderStore(self.folder)
        self.model: dict[str, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule()
    def open_anew(self) -> None:
        self.store = FolderStore(self.folder)

    @rule(key=KEYS, data=CONTENTS)
    def create(self, key: str, data: bytes) -> None:
        if key in self.model:
            with pytest.raises(Conflict):
                self.store.create(key, data)
        else:
            assert self.store.create(key, data) == version_of(data)
            self.model[key] = data

    @rule(key=KEYS, data=CONTENTS, base=CONTENTS)
    def replace(self, key: str, data: bytes, base: bytes) -> None:
        if self.model.get(key) == base:
            assert self.store.replace(key, data, version=version_of(base)) == version_of(data)
            self.model[key] = data
        else:
            with pytest.raises(Conflict):
                self.store.replace(key, data, version=version_of(base))

    @rule(key=KEYS, data=CONTENTS)
    def replace_what_was_read(self, key: str, data: bytes) -> None:
        if key in self.model:
            self.store.replace(key, data, version=self.store.read(key).version)
            self.model[key] = data
        else:
            with pytest.raises(NotFound):
                self.store.read(key)

    @rule(key=KEYS, data=CONTENTS)
    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.model[key] = data

    @rule(key=KEYS, data=CONTENTS)
    def upload(self, key: str, data: bytes) -> None:
        if self.model.setdefault(key, data) == data:
            assert self.store.upload(key, io.BytesIO(data)).sha256 == version_of(data)
        else:
            with pytest.raises(Conflict):
                self.store.upload(key, io.BytesIO(data))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS, base=CONTENTS)
    def delete_a_version(self, key: str, base: bytes) -> None:
        if self.model.get(key) == base:
            self.store.delete(key, version=version_of(base))
            del self.model[key]
        else:
            with pytest.raises(Conflict):
                self.store.delete(key, version=version_of(base))

    @invariant()
    def the_same_is_seen(self) -> None:
        expected = [Entry(key, len(data)) for key, data in sorted(self.model.items())]
        assert list(self.store.list("")) == expected
        below = [entry for entry in expected if entry.key.startswith("b/")]
        assert list(self.store.list("b")) == below
        for key, data in self.model.items():
            assert self.store.read(key).data == data


TestFolderStoreMachine = FolderStoreMachine.TestCase
TestFolderStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
