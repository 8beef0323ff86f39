"""Folders of NxD Inference: whole, made for what was asked, without a checkpoint's weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests import fake_neuron
from tests.fake_neuron import NEURON_CONFIG, Neff, put, torchscript, write_module, write_nxdi

from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput, Refused
from trainyard.lanes.expected import Expected, expected_of
from trainyard.lanes.neuron_nxdi import override_neuron_config
from trainyard.lanes.nxdi_folder import (
    archive_problems,
    capture,
    capture_expected,
    differences,
    misfits,
    prove_start,
    snapshot,
)
from trainyard.lanes.xla_cache import capture_modules
from trainyard.spec.model import Target
from trainyard.spec.neuron import NeuronSettings

ASKED = Expected(platform_target="trn2", lnc=2, cores=8, neuron_config=NEURON_CONFIG)
TARGET = Target(
    name="trn2",
    lane="neuron-nxdi",
    instance="trn2.48xlarge",
    tensor_parallel_size=8,
    max_num_seqs=16,
    block_size=32,
    neuron=NeuronSettings(sdk="2.31.1"),
)


def captured(folder: Path, expected: Expected = ASKED) -> tuple[list[str], list[str]]:
    files, dropped = capture_expected(folder, expected)
    return [path.as_posix() for path in files], list(dropped)


class TestCapture:
    @pytest.mark.parametrize("below", ["", "artifacts", "model/neuron-compiled-artifacts/ab12"])
    def test_the_folder_itself_or_one_that_holds_it(self, tmp_path: Path, below: str) -> None:
        write_nxdi(tmp_path / below)
        names = [f"{below}/{name}".lstrip("/") for name in ("model.pt", "neuron_config.json")]
        assert captured(tmp_path) == (names, [])

    def test_the_target_of_a_spec_is_what_was_asked(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path)
        assert len(capture(tmp_path, TARGET)[0]) == 2
        with pytest.raises(
            Refused, match=r"seq_len was asked to be 4096, neuron_config\.json says"
        ):
            capture(tmp_path, TARGET.model_copy(update={"max_model_len": 4096}))
        assert len(capture(tmp_path, None)[0]) == 2

    def test_every_difference_is_named_at_once(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path, tp_degree=4, torch_dtype="torch.float32", seq_len=4096)
        (tmp_path / "model.pt").unlink()
        with pytest.raises(Refused) as caught:
            captured(tmp_path)
        text = str(caught.value)
        assert "model.pt is missing." in text
        assert "tp_degree was asked to be 8, neuron_config.json says 4." in text
        assert 'torch_dtype was asked to be "bfloat16", neuron_config.json says "float32".' in text
        assert "seq_len was asked to be 2048, neuron_config.json says 4096." in text

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            (None, "missing"),
            ("{", "not valid JSON"),
            ("[]", "object"),
            ('{"neuron_config": 1}', ""),
        ],
    )
    def test_a_broken_configuration(self, tmp_path: Path, text: str | None, word: str) -> None:
        path = write_nxdi(tmp_path) / "neuron_config.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(Refused, match=rf"neuron_config\.json .*{word}"):
            captured(tmp_path)

    def test_two_models_are_too_many_and_none_too_few(self, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"There is no model\.pt"):
            captured(tmp_path)
        write_module(tmp_path)
        with pytest.raises(Refused, match="cache alone does not serve"):
            captured(tmp_path)
        write_nxdi(tmp_path / "a")
        write_nxdi(tmp_path / "b")
        with pytest.raises(Refused, match="2 compiled models: a, b"):
            captured(tmp_path)

    def test_neffs_beside_the_model_are_judged_too(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path)
        put(tmp_path / "good.neff", Neff().to_bytes())
        put(tmp_path / "cut.neff", Neff().to_bytes()[:1000])
        files, dropped = captured(tmp_path)
        assert files == ["good.neff", "model.pt", "neuron_config.json"]
        assert [line.split(":")[0] for line in dropped] == ["cut.neff"]

    def test_links_locks_leftovers_and_strangers_stay_behind(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path / "model")
        put(tmp_path / "model" / "model.pt.tmp.7", b"half")
        put(tmp_path / "model" / "x.lock", b"")
        put(tmp_path / "notes.txt", b"mine")
        (tmp_path / "model" / "link").symlink_to("/etc/hostname")
        assert captured(tmp_path) == (
            ["model/model.pt", "model/neuron_config.json"],
            [
                "model/link: a symbolic link",
                "model/model.pt.tmp.7: left by a write that was cut",
                "notes.txt: not part of the compiled model",
            ],
        )


class TestWeights:
    def test_weights_of_a_checkpoint_stay_behind(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path, shards=2)
        put(tmp_path / "model-00001.safetensors", b"weights")
        files, dropped = captured(tmp_path)
        assert files == ["model.pt", "neuron_config.json"]
        assert len(dropped) == 3
        assert all("weights of one checkpoint" in line for line in dropped)

    def test_shards_that_nobody_asked_for_are_refused(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path, shards=8, save_sharded_checkpoint=True)
        with pytest.raises(Refused, match="another one of its architecture would be served"):
            captured(tmp_path)

    def test_shards_that_were_asked_for_must_all_be_there(self, tmp_path: Path) -> None:
        asked = Expected(neuron_config={**NEURON_CONFIG, "save_sharded_checkpoint": True})
        write_nxdi(tmp_path, shards=7, save_sharded_checkpoint=True)
        with pytest.raises(Refused, match=r"weights/tp7_sharded_checkpoint\.safetensors is miss"):
            captured(tmp_path, asked)
        write_nxdi(tmp_path, shards=8, save_sharded_checkpoint=True)
        files, dropped = captured(tmp_path, asked)
        assert len(files) == 10
        assert dropped == []
        write_nxdi(tmp_path, save_sharded_checkpoint=True, tp_degree=None)
        with pytest.raises(Refused, match="no tp_degree"):
            captured(tmp_path, Expected())


class TestDifferences:
    def test_what_is_the_same_in_other_words_is_no_difference(self) -> None:
        asked = {"torch_dtype": "bfloat16", "buckets": (128, 256), "temperature": 1.0}
        found = {"torch_dtype": "torch.bfloat16", "buckets": [128, 256], "temperature": 1}
        assert differences(asked, {**found, "fused_qkv": True}) == []

    def test_true_is_not_one(self) -> None:
        assert differences({"fused_qkv": True}, {"fused_qkv": 1}) != []

    def test_a_field_that_is_missing_is_a_difference(self) -> None:
        assert differences({"seq_len": 128}, {}) == [
            "seq_len was asked to be 128, neuron_config.json says nothing."
        ]

    def test_inner_fields_are_compared_one_by_one(self) -> None:
        asked = {"on_device_sampling_config": {"top_k": 5, "do_sample": True}}
        assert differences(asked, NEURON_CONFIG) == [
            "on_device_sampling_config.top_k was asked to be 5, neuron_config.json says 1."
        ]

    def test_the_plugin_adds_one_empty_block(self) -> None:
        assert differences({"pa_num_blocks": 64}, {"pa_num_blocks": 65}) == []
        assert differences({"pa_num_blocks": 64}, {"pa_num_blocks": 66}) != []
        assert differences({"pa_block_size": 64}, {"pa_block_size": 65}) != []


class TestRestored:
    def test_what_was_compiled_for_the_target_has_no_problem(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path / "code", **expected_of(TARGET).neuron_config)
        assert misfits(tmp_path, TARGET) == ()

    def test_every_field_that_differs_is_named(self, tmp_path: Path) -> None:
        asked = expected_of(TARGET).neuron_config
        write_nxdi(tmp_path, **{**asked, "seq_len": 17, "tp_degree": 3})
        problems = misfits(tmp_path, TARGET)
        assert [problem.split()[0] for problem in problems] == ["seq_len", "tp_degree"]

    def test_a_folder_without_code_or_with_a_broken_configuration_is_one(
        self, tmp_path: Path
    ) -> None:
        assert "There is no model.pt" in misfits(tmp_path, TARGET)[0]
        write_nxdi(tmp_path)
        (tmp_path / "neuron_config.json").write_text("{")
        assert "is not valid JSON" in misfits(tmp_path, TARGET)[0]


class TestExpected:
    def target(self, **parts: Any) -> Target:
        return Target.model_validate({**TARGET.model_dump(), **parts})

    @pytest.mark.parametrize(
        ("instance", "family", "lnc"),
        [("inf2.48xlarge", "inf2", 1), ("trn1n.32xlarge", "trn1", 1), ("trn2.3xlarge", "trn2", 2)],
    )
    def test_the_instance_says_chip_and_lnc(self, instance: str, family: str, lnc: int) -> None:
        found = expected_of(self.target(instance=instance))
        assert (found.platform_target, found.lnc) == (family, lnc)
        assert found.neuron_config["logical_nc_config"] == lnc

    def test_a_target_without_a_device_is_refused(self) -> None:
        with pytest.raises(BadInput, match="has no Neuron device"):
            expected_of(self.target(instance="local"))

    def test_settings_of_neuron_targets_are_taken(self) -> None:
        found = expected_of(
            self.target(
                neuron={
                    "sdk": "2.31.1",
                    "lnc": 1,
                    "data_parallel_size": 2,
                    "num_gpu_blocks": 1024,
                },
                nxdi={
                    "override_neuron_config": {"fused_qkv": True, "pp_degree": 2},
                    "extra_neuron_config": {"new_key": 7},
                },
            )
        )
        assert (found.lnc, found.cores) == (1, 32)
        asked = found.neuron_config
        assert (asked["pa_num_blocks"], asked["fused_qkv"], asked["new_key"]) == (1024, True, 7)

    def test_without_prefix_caching_there_are_no_blocks(self) -> None:
        asked = expected_of(self.target(enable_prefix_caching=False)).neuron_config
        assert asked["is_block_kv_layout"] is False
        assert "pa_block_size" not in asked

    @pytest.mark.parametrize(
        ("caching", "override"), [(True, {}), (False, {"is_block_kv_layout": True})]
    )
    def test_blocks_are_compared_whenever_the_layout_is_in_blocks(
        self, tmp_path: Path, caching: bool, override: dict[str, Any]
    ) -> None:
        target = self.target(
            enable_prefix_caching=caching,
            neuron={"sdk": "2.31.1", "num_gpu_blocks": 1024},
            nxdi={"override_neuron_config": override},
        )
        blocks = {
            name: value
            for name, value in override_neuron_config(target).items()
            if name in ("is_block_kv_layout", "pa_block_size", "pa_num_blocks")
        }
        assert blocks == {"is_block_kv_layout": True, "pa_block_size": 32, "pa_num_blocks": 1024}
        asked = expected_of(target).neuron_config
        assert blocks.items() <= asked.items()
        write_nxdi(tmp_path, **{**asked, "pa_block_size": 64, "pa_num_blocks": 512})

        with pytest.raises(Refused) as caught:
            capture(tmp_path, target)

        text = str(caught.value)
        assert "pa_block_size was asked to be 32, neuron_config.json says 64." in text
        assert "pa_num_blocks was asked to be 1024, neuron_config.json says 512." in text

    def test_a_layout_that_is_not_in_blocks_has_no_blocks_to_compare(self) -> None:
        asked = expected_of(
            self.target(nxdi={"override_neuron_config": {"is_block_kv_layout": False}})
        ).neuron_config
        assert asked["is_block_kv_layout"] is False
        assert not {"pa_block_size", "pa_num_blocks"} & set(asked)


class Bomb:
    """Tells when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


class TestArchive:
    def test_a_whole_archive_has_no_problems_and_is_not_unpickled(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(torchscript(pickle.dumps(Bomb())))
        assert archive_problems(path) == []

    def test_an_archive_that_is_cut_anywhere_is_found(self, tmp_path: Path) -> None:
        path, whole = tmp_path / "model.pt", torchscript()
        for end in range(0, len(whole), 7):
            path.write_bytes(whole[:end])
            (problem,) = archive_problems(path)
            assert problem.startswith("model.pt is not a whole zip archive")

    def test_one_flipped_byte_in_a_member_is_found(self, tmp_path: Path) -> None:
        content = b"\x80\x02" + b"n" * 64
        whole = torchscript(content)
        path, begin = tmp_path / "model.pt", whole.index(content)
        for place in range(begin, begin + len(content)):
            data = bytearray(whole)
            data[place] ^= 1
            path.write_bytes(data)
            assert archive_problems(path) != []

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_one_flipped_bit_anywhere_is_named_or_changes_nothing(
        self, tmp_path: Path, method: int
    ) -> None:
        path, made = tmp_path / "model.pt", io.BytesIO()
        content = {"m/data.pkl": b"\x80\x02}.", "m/version": b"3\n", "m/code/x.py": b"x = 1\n" * 9}
        with zipfile.ZipFile(made, "w", method) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        whole, found = made.getvalue(), 0
        for bit in range(8 * len(whole)):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            problems = archive_problems(path)
            found += len(problems)
            if not problems:
                with zipfile.ZipFile(path) as archive:
                    assert {name: archive.read(name) for name in archive.namelist()} == content
            else:
                assert problems[0].startswith("model.pt is ")
                assert problems[0].endswith(".")
        # At least every bit of the names, which are there twice.
        assert found > 16 * sum(map(len, content))

    @pytest.mark.parametrize(
        "names", [["a/data.pkl"], ["a/data.pkl", "a/version"], ["data.pkl", "version", "code/x"]]
    )
    def test_another_zip_file_is_no_model(self, tmp_path: Path, names: list[str]) -> None:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        put(tmp_path / "model.pt", made.getvalue())
        assert "none of TorchScript" in archive_problems(tmp_path / "model.pt")[0]

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert archive_problems(tmp_path / "model.pt") == ["model.pt is missing."]


class TestPersistentCache:
    def test_only_graphs_that_were_compiled_are_taken(self, tmp_path: Path) -> None:
        states = ("done", "failed", "locked", "half", "empty")
        made = {state: write_module(tmp_path, n, state=state) for n, state in enumerate(states)}
        files, dropped = capture_modules(tmp_path, ASKED)
        assert {(tmp_path / path).parent for path in files} == {made["done"]}
        assert {path.name for path in files} == {
            "model.hlo_module.pb",
            "compile_flags.json",
            "model.neff",
            "model.done",
        }
        reasons = {
            made_.name: line.split(": ", 1)[1]
            for made_ in made.values()
            for line in dropped
            if made_.name in line
        }
        assert "NCC_ITEN404" in reasons[made["failed"].name]
        assert reasons[made["locked"].name].startswith("locked")
        assert reasons[made["half"].name].startswith("half-written")
        assert reasons[made["empty"].name].startswith("empty")

    def test_a_lock_beside_a_finished_graph_is_left_behind(self, tmp_path: Path) -> None:
        put(write_module(tmp_path) / "model.hlo_module.pb.lock", b"")
        files, dropped = capture_modules(tmp_path, ASKED)
        assert not [path for path in files if path.suffix == ".lock"]
        assert dropped == []

    def test_a_mark_without_its_neff_and_neffs_that_do_not_fit(self, tmp_path: Path) -> None:
        (write_module(tmp_path, 0) / "model.neff").unlink()
        write_module(tmp_path, 1, neff=Neff(lnc_size=1))
        write_module(tmp_path, 2, neff=Neff(header_size=0))
        files, dropped = capture_modules(tmp_path, ASKED)
        assert files == []
        text = "\n".join(dropped)
        assert all(word in text for word in ("holds no model.neff", "lnc_size", "header_size"))

    def test_it_goes_along_with_the_model(self, tmp_path: Path) -> None:
        write_nxdi(tmp_path / "model")
        write_module(tmp_path / "cache", 0)
        write_module(tmp_path / "cache", 1, state="failed")
        files, dropped = captured(tmp_path)
        assert len(files) == 6
        assert len(dropped) == 1


def bundle(folder: Path) -> BundleManifest:
    files = tuple(
        FileEntry(path=path, size=1, sha256="0" * 64) for path in captured(folder, Expected())[0]
    )
    return BundleManifest(
        compile_key="k",
        lane="neuron-nxdi",
        key_inputs={},
        files=files,
        digest=files_digest(files),
        toolchain={},
        compile_s=900.0,
    )


class TestStart:
    LOG = fake_neuron.LOADED.format(folder="/x") + fake_neuron.READY

    def test_a_start_that_loads_and_writes_nothing_used_its_bundle(self, tmp_path: Path) -> None:
        made = bundle(write_nxdi(tmp_path))
        before = snapshot(tmp_path)
        put(tmp_path / "x.lock", b"")
        proof = prove_start(log=self.LOG, before=before, after=snapshot(tmp_path), bundle=made)
        assert proof.used_bundle
        assert proof.engine_init_s == 41.5

    @pytest.mark.parametrize("name", ["model.pt", "weights/tp0_sharded_checkpoint.safetensors"])
    def test_a_file_that_is_new_or_changed_is_a_compile(self, tmp_path: Path, name: str) -> None:
        made = bundle(write_nxdi(tmp_path))
        before = snapshot(tmp_path)
        put(tmp_path / name, b"another content")
        proof = prove_start(log=self.LOG, before=before, after=snapshot(tmp_path), bundle=made)
        assert not proof.used_bundle
        assert proof.new_files == (name,)

    @pytest.mark.parametrize(
        "line",
        [
            fake_neuron.NOT_FOUND.format(folder="/x"),
            "INFO Generating HLOs for the following models: ['context_encoding_model']\n",
            "INFO ||NEURON_CC_WRAPPER||: Call compiler with cmd: neuronx-cc compile\n",
        ],
    )
    def test_a_log_that_tells_of_a_compile(self, tmp_path: Path, line: str) -> None:
        made = bundle(write_nxdi(tmp_path))
        seen = snapshot(tmp_path)
        proof = prove_start(log=line + self.LOG, before=seen, after=seen, bundle=made)
        assert not proof.used_bundle
        assert "its log says" in proof.reason

    def test_without_bundle_word_or_file_nothing_is_proven(self, tmp_path: Path) -> None:
        made = bundle(write_nxdi(tmp_path))
        seen = snapshot(tmp_path)
        for log, before, kept in (
            (self.LOG, seen, None),
            (fake_neuron.READY, seen, made),
            (self.LOG, frozenset[str](), made),
        ):
            proof = prove_start(log=log, before=before, after=before, bundle=kept)
            assert not proof.used_bundle
            assert proof.reason.endswith(".")


def test_the_configuration_is_found_in_either_form(tmp_path: Path) -> None:
    folder = write_nxdi(tmp_path)
    put(folder / "neuron_config.json", json.dumps(dict(NEURON_CONFIG)).encode())
    assert len(captured(folder)[0]) == 2
