"""The files beside a spec that go with a release: task folders and prompts.

They are data. A task folder that holds programs is refused, and so is a task file that names a
Python function: what runs in a measurement is lm-evaluation-harness and nothing that came with a
model.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

from trainyard.errors import BadInput
from trainyard.names import check_relative_path
from trainyard.spec.model import (
    OTHER_TOKENS,
    WORSE_ANSWERS,
    AccuracyTask,
    LoadLevel,
    ModelSpec,
    Probes,
    RolloutSpec,
)
from trainyard.spec.partial import known
from trainyard.spec.rules import Finding
from trainyard.spec.tasks import missing_data, task_config
from trainyard.spec.yaml_source import Location, read_yaml

SUFFIXES = frozenset({".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md"})
"""What a task folder may hold."""
MAX_FILES = 500
MAX_BYTES = 256 << 20
"""Of all files together; larger evaluation sets belong into a data set that the harness loads."""


_PROMPTS_BY_CEILING = 5
"""Probes' prompts times the share of worse answers that must be ruled out at 5 %: 3 would do it if
no pair were ever lost and the test knew what to look for."""


def asset_files(spec: ModelSpec, folder: Path) -> tuple[dict[str, Path], list[Finding]]:
    """Return the files that go with a release, and what is wrong with them.

    Args:
        spec: the spec, which may have holes.
        folder: the folder of the spec file.

    Returns:
        files by their path relative to `folder` (POSIX, sorted), and findings.
    """
    files: dict[str, Path] = {}
    findings: list[Finding] = []
    if known(spec, "gates") and known(spec.gates, "accuracy"):
        accuracy = spec.gates.accuracy
        for index, task in enumerate(accuracy.tasks if known(accuracy, "tasks") else ()):
            if known(task, "path") and task.path is not None:
                where = ("gates", "accuracy", "tasks", index, "path")
                findings += _add_task(task, task.path, folder, where, files)
        parity = accuracy.parity if known(accuracy, "parity") else None
        if parity is not None and known(parity, "prompts") and parity.prompts is not None:
            place = ("gates", "accuracy", "parity", "prompts")
            findings += _add_prompts(parity.prompts, folder, files, place)
    if known(spec, "gates") and known(spec.gates, "latency"):
        latency = spec.gates.latency
        for index, level in enumerate(latency.levels if known(latency, "levels") else ()):
            if known(level, "prompts", "output_len") and level.prompts is not None:
                at = ("gates", "latency", "levels", index, "prompts")
                findings += _add_load(level, level.prompts, folder, at, files)
    if known(spec, "prompts") and spec.prompts is not None:
        findings += _add_prompts(spec.prompts, folder, files, ("prompts",))
    findings += _add_probes(spec, folder, files)
    return dict(sorted(files.items())), findings


def _add_task(
    task: AccuracyTask, name: str, folder: Path, where: Location, files: dict[str, Path]
) -> Iterator[Finding]:
    problem = _file_problem(folder, name)
    if problem is None and PurePosixPath(name).suffix not in {".yaml", ".yml"}:
        problem = (f"{name} is no YAML file.", "Name the task's YAML file.")
    if problem is None and "/" not in name:
        problem = (
            f"{name} lies beside the spec, so that all specs would go with the release.",
            "Move the task into a folder of its own, such as `<model>/<task>.yaml`.",
        )
    if problem is not None:
        yield Finding(where, *problem)
        return
    yield from _task_findings(task, folder / name, where)
    size = 0
    inside = sorted((folder / name).parent.rglob("*"))
    for path in inside:
        relative = path.relative_to(folder).as_posix()
        if any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
            continue
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            yield Finding(where, f"{relative} is no ordinary file.", "Copy the file itself.")
            continue
        if path.suffix not in SUFFIXES:
            yield Finding(
                where,
                f"{relative} does not belong into a task folder.",
                f"Keep only data there ({', '.join(sorted(SUFFIXES))}).",
            )
            continue
        size += found.st_size
        files[relative] = path
    if size > MAX_BYTES or len(inside) > MAX_FILES:
        yield Finding(
            where,
            f"The task's folder holds {len(inside)} files and {size >> 20} MiB.",
            f"Keep it below {MAX_FILES} files and {MAX_BYTES >> 20} MiB.",
        )


def _task_findings(task: AccuracyTask, path: Path, where: Location) -> Iterator[Finding]:
    """Yield what is wrong inside a task's YAML file."""
    try:
        content = read_yaml(path)
    except BadInput as error:
        yield Finding(where, error.message, error.hint)
        return
    for flaw in content.flaws:
        yield Finding(where, f"{path.name}, line {flaw.position.line}: {flaw.message}", flaw.remedy)
    if content.data is None:
        return
    for name in missing_data(task_config(path), path.parent):
        yield Finding(
            where,
            f"{path.name} reads {name}, which is not in its folder.",
            "Put the file there, or correct `data_files`.",
        )
    if known(task, "name") and content.data.get("task") != task.name:
        yield Finding(
            where,
            f"{path.name} holds the task {content.data.get('task')!r}, not {task.name!r}.",
            "Give the `task:` line of the file and `name` the same value.",
        )


def _add_prompts(
    name: str, folder: Path, files: dict[str, Path], where: Location
) -> Iterator[Finding]:
    problem = _file_problem(folder, name)
    if problem is None:
        path = folder / name
        problem = _prompts_problem(path)
        files[name] = path
    if problem is not None:
        yield Finding(where, *problem)


def _add_load(
    level: LoadLevel, name: str, folder: Path, where: Location, files: dict[str, Path]
) -> Iterator[Finding]:
    """Add the real prompts of a load level."""
    problem = _file_problem(folder, name)
    if problem is None and PurePosixPath(name).suffix != ".jsonl":
        problem = (f"{name} is no JSONL file.", "Name a file that ends with `.jsonl`.")
    if problem is None:
        path = folder / name
        problem = _prompts_problem(path, with_lengths=level.output_len is None)
        files[name] = path
    if problem is not None:
        yield Finding(where, *problem)


def _add_probes(spec: ModelSpec, folder: Path, files: dict[str, Path]) -> Iterator[Finding]:
    """Add the prompts of a rollout's probes, with their references."""
    rollout = spec.rollout if known(spec, "rollout") else None
    probes = rollout.probes if rollout is not None and known(rollout, "probes") else None
    if rollout is None or probes is None or not known(probes, "prompts", "scoring"):
        return
    where = ("rollout", "probes", "prompts")
    name, scored = probes.prompts, probes.scoring != "none"
    problem = _file_problem(folder, name)
    if problem is None and PurePosixPath(name).suffix != ".jsonl":
        problem = (f"{name} is no JSONL file.", "Name a file that ends with `.jsonl`.")
    if problem is None:
        path = folder / name
        problem = _prompts_problem(path, with_answers=scored) or _too_few(path, rollout, probes)
        files[name] = path
    if problem is not None:
        yield Finding(where, *problem)


def _too_few(path: Path, rollout: RolloutSpec, probes: Probes) -> tuple[str, str] | None:
    """Return that a set is too small for any release to be proven; else None."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    # The same checkpoint has wider margins, so what suffices for another one suffices for it.
    ceiling = WORSE_ANSWERS if probes.scoring != "none" else OTHER_TOKENS
    if known(rollout, "judge") and known(rollout.judge, "margins"):
        margins = rollout.judge.margins.get("quality")
        if margins is not None and known(margins, "promote_ceiling") and margins.promote_ceiling:
            ceiling = margins.promote_ceiling
    least = ceil(_PROMPTS_BY_CEILING / ceiling)
    if lines >= least:
        return None
    return (
        f"{path.name} has {lines} prompts. Each is scored once in a rollout, and with fewer than "
        f"{least} no release could be proven to give worse answers to less than {ceiling:.1%}.",
        f"Give at least {least} prompts, or a larger promote_ceiling of quality in "
        "rollout.judge.margins.",
    )


def _prompts_problem(
    path: Path, *, with_lengths: bool = False, with_answers: bool = False
) -> tuple[str, str] | None:
    remedy = 'Write one `{"prompt": "…"}` a line.'
    if with_answers:
        remedy = 'Write one `{"prompt": "…", "answer": "…"}` a line, or set scoring: none.'
    if with_lengths:
        remedy = 'Write one `{"prompt": "…", "output_tokens": 128}` a line, or give output_len.'
    try:
        if path.stat().st_size > MAX_BYTES:
            return f"{path.name} is larger than {MAX_BYTES >> 20} MiB.", "A few prompts suffice."
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return f"{path.name} is not UTF-8 text.", remedy
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}.", "Check its rights."
    if not lines:
        return f"{path.name} is empty.", remedy
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            return f"{path.name}, line {number}: this is not JSON.", remedy
        problem = _row_problem(value, with_lengths=with_lengths, with_answers=with_answers)
        if problem:
            return f"{path.name}, line {number}: {problem}", remedy
    return None


def _row_problem(value: object, *, with_lengths: bool, with_answers: bool) -> str:
    """Return what is wrong with one line of prompts; empty if nothing is."""
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(prompt, str) or not prompt:
        return "there is no prompt."
    answer = value.get("answer")
    if with_answers and not (isinstance(answer, str) and answer.strip()):
        return "there is no answer to compare with."
    tokens = value.get("output_tokens")
    if with_lengths and (type(tokens) is not int or tokens < 1):
        return "there is no number of output_tokens."
    return ""


def _file_problem(folder: Path, name: str) -> tuple[str, str] | None:
    """Return what is wrong with a file named in the spec; None if it can be used."""
    try:
        check_relative_path(name)
    except BadInput:
        return (
            f"{name!r} leaves the folder of the spec.",
            "Name a file below that folder, without `..` and without a leading `/`.",
        )
    path = folder / name
    if not path.exists():
        return f"There is no file {name}.", f"Put it beside the spec, as {name}."
    if not path.is_file():
        return f"{name} is no file.", "Name a file."
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} is a link out of the folder of the spec.", "Copy the file itself."
    return None
