"""The folder of lane `neuron-nxdi`: what of it becomes a bundle, and was it used.

NxD Inference compiles ahead of time into one folder::

    model.pt                                       TorchScript with the NEFFs in it
    neuron_config.json                             what it was compiled for
    weights/tp<rank>_sharded_checkpoint.safetensors  only if the shards were asked for

The server loads such a folder whatever it was told itself: its own arguments are then ignored, and
nothing warns. So every field that was asked for is compared here. The weights of a checkpoint are
no part of a bundle, unless they were asked for: another checkpoint of the same architecture would
be served with them. A persistent cache of libneuronxla may lie beside the folder (`xla_cache`).
"""

from __future__ import annotations

import json
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.documents.artifacts import BundleManifest
from trainyard.errors import Refused
from trainyard.lanes import neff
from trainyard.lanes.cache_files import (
    changed,
    engine_init_s,
    files_below,
    is_leftover,
    is_lock,
    links_below,
    look,
    missing,
)
from trainyard.lanes.expected import Expected, expected_of, neff_defect
from trainyard.lanes.protocol import StartProof
from trainyard.lanes.without_compiler import MESSAGE as NO_COMPILER
from trainyard.lanes.xla_cache import capture_modules, module_folders
from trainyard.spec.model import Target

MODEL = "model.pt"
CONFIG = "neuron_config.json"
WEIGHTS = "weights"
SAVE_SHARDS = "save_sharded_checkpoint"

_CHUNK_BYTES = 1 << 20
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
    OverflowError,
)
"""What `zipfile` raises over a flipped bit: in a flag (encrypted), a method, a size, the data."""
_ABSENT = "nothing"

_LOADED = re.compile(r"[Ss]uccessfully loaded pre-?compiled model artifacts")
_COMPILES = re.compile(
    r"Unable to find pre-?compiled artifacts|Recompiling\.\.\.|Call compiler with cmd|"
    r"Generating HLOs? for"
)
"""What plugin, NxD Inference and libneuronxla write when they compile."""


def capture(cache_dir: Path, target: Target | None) -> tuple[Sequence[Path], Sequence[str]]:
    """Return the files of a bundle, and what was dropped and why.

    Args:
        cache_dir: the folder of the compiled model, or a folder that holds it; only read.
        target: what it was compiled for; None: `neuron_config.json` is not compared.

    Returns:
        Paths relative to `cache_dir`, sorted; sentences that begin with what was dropped.

    Raises:
        Refused: there is not exactly one compiled model, it is not whole, or it was compiled for
            something else; the message names every difference.
    """
    return capture_expected(cache_dir, expected_of(target))


def capture_expected(cache_dir: Path, expected: Expected) -> tuple[Sequence[Path], Sequence[str]]:
    """As `capture`, for what is expected of the code."""
    folder = _model_folder(cache_dir)
    problems = archive_problems(folder / MODEL)
    config = _read_config(folder / CONFIG)
    if isinstance(config, str):
        problems.append(config)
        config = {}
    else:
        problems += differences(expected.neuron_config, config)
        problems += _shard_problems(folder, expected, config)
    if problems:
        listed = f" {problems[0]}" if len(problems) == 1 else "\n  " + "\n  ".join(problems)
        raise Refused(
            f"The compiled model in {folder} cannot be used:{listed}",
            hint="Compile it again for this target, or import it for the target that it was "
            "compiled for.",
        )
    kept, dropped = _sorted_out(
        cache_dir, folder, expected, with_shards=bool(config.get(SAVE_SHARDS))
    )
    modules, failed = capture_modules(cache_dir, expected)
    return sorted({*kept, *modules}), sorted({*dropped, *failed})


def misfits(cache_dir: Path, target: Target) -> tuple[str, ...]:
    """Return every field that was compiled in otherwise than `target` asks, each as a sentence.

    Of the compiled model itself only its presence is looked at.
    """
    try:
        folder = _model_folder(cache_dir)
    except Refused as error:
        return (error.message,)
    config = _read_config(folder / CONFIG)
    if isinstance(config, str):
        return (config,)
    expected = expected_of(target)
    absent = [] if (folder / MODEL).is_file() else [f"{MODEL} is missing."]
    return (
        *absent,
        *differences(expected.neuron_config, config),
        *_shard_problems(folder, expected, config),
    )


def differences(
    asked: Mapping[str, Any], found: Mapping[str, Any], *, inside: str = ""
) -> list[str]:
    """Return a sentence for every field that was compiled in otherwise than asked.

    Args:
        asked: fields by name; what is not named may be anything.
        found: the fields of `neuron_config.json`.
        inside: the name of the field that these are fields of, with a dot.
    """
    sentences: list[str] = []
    for name in sorted(asked):
        wanted, has = asked[name], found.get(name)
        if isinstance(wanted, Mapping) and isinstance(has, Mapping):
            sentences += differences(wanted, has, inside=f"{inside}{name}.")
        elif _shown(wanted) != _shown(has) and not _one_more(name, wanted, has):
            sentences.append(
                f"{inside}{name} was asked to be {_shown(wanted)}, {CONFIG} says {_shown(has)}."
            )
    return sentences


def archive_problems(path: Path) -> list[str]:
    """Return why a file is not a whole TorchScript archive; nothing in it is unpickled or run."""
    if not path.is_file() or path.is_symlink():
        return [f"{path.name} is missing."]
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                # Reading to the end compares the member's checksum.
                with archive.open(name) as member:
                    while member.read(_CHUNK_BYTES):
                        pass
    except _BROKEN_ZIP as error:
        return [f"{path.name} is not a whole zip archive: {str(error) or type(error).__name__}."]
    tops = {name.split("/", 1)[0] for name in names}
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    absent = [name for name in ("data.pkl", "version") if name not in inside]
    if len(tops) != 1 or absent or not any(name.startswith("code/") for name in inside):
        return [
            f"{path.name} is a zip archive, but none of TorchScript: it lacks "
            f"{', '.join(absent) or 'code/'}."
        ]
    return []


def snapshot(cache_dir: Path) -> frozenset[str]:
    """Return `<path>|<bytes>|<time of change>` for every file below `cache_dir` but locks."""
    return frozenset(
        look(cache_dir, path) for path in files_below(cache_dir) if not is_lock(path.name)
    )


def missed(log: str) -> str:
    """Return the sentence about a start that called the compiler and found none, or nothing."""
    if NO_COMPILER not in log:
        return ""
    return "The start called the compiler, because the compiled model could not be loaded."


def prove_start(
    *,
    log: str,
    before: frozenset[str],
    after: frozenset[str],
    bundle: BundleManifest | None,
) -> StartProof:
    """Judge whether a start used its bundle.

    It did if all files of the bundle were there before, no file was written or added, and the log
    says that the compiled model was loaded and not that anything was compiled.
    """
    written = changed(before, after)
    seconds = engine_init_s(log)

    def verdict(used: bool, reason: str) -> StartProof:
        return StartProof(used, reason, seconds, written)

    if bundle is None:
        return verdict(False, "There was no bundle to start from.")
    absent = missing(bundle, before, [file.path for file in bundle.files])
    if absent:
        return verdict(False, absent)
    compiles = _COMPILES.search(log)
    if compiles:
        return verdict(False, f"The server compiled; its log says {compiles[0]!r}.")
    if written:
        return verdict(
            False, f"The server compiled: {len(written)} new files, such as {written[0]}."
        )
    if not _LOADED.search(log):
        return verdict(False, "The log does not say that the compiled model was loaded.")
    ready = f", and the engine was ready in {seconds:.1f} s" if seconds is not None else ""
    return verdict(True, f"The compiled model was loaded, no file is new{ready}.")


def _model_folder(cache_dir: Path) -> Path:
    """Return the one folder that holds a compiled model, or a part of one."""
    found = sorted(
        {
            path.parent
            for path in files_below(cache_dir)
            if path.name in (MODEL, CONFIG) and not is_leftover(path.parent.name)
        }
    )
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(folder.relative_to(cache_dir).as_posix() for folder in found)
        raise Refused(
            f"{cache_dir} holds {len(found)} compiled models: {listed}.",
            hint="Name the folder of one of them.",
        )
    also = " A compiler's cache alone does not serve." if module_folders(cache_dir) else ""
    raise Refused(
        f"There is no {MODEL} with its {CONFIG} in {cache_dir}.{also}",
        hint="Look at the log of the compile, then compile again.",
    )


def _read_config(path: Path) -> dict[str, Any] | str:
    """Return the fields that were compiled in, or what is wrong with the file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        return f"{CONFIG} is missing."
    except (ValueError, RecursionError) as error:
        return f"{CONFIG} is not valid JSON: {error}."
    if not isinstance(content, dict):
        return f"{CONFIG} is not a JSON object."
    # NxD Inference writes the model's own configuration around these fields.
    inner = content.get("neuron_config", content)
    return inner if isinstance(inner, dict) else f"{CONFIG} has no fields in neuron_config."


def _shard_problems(folder: Path, expected: Expected, config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the shards of a model that loads its weights from them."""
    if not config.get(SAVE_SHARDS):
        return []
    if expected.neuron_config and not expected.neuron_config.get(SAVE_SHARDS):
        return [
            f"{SAVE_SHARDS} was not asked for, {CONFIG} says true: the folder holds the weights "
            "of one checkpoint, and another one of its architecture would be served with them."
        ]
    ranks = config.get("tp_degree")
    if not isinstance(ranks, int):
        return [f"{CONFIG} has no tp_degree, which says how many shards there are."]
    absent = [name for name in map(_shard, range(ranks)) if not (folder / WEIGHTS / name).is_file()]
    return [f"{WEIGHTS}/{name} is missing." for name in absent]


def _shard(rank: int) -> str:
    return f"tp{rank}_sharded_checkpoint.safetensors"


def _sorted_out(
    cache_dir: Path, folder: Path, expected: Expected, *, with_shards: bool
) -> tuple[list[Path], list[str]]:
    """Return the files of the compiled model, and what lies there and is none."""
    kept: list[Path] = []
    dropped = [
        f"{path.relative_to(cache_dir).as_posix()}: a symbolic link"
        for path in links_below(cache_dir)
    ]
    modules = set(module_folders(cache_dir))
    for path in files_below(cache_dir):
        if is_lock(path.name) or modules.intersection(path.parents):
            continue
        relative = path.relative_to(cache_dir)
        reason = _no_part(path.relative_to(folder) if path.is_relative_to(folder) else None)
        if reason == WEIGHTS and with_shards:
            reason = ""
        elif reason == WEIGHTS:
            reason = "weights of one checkpoint, which the server loads from the model itself"
        elif not reason and path.suffix == neff.SUFFIX:
            reason = neff_defect(path, expected)
        if reason:
            dropped.append(f"{relative.as_posix()}: {reason}")
        else:
            kept.append(relative)
    return kept, dropped


def _no_part(inside: Path | None) -> str:
    """Return why a file is no part of the compiled model, `weights` for its weights.

    Args:
        inside: its path in the model's folder; None: it lies elsewhere.
    """
    if inside is None:
        return "not part of the compiled model"
    if any(is_leftover(part) for part in inside.parts):
        return "left by a write that was cut"
    if inside.parts[0] == WEIGHTS or inside.suffix == ".safetensors":
        return WEIGHTS
    return ""


def _one_more(name: str, wanted: Any, has: Any) -> bool:
    """Tell whether the difference is the empty block that the plugin adds to those asked for."""
    numbers = type(wanted) is int and type(has) is int
    return name == "pa_num_blocks" and numbers and has == wanted + 1


def _shown(value: Any) -> str:
    """Return a value as it is compared and shown: `torch.bfloat16` is `bfloat16`, 1.0 is 1."""
    return _ABSENT if value is None else json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    match value:
        case str():
            return value.removeprefix("torch.")
        case float() if value.is_integer():
            return int(value)
        case list() | tuple():
            return [_plain(each) for each in value]
        case Mapping():
            return {str(name): _plain(each) for name, each in value.items()}
    return value
