"""Our Hub server is faithful: the real huggingface_hub downloads from it, and meets its errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tests.hub_server import HubServer
from tests.unit.sources.hub_world import REPO, model
from tests.unit.sources.model_files import safetensors

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def test_a_snapshot_is_what_was_committed(server: HubServer, tmp_path: Path) -> None:
    files = model(model__safetensors=safetensors({"embed": [300, 400]}))
    commit = server.add(REPO, files)
    server.tokens |= {"reader"}
    server.add(REPO, files, ref="again", private=True, readers=frozenset({"reader"}))

    folder = Path(snapshot_download(REPO, cache_dir=tmp_path, endpoint=server.url, token="reader"))

    assert folder.name == commit or folder.name in server.repos[REPO].commits
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert {seen.token for seen in server.requests(origin="cdn")} == {None}


def test_a_cut_download_is_tried_again_by_the_library(server: HubServer, tmp_path: Path) -> None:
    content = safetensors({"embed": [300, 400]})
    server.add(REPO, model(model__safetensors=content))
    server.fail("Signature", cut_after=200_000)

    path = hf_hub_download(
        REPO, "model.safetensors", local_dir=tmp_path, endpoint=server.url, token=False
    )

    assert Path(path).read_bytes() == content
    assert len(server.requests("Signature")) == 2


def test_the_listing_has_sizes_and_hashes(server: HubServer) -> None:
    commit = server.add(REPO, model())
    info = HfApi(endpoint=server.url, token=False).model_info(REPO, files_metadata=True)

    assert info.sha == commit
    assert info.siblings is not None
    assert all(sibling.size and sibling.blob_id for sibling in info.siblings)
    assert [s.rfilename for s in info.siblings if s.lfs] == ["model.safetensors"]


def test_errors_are_the_librarys_own(server: HubServer, tmp_path: Path) -> None:
    server.add(REPO, model())
    server.add("yard/gated", model(), gated=True)
    api = HfApi(endpoint=server.url, token=False)

    with pytest.raises(RepositoryNotFoundError):
        api.model_info("yard/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "gone.json", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        api.get_hf_file_metadata(url=f"{server.url}/yard/gated/resolve/main/config.json")
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=server.url, token="nobody").model_info(REPO)
    assert type(refused.value) is HfHubHTTPError
    assert refused.value.response.status_code == 401
