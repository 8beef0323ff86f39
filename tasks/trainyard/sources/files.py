"""Which files of a model are loaded, which are refused, and whether they fit together.

Only safetensors and known text files are loaded. Pickles run code when they are opened and code
files speak for themselves: both are refused wherever they lie in the model's top folder, because
libraries choose by file name what they open. A spec may allow single ones by their exact names.
Other files (READMEs, images, other formats) and subfolders are left where they are: nothing loads
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

from trainyard.errors import BadInput, CorruptFile
from trainyard.sources.architecture import Tensor, architecture_digest, parameters
from trainyard.sources.names import collision_problems, name_problems
from trainyard.sources.protocol import ResolvedRevision, Source, SourceFile
from trainyard.sources.safetensors_header import MAX_HEADER_BYTES, Header, read_header

T = TypeVar("T")

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

HEAD_BYTES = 128 << 10
"""Fetched of each weight file at first; most headers are shorter."""

READERS = 8
"""Files that are read at the same time: behind a network each takes several round trips."""


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
    allowed: tuple[str, ...] = ()
    """Those of the files that only the spec's permission lets in."""


OpenRange = Callable[[SourceFile, int, int], BinaryIO]
"""Opens a range of a file: its first byte and its size in bytes."""


def inspect_files(
    listing: Iterable[SourceFile],
    open_range: OpenRange,
    *,
    allow_files: Collection[str] = (),
    leave_out: str = "remove them",
) -> Inspection:
    """Judge the files of one revision.

    Args:
        listing: every file of the revision.
        open_range: reads of them. Of weight files only the headers are read.
        allow_files: exact names of code or pickles that are let in.
        leave_out: how others are kept out of this source, for messages.
    """
    everything = sorted(listing, key=lambda file: file.path)
    if not everything:
        return Inspection((), None, ("the folder is empty",))
    if misnamed := name_problems(file.path for file in everything):
        return Inspection((), None, tuple(misnamed))
    problems = _refused(everything, allow_files, leave_out)
    files = {
        file.path: file
        for file in everything
        if _is_loaded(file.path) or (file.path in allow_files and file.path != RESERVED)
    }
    problems += collision_problems(files)
    documents = _read_documents(files, open_range, problems)
    config = documents.get(CONFIG)
    if isinstance(config, dict) and not config.get("architectures"):
        problems.append(f"{CONFIG} names no architecture; its key `architectures` is missing")
    shards = _shards(files, documents.get(INDEX), problems)
    tensors = _read_tensors(shards, documents.get(INDEX), open_range, problems)
    chosen = tuple(
        file for path, file in files.items() if not path.endswith(WEIGHTS_SUFFIX) or file in shards
    )
    allowed = tuple(file.path for file in chosen if not _is_loaded(file.path))
    if problems or not isinstance(config, dict):
        return Inspection(chosen, None, tuple(problems), allowed)
    return Inspection(chosen, Architecture(config, tuple(sorted(tensors))), (), allowed)


def read_architecture(source: Source, resolved: ResolvedRevision) -> Architecture:
    """Return the architecture of a resolved revision.

    Raises:
        BadInput: the files do not fit together any more.
        NotFound, Transient: as `Source.open`.
    """
    found = inspect_files(
        resolved.files,
        lambda file, start, size: source.open_range(resolved, file.path, start, size),
        allow_files=resolved.allowed,
    )
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


def _refused(
    files: Sequence[SourceFile], allow_files: Collection[str], leave_out: str
) -> list[str]:
    top = [file.path for file in files if "/" not in file.path]
    problems = []
    strangers = [path for path in top if path not in allow_files]
    if pickles := [path for path in strangers if _suffix(path) in PICKLE_SUFFIXES]:
        problems.append(
            f"pickle files are never loaded ({', '.join(pickles)}): convert weights to safetensors "
            f"(`save_pretrained(..., safe_serialization=True)`) and {leave_out}, or name them in "
            "`allow_files`"
        )
    if code := [path for path in strangers if _suffix(path) in CODE_SUFFIXES]:
        problems.append(
            f"code is never loaded ({', '.join(code)}): use an architecture that vLLM brings and "
            f"{leave_out}, or name them in `allow_files`"
        )
    if absent := sorted(set(allow_files) - set(top)):
        problems.append(f"`allow_files` names what is not there ({', '.join(absent)})")
    return problems


def _read_documents(
    files: Mapping[str, SourceFile], open_range: OpenRange, problems: list[str]
) -> dict[str, Any]:
    """Read all JSON files, and note those that are missing or broken."""
    for required in (CONFIG, TOKENIZER):
        if required not in files:
            problems.append(f"{required} is missing")
    texts = [file for path, file in files.items() if _suffix(path) in TEXT_SUFFIXES]
    for file in texts:
        if file.size > MAX_TEXT_BYTES:
            problems.append(f"{file.path} has {file.size} bytes, too many for a text file")

    def read(file: SourceFile) -> bytes:
        with open_range(file, 0, file.size) as stream:
            return stream.read()

    documents: dict[str, Any] = {}
    wanted = [f for f in texts if f.path.endswith(".json") and f.size <= MAX_TEXT_BYTES]
    for file, data in zip(wanted, _each(read, wanted), strict=True):
        try:
            # Infinity and NaN occur in real configurations; as text they have a digest.
            documents[file.path] = json.loads(data, parse_constant=str)
        except (ValueError, RecursionError) as error:
            problems.append(f"{file.path} is not valid JSON ({error})")
    _judge_documents(documents, problems)
    return documents


def _judge_documents(documents: dict[str, Any], problems: list[str]) -> None:
    """Note what cannot be used; what must not even be quoted is taken out."""
    for path in (CONFIG, INDEX):
        if why := _why_without_digest(documents.get(path)):
            problems.append(f"{path} holds what no other program can read ({why}): correct it")
            del documents[path]
    for path in (CONFIG, TOKENIZER):
        if path in documents and not isinstance(documents[path], dict):
            problems.append(f"{path} holds no JSON object")


def _why_without_digest(document: Any) -> str:
    """Return why a document has no digest, such as a number like 1e400 or half a character."""
    try:
        architecture_digest({"document": document}, ())
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


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
    shards: Sequence[SourceFile], index: Any, open_range: OpenRange, problems: list[str]
) -> list[Tensor]:
    place: dict[str, str] = {}
    tensors: list[Tensor] = []
    broken: set[str] = set()

    def read(shard: SourceFile) -> Header | CorruptFile:
        try:
            return _read_header(shard, open_range)
        except CorruptFile as error:
            return error

    for shard, header in zip(shards, _each(read, shards), strict=True):
        if isinstance(header, CorruptFile):
            broken.add(shard.path)
            problems.append(f"{header.message.rstrip('.')}: copy or export the file again")
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


def _read_header(shard: SourceFile, open_range: OpenRange) -> Header:
    """Read the header of a weight file, and none of its tensors beyond a first guess."""
    with open_range(shard, 0, min(shard.size, HEAD_BYTES)) as stream:
        head = stream.read()
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < length <= min(shard.size, MAX_HEADER_BYTES):
        with open_range(shard, len(head), length - len(head)) as stream:
            head += stream.read()
    return read_header(io.BytesIO(head), size=shard.size, name=shard.path)


def _each(work: Callable[[SourceFile], T], files: Sequence[SourceFile]) -> list[T]:
    """Return what `work` makes of each file; several at a time, because most of it is waiting."""
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="inspect")
    try:
        return list(pool.map(work, files))
    finally:
        # After an error, or a wish to stop this step, nobody waits for those that wait.
        pool.shutdown(wait=False, cancel_futures=True)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
