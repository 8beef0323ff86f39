"""Bundles that a team compiled before: judged like a compile's own, stored once, named truly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fake_neuron import NativeCache, Neff, put, write_nxdi
from tests.unit.sources.model_files import write_model
from tests.unit.steps.lane_bench import BenchLane
from tests.unit.yard import Silent
from typer.testing import CliRunner

from trainyard import cli
from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.plan import Plan, ReleaseRequest
from trainyard.errors import BadInput, Busy, Conflict, CorruptFile, NotFound, Refused
from trainyard.lanes import native_cache, nxdi_folder, registry
from trainyard.lanes.cpu import CpuLane
from trainyard.materialize import materialize_bundle
from trainyard.settings import Settings, get_settings
from trainyard.spec.model import Target
from trainyard.spec.neuron import NeuronSettings
from trainyard.steps import import_bundle as module
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.import_bundle import import_bundle
from trainyard.steps.plan import plan
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key
from trainyard.store.locks import acquire_lock

FILES = Path(__file__).parents[1] / "spec" / "files"
INIT = "init engine (profile, create kv cache, warmup model) took 4.10 s\n"


def compiled(folder: Path) -> Path:
    """Write the caches that a compile of lane `cpu` leaves, a half-written file among them."""
    for name, content in {
        "ab/cab.cpp": b"int x;",
        "ab/cab.so": b"\x7fELF code",
        "fxgraph/4e/f4e/p": b"graph",
        "xy/.7.tmp": b"half",
    }.items():
        put(folder / "inductor" / name, content)
    return folder


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> BenchLane:
    made = BenchLane()
    monkeypatch.setitem(registry._LANES, "cpu", made)
    return made


@pytest.fixture
def context(tmp_path: Path, lane: BenchLane) -> StepContext:
    """Return a context with a catalogue, a source of two revisions and an empty store."""
    shutil.copytree(FILES, tmp_path / "dags")
    settings = Settings(
        home=tmp_path / "home",
        catalogue=tmp_path / "dags" / "models",
        environments=tmp_path / "dags" / "environments.yaml",
        requested_by="somebody",
    )
    for revision in ("r1", "r2"):
        write_model(settings.home / "demo" / "models" / "adder" / revision, fill=len(revision))
    return StepContext(settings, FolderStore(settings.store_root), Silent(), tmp_path / "work")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return compiled(tmp_path / "team" / "cache")


def run(context: StepContext, folder: Path, **changes: Any) -> StepResult:
    wanted = {"model": "adder", "target": "cpu", "revision": None, **changes}
    return import_bundle(folder, context=context, **wanted)


def manifest_of(context: StepContext, result: StepResult) -> BundleManifest:
    return read_document(context.store, result.key, BundleManifest)


def bundles(context: StepContext) -> list[str]:
    return [entry.key for entry in context.store.list("bundles")]


class TestImport:
    def test_the_bundle_has_the_key_that_a_plan_gives_it(
        self, context: StepContext, folder: Path
    ) -> None:
        result = run(context, folder)
        made = plan(ReleaseRequest(model="adder"), context)
        planned = read_document(context.store, made.key, Plan).targets[0]
        assert result.key == bundle_manifest_key(planned.compile_key)
        manifest = manifest_of(context, result)
        assert manifest.key_inputs == planned.key_inputs
        assert manifest.toolchain == planned.toolchain
        assert manifest.digest == files_digest(manifest.files)
        assert [file.path for file in manifest.files] == [
            "inductor/ab/cab.cpp",
            "inductor/ab/cab.so",
            "inductor/fxgraph/4e/f4e/p",
        ]

    def test_the_manifest_says_that_it_was_imported_by_whom_and_from_where(
        self, context: StepContext, folder: Path
    ) -> None:
        manifest = manifest_of(context, run(context, folder))
        assert manifest.imported_from.startswith(f"{folder} on ")
        assert manifest.imported_from.endswith(", by somebody")
        assert manifest.provenance.requested_by == "somebody"
        assert manifest.provenance.inputs[0].startswith("plans/adder-")
        assert manifest.compile_s is None
        assert manifest.compiled_on == {}
        (dropped,) = manifest.dropped
        assert dropped.startswith("inductor/xy/.7.tmp: temporary")
        progress = context.progress
        assert isinstance(progress, Silent)
        assert f"Dropped {dropped}." in progress.said

    def test_without_a_name_the_login_stands_for_the_user(
        self, context: StepContext, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nobody = context.settings.model_copy(update={"requested_by": ""})
        monkeypatch.setattr("getpass.getuser", lambda: "ada")
        result = run(replace(context, settings=nobody), folder)
        assert manifest_of(context, result).imported_from.endswith(", by ada")

    def test_a_compile_finds_it_and_a_server_can_start_from_it(
        self, context: StepContext, folder: Path, lane: BenchLane, tmp_path: Path
    ) -> None:
        key = run(context, folder).key
        made = read_document(context.store, plan(ReleaseRequest(model="adder"), context).key, Plan)
        assert [step.exists for step in made.steps if step.step == "compile"] == [True]
        found = compile_bundle(made, "cpu", context)
        assert (found.key, found.reused) == (key, True)
        assert lane.starts == 0
        bundle = read_document(context.store, key, BundleManifest)
        cache = materialize_bundle(context.store, bundle, tmp_path / "server" / "cache")
        seen = lane.snapshot(cache)
        assert lane.prove_start(log=INIT, before=seen, after=seen, bundle=bundle).used_bundle

    def test_another_revision_of_the_architecture_has_the_same_bundle(
        self, context: StepContext, folder: Path
    ) -> None:
        first = run(context, folder)
        again = run(context, folder, revision="r2")
        assert (again.key, again.reused) == (first.key, True)

    def test_importing_twice_is_fine(self, context: StepContext, folder: Path) -> None:
        first = run(context, folder)
        before = {key: context.store.read(key).data for key in bundles(context)}
        again = run(context, folder)
        assert (first.reused, again.reused) == (False, True)
        assert {key: context.store.read(key).data for key in bundles(context)} == before
        moved = folder.rename(folder.with_name("moved"))
        assert run(context, moved).reused

    def test_what_a_cut_import_left_makes_room(
        self, context: StepContext, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upload = FolderStore.upload

        def cut(self: FolderStore, key: str, *rest: Any, **more: Any) -> Any:
            if key.endswith("cab.so"):
                raise KeyboardInterrupt
            return upload(self, key, *rest, **more)

        monkeypatch.setattr(FolderStore, "upload", cut)
        with pytest.raises(KeyboardInterrupt):
            run(context, folder)
        monkeypatch.setattr(FolderStore, "upload", upload)
        assert [key.rsplit("/", 1)[1] for key in bundles(context)] == ["cab.cpp"]
        (folder / "inductor" / "ab" / "cab.cpp").rename(folder / "inductor" / "ab" / "other.py")
        manifest = manifest_of(context, run(context, folder))
        stored = {key.split("/", 2)[2] for key in bundles(context)}
        assert stored == {"manifest.json", *(file.path for file in manifest.files)}
        assert "inductor/ab/cab.cpp" not in stored

    def test_a_file_in_the_manifests_place_is_left_behind(
        self, context: StepContext, folder: Path, monkeypatch: pytest.MonkeyPatch, lane: BenchLane
    ) -> None:
        put(folder / "manifest.json", b"{}")
        capture = CpuLane.capture

        def with_it(cache_dir: Path, target: Target | None = None) -> Any:
            files, dropped = capture(lane, cache_dir, target)
            return [*files, Path("manifest.json")], dropped

        monkeypatch.setattr(lane, "capture", with_it)
        manifest = manifest_of(context, run(context, folder))
        assert len(manifest.files) == 3
        assert "manifest.json: the name of a bundle's own manifest" in manifest.dropped


class TestRefused:
    def test_a_folder_that_is_not_there(self, context: StepContext, folder: Path) -> None:
        for missing in (folder / "nowhere", folder / "inductor" / "ab" / "cab.so"):
            with pytest.raises(NotFound, match="There is no folder"):
                run(context, missing)
        assert list(context.store.list("")) == []

    @pytest.mark.parametrize(
        ("changes", "word"),
        [({"model": "ader"}, "ader"), ({"target": "gpu"}, "gpu"), ({"revision": "r9"}, "r9")],
    )
    def test_a_request_that_cannot_be_planned(
        self, context: StepContext, folder: Path, changes: dict[str, str], word: str
    ) -> None:
        with pytest.raises(BadInput, match=word):
            run(context, folder, **changes)
        assert bundles(context) == []

    def test_a_folder_without_a_result(self, context: StepContext, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(Refused, match="no complete result") as caught:
            run(context, tmp_path / "empty")
        assert "lane cpu" in caught.value.hint
        assert bundles(context) == []

    def test_files_that_may_not_be_read(
        self, context: StepContext, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(path: Path) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(module, "hash_file", forbidden)
        with pytest.raises(BadInput, match=r"Cannot read .*Permission denied"):
            run(context, folder)

    def test_another_bundle_is_there_already(self, context: StepContext, folder: Path) -> None:
        key = run(context, folder).key
        before = context.store.read(key).data
        put(folder / "inductor" / "ab" / "cab.so", b"\x7fELF other code")
        put(folder / "inductor" / "new.py", b"more")
        with pytest.raises(Conflict, match=r"2 files differ \(inductor/ab/cab.so, inductor/new.py"):
            run(context, folder)
        assert context.store.read(key).data == before
        assert len(bundles(context)) == 4

    def test_a_stored_bundle_that_is_damaged(self, context: StepContext, folder: Path) -> None:
        key = run(context, folder).key
        context.store.delete(key.replace("manifest.json", "inductor/ab/cab.so"))
        with pytest.raises(BadInput, match="are missing or have another size"):
            run(context, folder)

    def test_a_file_that_changes_meanwhile(
        self, context: StepContext, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store_files = module.store_files

        def after_a_change(*arguments: Any) -> Any:
            put(folder / "inductor" / "ab" / "cab.cpp", b"int y;")
            return store_files(*arguments)

        monkeypatch.setattr(module, "store_files", after_a_change)
        with pytest.raises(CorruptFile, match="changed while they were imported"):
            run(context, folder)
        assert not [key for key in bundles(context) if key.endswith("manifest.json")]
        monkeypatch.undo()

    def test_somebody_who_compiles_the_same_is_not_disturbed(
        self, context: StepContext, folder: Path
    ) -> None:
        made = read_document(context.store, plan(ReleaseRequest(model="adder"), context).key, Plan)
        key = bundle_manifest_key(made.targets[0].compile_key)
        hasty = context.settings.model_copy(update={"step_lock_wait_s": 0.0})
        with (
            acquire_lock(context.store, key, work="compile", duration_s=60, wait_s=0),
            pytest.raises(Busy),
        ):
            run(replace(context, settings=hasty), folder)
        assert bundles(context) == []

    def test_nothing_is_stored_after_the_lock_was_lost(
        self, context: StepContext, folder: Path
    ) -> None:
        def lost() -> None:
            raise Busy("Another process took over.")

        with pytest.raises(Busy):
            run(replace(context, ensure_held=lost), folder)
        assert bundles(context) == []


Capture = Callable[[Path, Target | None], Any]


class TestNeuron:
    """What lanes that need a device capture, through the registered lane's place."""

    def lend(self, lane: BenchLane, monkeypatch: pytest.MonkeyPatch, capture: Capture) -> None:
        monkeypatch.setattr(lane, "capture", capture)

    def test_headers_versions_and_what_was_dropped_are_recorded(
        self,
        context: StepContext,
        lane: BenchLane,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        self.lend(lane, monkeypatch, lambda folder, _: native_cache.capture(folder, None))
        cache = NativeCache(tmp_path / "cache", neff=Neff(feature_bits=0x20))
        key, failed = cache.compile(0), cache.fail(1)
        manifest = manifest_of(context, run(context, cache.root))
        (record,) = manifest.neffs
        assert record.path == f"neuron/compile_cache/{key}/graph_{key}.neff"
        assert (record.lnc_size, record.version, record.feature_bits) == (2, "2.0", "0x20")
        assert manifest.recorded_versions == {"neuronx-cc": ("2.27.5334.0+b7b01d0a",)}
        assert manifest.dropped == (
            f"neuron/compile_cache/{failed}: the compiler failed (NCC_EVRF009)",
        )

    def test_another_compiler_than_the_targets_is_refused(
        self,
        context: StepContext,
        lane: BenchLane,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        self.lend(lane, monkeypatch, lambda folder, _: native_cache.capture(folder, None))
        lane.found = {"neuronx-cc": "2.28.7631.0"}
        cache = NativeCache(tmp_path / "cache")
        cache.compile()
        with pytest.raises(BadInput, match=r"neuronx-cc 2\.27\..* toolchain has 2\.28\.7631\.0"):
            run(context, cache.root)
        assert bundles(context) == []
        lane.found = {"neuronx-cc": "2.27.5334.0"}
        assert not run(context, cache.root).reused

    def test_a_model_compiled_for_something_else_is_refused_field_by_field(
        self,
        context: StepContext,
        lane: BenchLane,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        device = {"instance": "trn2.48xlarge", "neuron": NeuronSettings(sdk="2.31.1")}

        def on_a_device(folder: Path, target: Target | None) -> Any:
            assert target is not None
            return nxdi_folder.capture(folder, target.model_copy(update=device))

        self.lend(lane, monkeypatch, on_a_device)
        with pytest.raises(Refused, match=r"tp_degree was asked to be 1, .* says 8"):
            run(context, write_nxdi(tmp_path / "model"))
        write_nxdi(tmp_path / "model", tp_degree=1, seq_len=256)
        manifest = manifest_of(context, run(context, tmp_path / "model"))
        assert [file.path for file in manifest.files] == ["model.pt", "neuron_config.json"]


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, context: StepContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in ("home", "catalogue", "environments"):
            monkeypatch.setenv(f"TRAINYARD_{name.upper()}", str(getattr(context.settings, name)))
        get_settings.cache_clear()
        yield
        get_settings.cache_clear()

    def command(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["import-bundle", *arguments])
        return result.exit_code, " ".join(result.output.split())

    def test_it_imports_and_says_so(self, context: StepContext, folder: Path) -> None:
        arguments = (str(folder), "--model", "adder", "--target", "cpu", "--revision", "r2")
        code, text = self.command(*arguments)
        assert code == 0, text
        assert "Dropped inductor/xy/.7.tmp" in text
        assert "import-bundle: Imported 3 files, 0.0 MB; 1 entry was dropped. (made" in text
        code, text = self.command(*arguments)
        assert (code, "(found bundles/" in text) == (0, True)

    def test_a_refusal_has_its_exit_code(self, context: StepContext, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        code, text = self.command(str(tmp_path / "empty"), "--model", "adder", "--target", "cpu")
        assert code == Refused.exit_code
        assert "no complete result" in text


def test_manifests_of_older_versions_are_read(context: StepContext, folder: Path) -> None:
    result = run(context, folder)
    document = manifest_of(context, result).model_dump(mode="json", by_alias=True)
    for name in ("neffs", "recorded_versions", "compiled_on", "imported_from"):
        del document[name]
    document["compile_s"] = 31.5
    old = BundleManifest.model_validate(document)
    assert (old.neffs, old.compiled_on, old.compile_s) == ((), {}, 31.5)
