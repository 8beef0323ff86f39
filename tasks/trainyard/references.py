"""Which parity reference a plan needs, and how much memory making it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainyard.canonical import digest
from trainyard.documents.parity import ReferenceSettings, reference_digest
from trainyard.errors import BadInput
from trainyard.names import check_relative_path
from trainyard.sources.architecture import Tensor, loaded_bytes
from trainyard.spec.model import ModelSpec, ParityCheck, Target
from trainyard.store.layout import reference_key

GIB = 1 << 30
_FACTOR = 1.2
"""Of the weights: what passes through the layers, and the KV cache of one answer, come on top."""
_BASE_GIB = 1.0
"""Python with PyTorch and transformers."""


@dataclass(frozen=True)
class PlannedReference:
    """A reference that a measurement needs."""

    key: str
    prompts: tuple[str, ...]
    settings: ReferenceSettings


def planned_reference(
    spec: ModelSpec, target: Target, checkpoint_digest: str, assets_dir: Path
) -> PlannedReference:
    """Return the reference that the parity check of `spec` needs for a target.

    Args:
        spec: it has a parity check.
        target: its number format is what rounding is measured in.
        checkpoint_digest: of the model's files.
        assets_dir: the task and prompt files of the plan.

    Raises:
        BadInput: the spec asks for no parity, or there are no prompts.
    """
    check = spec.gates.accuracy.parity
    name = prompts_file(spec)
    if check is None or name is None:
        raise BadInput(
            f"The spec of {spec.model} has no parity check with prompts.",
            hint="Give gates.accuracy.parity, and `prompts` there or at the top of the spec.",
        )
    prompts = read_prompts(assets_dir / check_relative_path(name), check.num_prompts)
    settings = reference_settings(check, target, prompts)
    return PlannedReference(
        key=reference_key(checkpoint_digest, reference_digest(settings)),
        prompts=prompts,
        settings=settings,
    )


def reference_settings(
    check: ParityCheck, target: Target, prompts: Iterable[str]
) -> ReferenceSettings:
    """Return what a reference for this check depends on besides the checkpoint."""
    return ReferenceSettings(
        dtype=check.dtype,
        served_dtype=target.dtype,
        prompts_digest=digest(list(prompts)),
        max_tokens=check.max_tokens,
    )


def prompts_file(spec: ModelSpec) -> str | None:
    """Return the file of the parity check's prompts, relative to the spec; None if it has none."""
    check = spec.gates.accuracy.parity
    return (check.prompts if check is not None else None) or spec.prompts


def read_prompts(path: Path, most: int) -> tuple[str, ...]:
    """Return the first prompts of a JSONL file that was checked with the spec."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple(str(json.loads(line)["prompt"]) for line in lines[:most])


def memory_problem(needed_gib: float, has_gib: float | None, where: str) -> str:
    """Return why a reference cannot be made, with the remedy; empty if it can or nobody knows.

    Args:
        needed_gib: what it takes, with what else runs there at that time.
        has_gib: the memory of the machine that measures; None: unknown.
        where: that machine, for people.
    """
    if has_gib is None or needed_gib <= has_gib:
        return ""
    return (
        f"The reference of gates.accuracy.parity takes {needed_gib:.1f} GiB of memory and {where} "
        f"has {has_gib:.1f}: set its dtype to bfloat16, measure on a larger machine, or make it "
        "elsewhere and set reference: imported (`trainyard import-reference`)."
    )


def reference_gib(tensors: Iterable[Tensor], dtype: str) -> float:
    """Return the memory in GiB that a forward pass on the CPU takes, from the sizes of the tensors.

    Args:
        tensors: of the checkpoint.
        dtype: number format that they are loaded in.
    """
    return _BASE_GIB + _FACTOR * loaded_bytes(tensors, dtype) / GIB
