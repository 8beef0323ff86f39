from __future__ import annotations

import json
import os
import re
from io import BufferedIOBase
from pathlib import Path
from typing import cast

import pytest
from tests.unit.sources.model_files import CONFIG, safetensors, write_model
from tests.unprivileged import open_folder, ordinary_user

from trainyard.errors import BadInput, NotFound, Transient
from trainyard.settings import Settings
from trainyard.sources.factory import open_source
from trainyard.sources.files import read_architecture
from trainyard.sources.local import SMALL_BYTES, LocalSource
from trainyard.spec.model import LocalSource as LocalSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source" / "v1")


def problems_of(model: Path) -> str:
    with pytest.raises(BadInput) as caught:
        LocalSource(model.parent).resolve(model.name)
    return str(caught.value)


def write_index(model: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(text)


class TestResolve:
    def test_lists_what_is_loaded_and_nothing_else(self, model: Path) -> None:
        (model / "README.md").write_text("hello")
        (model / ".gitattributes").write_text("hello")
        (model / "tokenizer_config.json").write_text("{}")
        (model / "chat_template.jinja").write_text("")
        (model / "onnx").mkdir()
        (model / "onnx" / "old.bin").write_bytes(b"never loaded, so not refused")
        resolved = LocalSource(model.parent).resolve("v1")
        assert [file.path for file in resolved.files] == [
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert all(f.size == (model / f.path).stat().st_size for f in resolved.files)
        assert resolved.revision == "v1"
        assert resolved.uri == model.as_uri()

    def test_newest_is_by_natural_order(self, model: Path) -> None:
        for name in ("v9", "v10", "v2"):
            write_model(model.parent / name)
        (model.parent / "v99").write_text("a file is no revision")
        (model.parent / ".v99-being-written").mkdir()
        assert LocalSource(model.parent).resolve(None).revision == "v10"

    def test_a_link_beside_the_revisions_stands_for_one_of_them(self, model: Path) -> None:
        (model.parent / "zz-latest").symlink_to("v1")
        assert LocalSource(model.parent).resolve("zz-latest").revision == "v1"
        assert LocalSource(model.parent).resolve(None).revision == "v1"

    def test_a_link_to_elsewhere_is_no_revision(self, model: Path, tmp_path: Path) -> None:
        (model.parent / "v2").symlink_to(write_model(tmp_path / "elsewhere"))
        with pytest.raises(NotFound):
            LocalSource(model.parent).resolve("v2")

    def test_an_unknown_revision_names_those_that_exist(self, model: Path) -> None:
        write_model(model.parent / "v10")
        write_model(model.parent / "v9")
        with pytest.raises(NotFound, match=r"no revision 'v3'.*v1, v9, v10"):
            LocalSource(model.parent).resolve("v3")

    @pytest.mark.parametrize("revision", ["../v1", "a/b", "", ".", "v1\n", "..", "/etc"])
    def test_names_that_leave_the_folder_are_refused(self, model: Path, revision: str) -> None:
        with pytest.raises(BadInput, match="not valid"):
            LocalSource(model.parent).resolve(revision)

    def test_a_missing_folder_says_what_to_correct(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"nowhere does not exist.*source\.path"):
            LocalSource(tmp_path / "nowhere").resolve(None)

    def test_a_file_instead_of_a_folder(self, model: Path) -> None:
        with pytest.raises(NotFound, match="does not exist"):
            LocalSource(model / "config.json").resolve(None)

    def test_no_revisions_yet(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="has no revisions"):
            LocalSource(tmp_path).resolve(None)

    def test_a_folder_without_rights(self) -> None:
        with open_folder() as folder:
            model = write_model(folder / "v1")
            with ordinary_user():
                LocalSource(folder).resolve("v1")
            model.chmod(0)
            with ordinary_user(), pytest.raises(BadInput, match=r"v1.*right to read"):
                LocalSource(folder).resolve("v1")
            model.chmod(0o755)


class TestRefusals:
    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "v1").mkdir()
        assert "the folder is empty" in problems_of(tmp_path / "v1")

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "optimizer.pt", "X.PTH", "last.ckpt", "a.pkl"]
    )
    def test_pickles(self, model: Path, name: str) -> None:
        (model / name).write_bytes(b"\x80\x04.")
        message = problems_of(model)
        assert name in message
        assert "convert weights to safetensors" in message

    @pytest.mark.parametrize("name", ["modeling_mine.py", "kernel.so", "setup.sh"])
    def test_code(self, model: Path, name: str) -> None:
        (model / name).write_bytes(b"")
        assert f"code is never loaded ({name})" in problems_of(model)

    def test_code_is_let_in_by_its_exact_name(self, model: Path) -> None:
        (model / "modeling_mine.py").write_bytes(b"x = 1")
        (model / "pytorch_model.bin").write_bytes(b"x")
        assert "`allow_files`" in problems_of(model)
        source = LocalSource(
            model.parent, allow_files=("modeling_mine.py", "pytorch_model.bin", "manifest.json")
        )
        (model / "manifest.json").write_text("{}")
        resolved = source.resolve("v1")
        assert resolved.allowed == ("modeling_mine.py", "pytorch_model.bin")
        assert {"modeling_mine.py", "pytorch_model.bin"} < {file.path for file in resolved.files}
        assert read_architecture(source, resolved).parameters == 12

    @pytest.mark.parametrize("name", ["a\\b.json", "a\nb.json", "a\x1bb.txt"])
    def test_names_that_are_no_plain_names(self, model: Path, name: str) -> None:
        (model / name).write_bytes(b"{}")
        assert "not plain relative paths" in problems_of(model)

    def test_names_that_differ_only_in_case(self, model: Path) -> None:
        (model / "Config.json").write_bytes(b"{}")
        assert "'Config.json' and 'config.json' would be the same" in problems_of(model)

    def test_all_problems_come_at_once(self, model: Path) -> None:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (model / name).unlink()
        (model / "pytorch_model.bin").write_bytes(b"x")
        (model / "modeling.py").write_bytes(b"x")
        message = problems_of(model)
        for part in (
            "config.json is missing",
            "tokenizer.json is missing",
            "no *.safetensors file",
            "pytorch_model.bin",
            "modeling.py",
            "all 5 problems",
        ):
            assert part in message

    def test_truncated_weights(self, model: Path) -> None:
        whole = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(whole[:-3])
        assert re.search(r"model\.safetensors is truncated: .* 48 bytes, 45", problems_of(model))

    def test_weights_that_are_a_pointer_of_git_lfs(self, model: Path) -> None:
        (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "model.safetensors is not a safetensors file" in problems_of(model)

    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            ("config.json", "{", "config.json is not valid JSON"),
            ("config.json", "[]", "config.json holds no JSON object"),
            ("config.json", "{}", "names no architecture"),
            (
                "config.json",
                '{"architectures": ["A"], "eps": 1e400}',
                "config.json holds what no other program can read (Out of range float",
            ),
            (
                "config.json",
                '{"architectures": ["\\ud800"]}',
                "config.json holds what no other program can read ('utf-8' codec can't encode",
            ),
            ("config.json", '{"x": ' + "[" * 600 + "]" * 600 + "}", "config.json holds what"),
            (
                "model.safetensors.index.json",
                '{"weight_map": {"\\udfff": "model.safetensors"}}',
                "model.safetensors.index.json holds what no other program can read",
            ),
            ("tokenizer.json", "", "tokenizer.json is not valid JSON"),
            ("generation_config.json", "nope", "generation_config.json is not valid JSON"),
        ],
    )
    def test_broken_documents(self, model: Path, name: str, text: str, complaint: str) -> None:
        (model / name).write_text(text)
        problems = problems_of(model)
        assert complaint in problems
        assert problems.encode()

    def test_a_tensor_whose_name_is_half_a_character(self, model: Path) -> None:
        (model / "model.safetensors").write_bytes(safetensors({"\ud800": [4]}))
        assert r"model.safetensors: the tensor name '\ud800' is no valid text" in problems_of(model)

    def test_a_link_out_of_the_folder(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "blob").write_bytes(safetensors({"a": [1]}))
        (model / "model.safetensors").unlink()
        (model / "model.safetensors").symlink_to(tmp_path / "blob")
        assert "model.safetensors is a symbolic link out of the folder" in problems_of(model)

    def test_a_link_to_nothing(self, model: Path) -> None:
        (model / "vocab.txt").symlink_to("gone.txt")
        assert "vocab.txt is a symbolic link to nothing" in problems_of(model)

    def test_a_link_inside_the_folder_is_fine(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "blob")
        (model / "model.safetensors").symlink_to("blob")
        files = LocalSource(model.parent).resolve("v1").files
        assert [f.size for f in files if f.path == "model.safetensors"] == [
            (model / "blob").stat().st_size
        ]


class TestShards:
    def test_the_index_decides_what_is_loaded(self, model: Path) -> None:
        (model / "a.safetensors").write_bytes(safetensors({"a": [1]}))
        (model / "b.safetensors").write_bytes(safetensors({"b": [2]}))
        write_index(model, {"a": "a.safetensors", "b": "b.safetensors"})
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        paths = [file.path for file in resolved.files]
        assert "a.safetensors" in paths
        assert "b.safetensors" in paths
        assert "model.safetensors" not in paths
        architecture = read_architecture(source, resolved)
        assert [tensor.name for tensor in architecture.tensors] == ["a", "b"]
        assert architecture.parameters == 3

    def test_missing_shards(self, model: Path) -> None:
        write_index(model, {"embed": "model.safetensors", "x": "../x.safetensors"})
        assert "names files that are missing (../x.safetensors)" in problems_of(model)

    def test_missing_tensors(self, model: Path) -> None:
        write_index(model, dict.fromkeys(["norm", *"abcde"], "model.safetensors"))
        assert "(a, b, c and 2 more)" in problems_of(model)

    @pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
    def test_an_index_without_a_map(self, model: Path, weight_map: object) -> None:
        write_index(model, weight_map)
        assert "no usable `weight_map`" in problems_of(model)

    def test_one_tensor_in_two_files(self, model: Path) -> None:
        (model / "z.safetensors").write_bytes(safetensors({"norm": [4]}))
        message = problems_of(model)
        assert "z.safetensors and model.safetensors both hold norm" in message

    def test_no_tensors_at_all(self, model: Path) -> None:
        (model / "model.safetensors").write_bytes(safetensors({}))
        assert "hold no tensors" in problems_of(model)


class TestFingerprint:
    def fingerprint(self, model: Path) -> str:
        return LocalSource(model.parent).resolve("v1").fingerprint

    def test_is_the_same_for_the_same_content_elsewhere(self, model: Path, tmp_path: Path) -> None:
        other = write_model(tmp_path / "other" / "v1")
        assert self.fingerprint(model) == self.fingerprint(other)

    def test_changes_with_weights_of_the_same_shape(self, model: Path) -> None:
        before = self.fingerprint(model)
        write_model(model, fill=1)
        assert self.fingerprint(model) != before

    def test_changes_with_text_of_the_same_size(self, model: Path) -> None:
        before = self.fingerprint(model)
        text = (model / "config.json").read_text()
        (model / "config.json").write_text(text.replace("llama", "alpac"))
        assert self.fingerprint(model) != before

    def test_changes_when_large_weights_are_written_again(self, model: Path) -> None:
        weights = model / "model.safetensors"
        weights.write_bytes(safetensors({"a": [SMALL_BYTES]}))
        os.utime(weights, ns=(1, 1))
        before = self.fingerprint(model)
        assert self.fingerprint(model) == before
        os.utime(weights, ns=(1, 2))
        assert self.fingerprint(model) != before

    def test_files_that_are_not_loaded_do_not_count(self, model: Path) -> None:
        before = self.fingerprint(model)
        (model / "README.md").write_text("hello")
        assert self.fingerprint(model) == before


class TestPeek:
    def test_equals_what_is_resolved(self, model: Path) -> None:
        write_model(model.parent / "v2", fill=1)
        source = LocalSource(model.parent)
        resolved = source.resolve(None)
        assert source.peek(None) == (resolved.revision, resolved.fingerprint)
        assert source.peek("v1")[0] == "v1"

    @pytest.mark.parametrize("length", [1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1])
    def test_a_broken_length_of_a_header_stops_nothing_and_is_named_later(
        self, model: Path, length: int
    ) -> None:
        with (model / "model.safetensors").open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(SMALL_BYTES)
        assert LocalSource(model.parent).peek(None)[0] == "v1"
        assert "model.safetensors is " in problems_of(model)

    def test_judges_no_files(self, model: Path) -> None:
        (model / "modeling.py").write_bytes(b"x")
        assert LocalSource(model.parent).peek(None)[0] == "v1"


class TestOpenRange:
    @pytest.mark.parametrize(("start", "size"), [(0, 4), (3, 5), (0, 0), (2, 18)])
    def test_gives_these_bytes_and_ends(self, model: Path, start: int, size: int) -> None:
        (model / "vocab.txt").write_bytes(b"0123456789abcdefghij")
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        with source.open_range(resolved, "vocab.txt", start, size) as stream:
            assert stream.read(2) + stream.read() == b"0123456789abcdefghij"[start : start + size]
            assert stream.read(1) == b""

    def test_fills_memory_of_the_caller(self, model: Path) -> None:
        (model / "vocab.txt").write_bytes(b"0123456789abcdefghij")
        source = LocalSource(model.parent)
        room = bytearray(6)
        with source.open_range(source.resolve("v1"), "vocab.txt", 3, 4) as stream:
            assert cast(BufferedIOBase, stream).readinto(room) == 4
            assert stream.read() == b""
        assert room == b"3456\0\0"

    def test_only_of_listed_files(self, model: Path) -> None:
        source = LocalSource(model.parent)
        with pytest.raises(NotFound, match="not a file of revision"):
            source.open_range(source.resolve("v1"), "../v1/config.json", 0, 1)


class TestOpen:
    def test_reads_a_listed_file(self, model: Path) -> None:
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        with source.open(resolved, "config.json") as stream:
            assert json.load(stream) == CONFIG
            stream.seek(0)
            assert stream.read(1) == b"{"

    @pytest.mark.parametrize("path", ["README.md", "../v1/config.json", "/etc/passwd"])
    def test_nothing_else(self, model: Path, path: str) -> None:
        (model / "README.md").write_text("hello")
        source = LocalSource(model.parent)
        with pytest.raises(NotFound, match="not a file of revision"):
            source.open(source.resolve("v1"), path)

    def test_a_file_that_vanished(self, model: Path) -> None:
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        (model / "config.json").unlink()
        with pytest.raises(NotFound, match="Plan again"):
            source.open(resolved, "config.json")

    def test_a_file_that_became_a_link_out(self, model: Path) -> None:
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        (model / "config.json").unlink()
        (model / "config.json").symlink_to("/etc/passwd")
        with pytest.raises(BadInput, match="symbolic link"):
            source.open(resolved, "config.json")

    def test_a_file_that_became_a_folder(self, model: Path) -> None:
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        (model / "config.json").unlink()
        (model / "config.json").mkdir()
        with pytest.raises(Transient):
            source.open(resolved, "config.json")


class TestArchitecture:
    def test_is_read_through_the_source(self, model: Path) -> None:
        source = LocalSource(model.parent)
        architecture = read_architecture(source, source.resolve("v1"))
        assert architecture.config == CONFIG
        assert architecture.parameters == 12
        assert len(architecture.digest) == 64

    def test_infinity_in_a_configuration_has_a_digest(self, model: Path) -> None:
        text = json.dumps({**CONFIG, "time_step_limit": [0.0, float("inf")]})
        (model / "config.json").write_text(text)
        source = LocalSource(model.parent)
        assert len(read_architecture(source, source.resolve("v1")).digest) == 64

    def test_files_that_broke_since_then(self, model: Path) -> None:
        source = LocalSource(model.parent)
        resolved = source.resolve("v1")
        (model / "config.json").write_text("{")
        with pytest.raises(BadInput, match="not valid JSON"):
            read_architecture(source, resolved)


class TestFactory:
    def test_paths_start_from_the_spec(self, model: Path) -> None:
        source = open_source(
            LocalSpec(kind="local", path="source"),
            base=model.parent.parent,
            settings=Settings(home=Path("unused")),
        )
        assert source.resolve(None).revision == "v1"

    def test_paths_may_start_from_the_home(self, model: Path, tmp_path: Path) -> None:
        source = open_source(
            LocalSpec(kind="local", path="${TRAINYARD_HOME}/source"),
            base=tmp_path / "elsewhere",
            settings=Settings(home=model.parent.parent),
        )
        assert source.resolve(None).revision == "v1"

    def test_other_variables_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"unknown variable \$\{SECRET\}"):
            open_source(
                LocalSpec(kind="local", path="${SECRET}/x"),
                base=tmp_path,
                settings=Settings(home=tmp_path),
            )
