"""Finds every mistake in specs and environments at once, with the line and the remedy.

Three passes over each file, none of which stops at the first mistake: the YAML itself, each value
by its type, and the rules between values (for everything that has a valid value).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from trainyard.errors import BadInput
from trainyard.spec.assets import asset_files
from trainyard.spec.environments import Environments
from trainyard.spec.model import ModelSpec, SpecPart, Target
from trainyard.spec.partial import known, partial, whole
from trainyard.spec.rules import (
    Finding,
    environments_findings,
    image_findings,
    refresh_findings,
    served_findings,
    spec_findings,
)
from trainyard.spec.sentences import say
from trainyard.spec.tasks import (
    GENERATE_INSTEAD,
    GENERATES,
    needs_logprobs,
    output_type,
    task_config,
)
from trainyard.spec.yaml_source import Location, YamlFile, read_yaml

LaneRules = Callable[[Target], Sequence[str]]
"""Returns every rule of its lane that a target breaks, each as a sentence with the remedy."""

PromptLogprobs = Callable[[Target], bool]
"""Tells whether a target's server returns log-probs of prompts."""

Root = TypeVar("Root", bound=SpecPart)


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in one file."""

    file: Path
    line: int
    column: int
    """Both count from 1."""
    key: str
    """Where in the file, such as `targets[0].max_model_len`; empty for the file as a whole."""
    message: str
    """What is wrong, one sentence."""
    remedy: str
    """What would be right, one sentence."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}"
        return " ".join(part for part in (f"{place}: {self.key}:" if self.key else f"{place}:",
                                          self.message, self.remedy) if part)  # fmt: skip


class InvalidSpec(BadInput):
    """A spec or the environments file has mistakes; the message names all of them.

    Args:
        problems: at least one.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        listed = "\n".join(f"  {problem}" for problem in self.problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"The configuration has {count}:\n{listed}")


@dataclass(frozen=True)
class Checked(Generic[Root]):
    """A file that was checked."""

    source: YamlFile
    root: Root
    """What is right in the file; complete if there are no problems."""
    problems: tuple[Problem, ...]


def check_files(
    paths: Iterable[Path],
    *,
    lane_rules: LaneRules | None = None,
    prompt_logprobs: PromptLogprobs | None = None,
) -> list[Problem]:
    """Return every mistake in these files, and between them, in the order of files and lines.

    Args:
        paths: model specs and environments files; a file with the key `environments` and no key
            `model` is one of the latter.
        lane_rules: what the lanes demand of a target; None leaves that out.
        prompt_logprobs: what the lanes can tell of prompts; None leaves that out.
    """
    specs: list[Checked[ModelSpec]] = []
    environments: list[Checked[Environments]] = []
    problems: list[Problem] = []
    for path in dict.fromkeys(paths):
        try:
            source = read_yaml(path)
        except BadInput as error:
            problems.append(Problem(path, 1, 1, "", error.message, error.hint))
            continue
        if _is_environments(source):
            environments.append(check_environments(source))
        else:
            specs.append(check_spec(source, lane_rules=lane_rules, prompt_logprobs=prompt_logprobs))
    for spec in specs:
        problems += spec.problems
    for surroundings in environments:
        problems += surroundings.problems
    problems += _between(specs, environments)
    return sorted(set(problems))


def check_spec(
    source: YamlFile,
    *,
    lane_rules: LaneRules | None = None,
    prompt_logprobs: PromptLogprobs | None = None,
) -> Checked[ModelSpec]:
    """Return a model spec as far as it is right, and every mistake inside it."""
    root, problems = _validated(source, ModelSpec)
    findings = [*spec_findings(root), *_name_findings(source, root)]
    findings += asset_files(root, source.path.parent)[1]
    if lane_rules is not None and known(root, "targets"):
        for index, target in enumerate(root.targets):
            if whole(target):
                findings += [
                    Finding(("targets", index), sentence, "") for sentence in lane_rules(target)
                ]
    if prompt_logprobs is not None:
        findings += task_findings(root, source.path.parent, prompt_logprobs)
    problems += [_problem(source, finding) for finding in findings]
    return Checked(source, root, tuple(sorted(problems)))


def task_findings(
    spec: ModelSpec, folder: Path, prompt_logprobs: PromptLogprobs
) -> Iterable[Finding]:
    """Yield the task files that the servers of some target cannot be asked."""
    if not (known(spec, "gates", "targets") and known(spec.gates, "accuracy")):
        return
    accuracy = spec.gates.accuracy
    silent = [
        target.name for target in spec.targets if whole(target) and not prompt_logprobs(target)
    ]
    for index, task in enumerate(accuracy.tasks if silent and known(accuracy, "tasks") else ()):
        if not known(task, "name", "path") or task.path is None:
            continue  # whoever runs the harness finds out about its own tasks
        kind = output_type(task_config(folder / task.path))
        if kind and kind != GENERATES:
            yield Finding(
                ("gates", "accuracy", "tasks", index, "path"),
                f"{needs_logprobs(task.name, [kind])} (target {', '.join(silent)})",
                GENERATE_INSTEAD,
            )


def check_environments(source: YamlFile) -> Checked[Environments]:
    """Return an environments file as far as it is right, and every mistake inside it."""
    root, problems = _validated(source, Environments)
    problems += [_problem(source, finding) for finding in environments_findings(root)]
    return Checked(source, root, tuple(sorted(problems)))


def key_path(location: Location) -> str:
    """Return a location as people write it: `targets[0].max_model_len`."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _validated(source: YamlFile, root_type: type[Root]) -> tuple[Root, list[Problem]]:
    problems = [
        Problem(
            source.path,
            flaw.position.line,
            flaw.position.column,
            key_path(flaw.location),
            flaw.message,
            flaw.remedy,
        )
        for flaw in source.flaws
    ]
    if source.data is None:
        return partial(root_type, None, set()), problems
    spoilt = {flaw.location for flaw in source.flaws if flaw.spoils}
    try:
        # As strict JSON, so that text is no number and 1 is not true, as in the JSON Schema.
        root = root_type.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        bad = set(spoilt)
        for detail in error.errors(include_url=False):
            if detail["type"] == "too_short" and detail["input"]:
                continue  # the validator does not count items that are wrong themselves
            location, message, remedy = say(detail, root_type)
            bad.add(location)
            if location not in spoilt:  # its flaw says more
                problems.append(_problem(source, Finding(location, message, remedy)))
        return partial(root_type, source.data, bad), problems
    return partial(root_type, source.data, spoilt) if spoilt else root, problems


def _problem(source: YamlFile, finding: Finding) -> Problem:
    place = source.position(finding.location)
    return Problem(
        source.path,
        place.line,
        place.column,
        key_path(finding.location),
        finding.message,
        finding.remedy,
    )


def _is_environments(source: YamlFile) -> bool:
    keys = source.data or {}
    return "environments" in keys and "model" not in keys


def _name_findings(source: YamlFile, spec: ModelSpec) -> Iterable[Finding]:
    if known(spec, "model") and spec.model != source.path.stem:
        yield Finding(
            ("model",),
            f"The file is named {source.path.name}, the model {spec.model!r}.",
            f"Rename the file to {spec.model}.yaml, or the model.",
        )


def _images(environments: Environments, targets: Sequence[Target]) -> Iterable[Finding]:
    if known(environments, "environments"):
        for name, environment in environments.environments.items():
            yield from image_findings(name, environment, targets)


def _between(
    specs: Sequence[Checked[ModelSpec]], environments: Sequence[Checked[Environments]]
) -> Iterable[Problem]:
    """Yield what is wrong between files that are right by themselves."""
    first: dict[str, Path] = {}
    for checked in specs:
        if not known(checked.root, "model"):
            continue
        other = first.setdefault(checked.root.model, checked.source.path)
        if other != checked.source.path:
            finding = Finding(
                ("model",), f"{other} describes this model as well.", "Keep one of the two."
            )
            yield _problem(checked.source, finding)
    targets = [
        target
        for checked in specs
        if known(checked.root, "targets")
        for target in checked.root.targets
        if known(target, "name")
    ]
    for surroundings in environments:
        if specs:
            findings = [
                *served_findings(surroundings.root, [target.name for target in targets]),
                *_images(surroundings.root, targets),
            ]
            for finding in findings:
                yield _problem(surroundings.source, finding)
        for checked in specs:
            for finding in refresh_findings(checked.root, surroundings.root):
                yield _problem(checked.source, finding)
