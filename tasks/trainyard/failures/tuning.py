"""What the next try of a step does differently after a failure that other settings can help.

Only settings that change how the work is done and never what comes out: none of them is part of a
compile key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainyard.failures.table import Change

FRAMEWORK_WORKERS = 8
"""Compiler processes of the native plugin by default. Source: AWS Neuron SDK 2.32,
vllm-neuron/docs (NEURON_LIBTORCH_PARALLEL_COMPILE_WORKERS)."""

MORE_MEMORY_TRIES = 2
"""How often a step whose compiler runs alone is tried again after it ran out of memory."""


@dataclass(frozen=True)
class Tuning:
    """Settings that one try changes."""

    parallel_compile_workers: int | None = None
    """Compiler processes at a time; None: what the spec says, or the framework's number."""
    out_of_memory: int = 0
    """How often the step ran out of memory so far; a pod asks for twice the memory each time."""

    def to_json(self) -> dict[str, int]:
        """Return what is not as usual, for the status document."""
        found = {}
        if self.parallel_compile_workers is not None:
            found["parallel_compile_workers"] = self.parallel_compile_workers
        if self.out_of_memory:
            found["out_of_memory"] = self.out_of_memory
        return found

    @classmethod
    def from_json(cls, value: Any) -> Tuning:
        """Return the tuning in a status document; unknown or odd values count as usual."""
        if not isinstance(value, dict):
            return cls()
        workers, memory = value.get("parallel_compile_workers"), value.get("out_of_memory")
        return cls(
            parallel_compile_workers=workers if isinstance(workers, int) and workers > 0 else None,
            out_of_memory=memory if isinstance(memory, int) and memory > 0 else 0,
        )


def next_tuning(change: Change, now: Tuning, *, workers: int | None) -> Tuning | None:
    """Return what the next try changes, or None if nothing is left that could help.

    Args:
        change: what the failure asks for.
        now: what this try had changed.
        workers: compiler processes that a try without changes has; None: the step has no such
            setting, and only memory or time can help.
    """
    if not change:
        return now
    memory = now.out_of_memory + (change == "halve workers")
    if workers is None:
        return Tuning(None, memory)
    had = now.parallel_compile_workers or workers
    if had > 1:
        return Tuning(had // 2 if change == "halve workers" else 1, memory)
    if change == "halve workers" and memory <= MORE_MEMORY_TRIES:
        return Tuning(1, memory)
    return None
