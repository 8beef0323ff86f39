"""The Hub as a source, against a server of ours that speaks its protocol."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from tests.hub_server import HubServer, blob_id
from tests.unit.sources.hub_world import REPO, hub, model
from tests.unit.sources.model_files import safetensors

from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError, Transient
from trainyard.sources.files import HEAD_BYTES, read_architecture

BIG = safetensors({"embed": [200, 500]})
"""More than is fetched of a weight file at first."""

TOKEN = "hf_" + "s3cr3t" * 5


def refused(kind: type[TrainyardError], do: Callable[[], Any]) -> str:
    with pytest.raises(TrainyardError) as caught:
        do()
    assert type(caught.value) is kind
    assert caught.value.hint
    return str(caught.value)


class TestPeek:
    def test_one_request_tells_the_newest_commit(self, server: HubServer) -> None:
        server.add(REPO, model())
        newest = server.add(REPO, model(fill=1))
        revision, _ = hub(server).peek(None)
        assert revision == newest
        assert [seen.path for seen in server.seen] == [f"/api/models/{REPO}?blobs=true"]

    def test_equals_what_is_resolved(self, server: HubServer) -> None:
        server.add(REPO, model())
        resolved = hub(server).resolve(None)
        assert hub(server).peek(None) == (resolved.revision, resolved.fingerprint)

    def test_sees_a_new_commit(self, server: HubServer) -> None:
        server.add(REPO, model())
        source = hub(server)
        before = source.peek(None)
        server.add(REPO, model(fill=1))
        assert source.peek(None) != before

    def test_judges_no_files(self, server: HubServer) -> None:
        commit = server.add(REPO, {"pytorch_model.bin": b"\x80\x04."})
        assert hub(server).peek(None)[0] == commit


class TestResolve:
    def test_files_come_with_the_hubs_own_hashes(self, server: HubServer) -> None:
        files = model()
        commit = server.add(REPO, files)
        resolved = hub(server).resolve(None)
        assert resolved.revision == commit
        assert resolved.uri == f"{server.url}/{REPO}/tree/{commit}"
        found = {file.path: file for file in resolved.files}
        assert sorted(found) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert found["config.json"].git_blob_id == blob_id(files["config.json"])
        assert found["config.json"].sha256 is None
        weights = files["model.safetensors"]
        assert found["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
        assert found["model.safetensors"].size == len(weights)

    def test_branches_tags_and_commits(self, server: HubServer) -> None:
        first = server.add(REPO, model())
        server.add(REPO, model(), ref="v1.0")
        other = server.add(REPO, model(fill=1), ref="refs/pr/3")
        source = hub(server)
        assert source.resolve("main").revision == first
        assert source.resolve(first).revision == first
        assert source.resolve("refs/pr/3").revision == other

    @pytest.mark.parametrize("revision", ["", "../x", "a..b", "-x", "a b", "x\n"])
    def test_what_is_no_revision_is_not_even_sent(self, server: HubServer, revision: str) -> None:
        server.add(REPO, model())
        refused(BadInput, lambda: hub(server).resolve(revision))
        assert server.seen == []

    def test_only_headers_of_weights_are_read(self, server: HubServer) -> None:
        shards = {f"model-{i}.safetensors": safetensors({f"t{i}": [200, 500]}) for i in range(3)}
        files = model() | shards
        del files["model.safetensors"]
        server.add(REPO, files)
        source = hub(server)
        resolved = source.resolve(None)
        assert len(read_architecture(source, resolved).tensors) == 3
        ranges = {seen.range for seen in server.requests("safetensors", origin="cdn")}
        assert ranges == {f"bytes=0-{HEAD_BYTES - 1}"}
        assert len(server.requests("safetensors", origin="cdn")) == 3

    def test_a_long_header_is_read_whole(self, server: HubServer) -> None:
        shapes = {f"model.layers.{i}.self_attn.q_proj.weight": [1] for i in range(2000)}
        server.add(REPO, model(model__safetensors=safetensors(shapes)))
        source = hub(server)
        assert len(read_architecture(source, source.resolve(None)).tensors) == 2000
        assert len(server.requests("safetensors", origin="cdn")) == 2

    def test_nothing_is_read_twice_to_judge_a_revision(self, server: HubServer) -> None:
        server.add(REPO, model())
        source = hub(server)
        resolved = source.resolve(None)
        count = len(server.seen)
        read_architecture(source, resolved)
        assert len(server.seen) == count

    def test_patterns_choose_files(self, server: HubServer) -> None:
        server.add(REPO, model(pytorch_model__bin=b"\x80", vocab__txt=b"a", merges__txt=b"b"))
        refused(BadInput, lambda: hub(server).resolve(None))
        source = hub(server, ignore_patterns=("*.bin", "merges*"))
        paths = [file.path for file in source.resolve(None).files]
        assert paths == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
        source = hub(server, allow_patterns=("*.json", "*.safetensors"))
        assert len(source.resolve(None).files) == 3

    def test_code_is_let_in_by_its_exact_name(self, server: HubServer) -> None:
        server.add(REPO, model(modeling_x__py=b"import os"))
        assert "`allow_files`" in refused(BadInput, lambda: hub(server).resolve(None))
        source = hub(server, allow_files=("modeling_x.py",))
        resolved = source.resolve(None)
        assert resolved.allowed == ("modeling_x.py",)
        assert "modeling_x.py" in [file.path for file in resolved.files]
        assert read_architecture(source, resolved).parameters == 12

    def test_permission_for_one_file_covers_no_other(self, server: HubServer) -> None:
        server.add(REPO, model(modeling_x__py=b"", other__py=b""))
        source = hub(server, allow_files=("modeling_x.py", "gone.py"))
        message = refused(BadInput, lambda: source.resolve(None))
        assert "code is never loaded (other.py)" in message
        assert "what is not there (gone.py)" in message

    @pytest.mark.parametrize(
        "name",
        ["../config.json", "/etc/passwd", "a/../../b", "a\\b.json", "a\nb.json", "./x", "a//b"],
    )
    def test_names_that_leave_their_folder(self, server: HubServer, name: str) -> None:
        server.add(REPO, model(vocab__txt=b"x"))
        server.names["vocab.txt"] = name
        message = refused(BadInput, lambda: hub(server).resolve(None))
        assert "not plain relative paths" in message
        assert "\n" not in message
        assert server.requests("/resolve/") == []

    def test_names_that_differ_only_in_case(self, server: HubServer) -> None:
        server.add(REPO, model(Config__json=b"{}"))
        message = refused(BadInput, lambda: hub(server).resolve(None))
        assert "'Config.json' and 'config.json' would be the same file" in message

    def test_an_index_that_names_a_shard_that_is_not_there(self, server: HubServer) -> None:
        index = b'{"weight_map": {"embed": "model.safetensors", "x": "gone.safetensors"}}'
        server.add(REPO, model() | {"model.safetensors.index.json": index})
        message = refused(BadInput, lambda: hub(server).resolve(None))
        assert "names files that are missing (gone.safetensors)" in message


class TestReading:
    def test_a_file_can_be_read_from_any_place(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG
            assert stream.read(1) == b""
            stream.seek(-5, 2)
            assert stream.read() == BIG[-5:]
            stream.seek(7)
            assert stream.read(3) == BIG[7:10]

    @pytest.mark.parametrize(("start", "size"), [(0, 10), (150_000, 200_000), (5, 0)])
    def test_a_range_fetches_nothing_else(self, server: HubServer, start: int, size: int) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.served_bytes = 0
        with source.open_range(resolved, "model.safetensors", start, size) as stream:
            assert stream.read() == BIG[start : start + size]
        assert server.served_bytes == size

    def test_large_ranges_are_not_kept_in_memory(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        for _ in range(2):
            server.served_bytes = 0
            with source.open_range(resolved, "model.safetensors", 0, len(BIG)) as stream:
                assert stream.read(1) == BIG[:1]
                assert stream.read() == BIG[1:]
            assert server.served_bytes == len(BIG)

    def test_only_listed_files(self, server: HubServer) -> None:
        server.add(REPO, model(README__md=b"x"))
        source = hub(server)
        resolved = source.resolve(None)
        refused(NotFound, lambda: source.open(resolved, "README.md"))
        refused(NotFound, lambda: source.open_range(resolved, "README.md", 0, 1))

    def test_a_later_commit_changes_nothing(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.add(REPO, model())
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG

    def test_a_cut_connection_goes_on_where_it_was(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.served_bytes = 0
        server.fail("Signature", times=2, cut_after=100_000)
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG
        assert server.served_bytes == len(BIG)
        ranges = [seen.range for seen in server.requests("Signature")[-3:]]
        assert ranges == [f"bytes={first}-{len(BIG) - 1}" for first in (0, 100_000, 200_000)]

    def test_a_mirror_without_ranges_is_slow_but_right(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        server.ignores_ranges = True
        source = hub(server)
        resolved = source.resolve(None)
        with source.open_range(resolved, "model.safetensors", 150_000, 1_000) as stream:
            assert stream.read() == BIG[150_000:151_000]

    def test_a_connection_that_is_always_cut_is_given_up(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.fail("Signature", times=99, cut_after=0)
        refused(Transient, lambda: source.open(resolved, "model.safetensors").read())
        assert len(server.requests("Signature")) == 1 + 3

    def test_progress_renews_the_patience(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.fail("Signature", times=10, cut_after=len(BIG) // 8)
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG

    def test_a_file_of_another_size_than_listed(self, server: HubServer) -> None:
        server.add(REPO, model(model__safetensors=BIG))
        source = hub(server)
        resolved = source.resolve(None)
        server.wrong_bytes["model.safetensors"] = BIG + b"x"
        message = refused(CorruptFile, lambda: source.open(resolved, "model.safetensors").read())
        assert "model.safetensors has" in message

    def test_a_small_file_that_is_not_its_blob(self, server: HubServer) -> None:
        files = model()
        server.add(REPO, files)
        server.wrong_bytes["config.json"] = files["config.json"].replace(b"llama", b"alpac")
        message = refused(CorruptFile, lambda: hub(server).resolve(None))
        assert "config.json has the git object id" in message


class TestToken:
    def test_reads_gated_and_private_models(self, server: HubServer) -> None:
        server.tokens |= {TOKEN}
        server.add(REPO, model(), private=True, gated=True, readers=frozenset({TOKEN}))
        source = hub(server, token=TOKEN)
        resolved = source.resolve(None)
        with source.open(resolved, "model.safetensors") as stream:
            assert len(stream.read()) == resolved.files[1].size

    def test_stays_on_the_hub(self, server: HubServer) -> None:
        server.tokens |= {TOKEN}
        server.add(REPO, model())
        hub(server, token=TOKEN).resolve(None)
        assert {seen.token for seen in server.requests(origin="hub")} == {TOKEN}
        assert {seen.token for seen in server.requests(origin="cdn")} == {None}

    def test_may_come_from_the_usual_variable(
        self, server: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.tokens |= {TOKEN}
        server.add(REPO, model(), private=True, readers=frozenset({TOKEN}))
        hub(server).peek(None)

    def test_that_is_wrong(self, server: HubServer) -> None:
        server.add(REPO, model())
        message = refused(BadInput, lambda: hub(server, token=TOKEN).peek(None))
        assert "refuses the token" in message
        assert "TRAINYARD_HUB_CONNECTION" in message

    def test_of_somebody_who_may_not(self, server: HubServer) -> None:
        server.tokens |= {TOKEN}
        server.add(REPO, model(), private=True)
        message = refused(NotFound, lambda: hub(server, token=TOKEN).peek(None))
        assert "The token that is set cannot see it" in message

    @pytest.mark.parametrize("token", ["", TOKEN])
    def test_for_a_gated_model(self, server: HubServer, token: str) -> None:
        server.tokens |= {TOKEN}
        server.add(REPO, model(), gated=True)
        message = refused(BadInput, lambda: hub(server, token=token).resolve(None))
        assert f"{REPO} is gated" in message
        assert f"Ask for access at {server.url}/{REPO}" in message

    def test_is_in_no_text(self, server: HubServer) -> None:
        server.tokens |= {TOKEN}
        server.add(REPO, model(), gated=True)
        source = hub(server, token=TOKEN)
        try:
            source.resolve(None)
        except BadInput:
            assert TOKEN not in traceback.format_exc()
        else:
            pytest.fail("it is gated")
        assert TOKEN not in repr(vars(source).get("_source"))


class TestFailures:
    def test_no_such_model(self, server: HubServer) -> None:
        assert "There is no model yard/adder" in refused(NotFound, lambda: hub(server).peek(None))
        assert len(server.seen) == 1

    def test_no_such_revision(self, server: HubServer) -> None:
        server.add(REPO, model())
        message = refused(NotFound, lambda: hub(server).peek("v9"))
        assert "There is no revision 'v9' of yard/adder" in message

    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_a_short_storm_is_weathered(self, server: HubServer, status: int) -> None:
        server.add(REPO, model())
        server.fail("/api/models", times=2, status=status, headers={"Retry-After": "1"})
        server.fail("/resolve/", times=2, status=status)
        assert hub(server).resolve(None).files

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_long_storm_is_left_to_a_later_try(self, server: HubServer, status: int) -> None:
        server.add(REPO, model())
        server.fail("", times=99, status=status)
        refused(Transient, lambda: hub(server).peek(None))
        assert len(server.seen) == 3

    def test_a_storm_while_files_are_read(self, server: HubServer) -> None:
        server.add(REPO, model())
        server.fail("/resolve/", times=99, status=503)
        refused(Transient, lambda: hub(server).resolve(None))

    def test_an_endpoint_that_stalls(self, server: HubServer) -> None:
        server.add(REPO, model())
        server.fail("", times=99, stall_s=60)
        message = refused(Transient, lambda: hub(server, timeout_s=0.2).peek(None))
        assert "did not answer for 0.2 s" in message

    def test_a_file_that_stalls_once(self, server: HubServer) -> None:
        server.add(REPO, model())
        server.fail("Signature", stall_s=60)
        assert hub(server, timeout_s=2).resolve(None).files

    def test_nobody_there(self, server: HubServer) -> None:
        server.add(REPO, model())
        source = hub(server)
        server.__exit__()
        assert "connection" in refused(Transient, lambda: source.peek(None))

    @pytest.mark.parametrize(
        ("status", "headers"), [(200, {"Content-Type": "text/html"}), (204, {})]
    )
    def test_something_else_answers(
        self, server: HubServer, status: int, headers: dict[str, str]
    ) -> None:
        server.fail("", times=99, status=status, headers=headers)
        message = refused(BadInput, lambda: hub(server).peek(None))
        assert "does not answer as the Hub does" in message

    @pytest.mark.parametrize("endpoint", ["ftp://hub", "hub", "http://"])
    def test_an_endpoint_that_is_no_url(self, server: HubServer, endpoint: str) -> None:
        refused(BadInput, lambda: hub(server, endpoint=endpoint).peek(None))

    def test_an_endpoint_with_credentials(self, server: HubServer) -> None:
        message = refused(BadInput, lambda: hub(server, endpoint="http://ada:s3cr3t@hub.example"))
        assert "s3cr3t" not in message

    def test_a_link_to_a_file_is_in_no_text(self, server: HubServer) -> None:
        server.add(REPO, model())
        server.fail("Signature", times=99, status=403)
        assert "opens-it" not in refused(BadInput, lambda: hub(server).resolve(None))
