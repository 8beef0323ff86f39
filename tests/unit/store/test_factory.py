from __future__ import annotations

from pathlib import Path

import pytest

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.store.factory import open_store


def test_the_default_is_below_the_home(tmp_path: Path) -> None:
    assert open_store(Settings(home=tmp_path)).url == (tmp_path / "store").as_uri()


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_folder_may_be_named_in_several_ways(tmp_path: Path, form: str) -> None:
    store = open_store(Settings(home=tmp_path, store=form.format(tmp_path / "elsewhere")))
    store.create("a", b"")
    assert (tmp_path / "elsewhere" / "a").exists()


@pytest.mark.parametrize("url", ["gs://bucket/prefix", "https://x/y", "file://host/x", "file://"])
def test_other_kinds_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadInput, match="TRAINYARD_STORE names a store of kind"):
        open_store(Settings(home=tmp_path, store=url))
