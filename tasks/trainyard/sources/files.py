"""Which files of a model are loaded, which are refused, and whether they fit together.

Only safetensors and known text files are loaded. Pickles run code when they are opened and code
files speak for themselves: both are refused wherever they lie in the model's top folder, because
libraries choose by file name what they open. Other files (READMEs, images, other formats) and
subfolders are left where they are: nothing loads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from trainyard.errors import BadInput, CorruptFile
from trainyard.sources.architecture import Tensor, architecture_digest, parameters
from trainyard.sources.protocol import ResolvedRevision, Source, SourceFile
from trainyard.sources.safetensors_header import read_header

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
WEIGHTS_SUFFIX = ".safetensors"

RESERVED = "manifest.json"
"""Trainyard's own name in a stored checkpoint; no library loads such a file of a model."""

TEXT_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model", ".tiktoken"})
"""Configuration, vocabularies, merges, chat templates, tokenizer models."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".dll", ".dylib", ".sh"})

MAX_TEXT_BYTES = 256 << 20
"""A text file larger than this is refused; the largest tokenizers have some 30 MB."""


@dataclass(frozen=True)
class Architecture:
    """What a revision's configuration and headers say."""

    config: Mapping[str, Any]
    """config.json."""
    tensors: tuple[Tensor, ...]
    """Of all shards that are loaded, sorted by name."""

    @property
    def digest(self) -> str:
        """The architecture digest, part of every compile key."""
        return architecture_digest(self.config, self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return parameters(self.tensors)


@dataclass(frozen=True)
class Inspection:
    """What was found in a revision."""

    files: tuple[SourceFile, ...]
    """The files that are loaded, sorted by path."""
    architecture: Architecture | None
    """None if there are problems."""
    problems: tuple[str, ...]
    """Each says what is wrong and what to do."""


Opener = Callable[[str], BinaryIO]


def inspect_files(listing: Iterable[SourceFile], open_file: Opener) -> Inspection:
    """Judge the files of one revision.

    Args:
        listing: every file of the revision.
        open_file: opens one of them by its path.
    """
    everything = sorted(listing, key=lambda file: file.path)
    if not everything:
        return Inspection((), None, ("the folder is empty",))
    problems = _refused(everything)
    files = {file.path: file for file in everything if _is_loaded(file.path)}
    documents = _read_documents(files, open_file, problems)
    config = documents.get(CONFIG)
    if isinstance(config, dict) and not config.get("architectures"):
        problems.append(f"{CONFIG} names no architecture; its key `architectures` is missing")
    shards = _shards(files, documents.get(INDEX), problems)
    tensors = _read_tensors(shards, documents.get(INDEX), open_file, problems)
    chosen = tuple(
        file for path, file in files.items() if not path.endswith(WEIGHTS_SUFFIX) or file in shards
    )
    if problems or not isinstance(config, dict):
        return Inspection(chosen, None, tuple(problems))
    return Inspection(chosen, Architecture(config, tuple(sorted(tensors))), ())


def read_architecture(source: Source, resolved: ResolvedRevision) -> Architecture:
    """Return the architecture of a resolved revision.

    Raises:
        BadInput: the files do not fit together any more.
        NotFound, Transient: as `Source.open`.
    """
    found = inspect_files(resolved.files, lambda path: source.open(resolved, path))
    if found.architecture is None:
        raise unusable(resolved.revision, resolved.uri, found.problems)
    return found.architecture


def unusable(revision: str, uri: str, problems: Sequence[str]) -> BadInput:
    """Return the error that names all problems of a revision at once."""
    return BadInput(
        f"Revision {revision!r} in {uri} cannot be used: {'; '.join(problems)}.",
        hint="Correct the files, then plan again."
        if len(problems) == 1
        else f"Correct all {len(problems)} problems, then plan again.",
    )


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _is_loaded(path: str) -> bool:
    if "/" in path or path.startswith(".") or path == RESERVED:
        return False
    return path.endswith(WEIGHTS_SUFFIX) or _suffix(path) in TEXT_SUFFIXES


def _refused(files: Sequence[SourceFile]) -> list[str]:
    top = [file.path for file in files if "/" not in file.path]
    problems = []
    if pickles := [path for path in top if _suffix(path) in PICKLE_SUFFIXES]:
        problems.append(
            f"pickle files are never loaded ({', '.join(pickles)}): convert weights to safetensors "
            "(`save_pretrained(..., safe_serialization=True)`) and remove the pickles"
        )
    if code := [path for path in top if _suffix(path) in CODE_SUFFIXES]:
        problems.append(
            f"code is never loaded ({', '.join(code)}): use an architecture that vLLM brings, "
            "and remove these files"
        )
    return problems


def _read_documents(
    files: Mapping[str, SourceFile], open_file: Opener, problems: list[str]
) -> dict[str, Any]:
    """Read all JSON files, and note those that are missing or broken."""
    for required in (CONFIG, TOKENIZER):
        if required not in files:
            problems.append(f"{required} is missing")
    documents: dict[str, Any] = {}
    for path, file in files.items():
        if path.endswith(WEIGHTS_SUFFIX):
            continue
        if file.size > MAX_TEXT_BYTES:
            problems.append(f"{path} has {file.size} bytes, too many for a text file")
        elif path.endswith(".json"):
            with open_file(path) as stream:
                data = stream.read(MAX_TEXT_BYTES + 1)
            try:
                # Infinity and NaN occur in real configurations; as text they have a digest.
                documents[path] = json.loads(data, parse_constant=str)
            except (ValueError, RecursionError) as error:
                problems.append(f"{path} is not valid JSON ({error})")
    for path in (CONFIG, TOKENIZER):
        if path in documents and not isinstance(documents[path], dict):
            problems.append(f"{path} holds no JSON object")
    return documents


def _shards(
    files: Mapping[str, SourceFile], index: Any, problems: list[str]
) -> tuple[SourceFile, ...]:
    """Return the weight files that are loaded: those of the index, or all if there is none."""
    weights = {path: file for path, file in files.items() if path.endswith(WEIGHTS_SUFFIX)}
    if INDEX not in files or index is None:
        if not weights:
            problems.append(
                "there is no *.safetensors file: convert the weights "
                "(`save_pretrained(..., safe_serialization=True)`)"
            )
        return tuple(weights.values())
    names = _weight_map(index)
    if names is None:
        problems.append(f"{INDEX} has no usable `weight_map`: export the model again")
        return tuple(weights.values())
    wanted = sorted(set(names.values()))
    if missing := [name for name in wanted if name not in weights]:
        problems.append(f"{INDEX} names files that are missing ({', '.join(missing)}): copy them")
    return tuple(weights[name] for name in wanted if name in weights)


def _weight_map(index: Any) -> dict[str, str] | None:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(names, dict) and names and all(isinstance(n, str) for n in names.values()):
        return names
    return None


def _read_tensors(
    shards: Sequence[SourceFile], index: Any, open_file: Opener, problems: list[str]
) -> list[Tensor]:
    place: dict[str, str] = {}
    tensors: list[Tensor] = []
    broken: set[str] = set()
    for shard in shards:
        try:
            with open_file(shard.path) as stream:
                header = read_header(stream, size=shard.size, name=shard.path)
        except CorruptFile as error:
            broken.add(shard.path)
            problems.append(f"{error.message.rstrip('.')}: copy or export the file again")
            continue
        if twice := [t.name for t in header.tensors if t.name in place]:
            problems.append(
                f"{shard.path} and {place[twice[0]]} both hold {_some(twice)}: keep one of them"
            )
        place.update((t.name, shard.path) for t in header.tensors)
        tensors.extend(header.tensors)
    if shards and not broken and not tensors:
        problems.append("the *.safetensors files hold no tensors")
    named = {
        tensor: shard
        for tensor, shard in (_weight_map(index) or {}).items()
        if shard not in broken and any(shard == s.path for s in shards)
    }
    if wrong := [tensor for tensor, shard in named.items() if place.get(tensor) != shard]:
        problems.append(f"{INDEX} names tensors that its files lack ({_some(wrong)}): export again")
    return tensors


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
