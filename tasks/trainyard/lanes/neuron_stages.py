"""What a starting vLLM server on a Neuron device is doing, from its log."""

from __future__ import annotations

_STAGES = (
    ("Application startup complete", "ready"),
    ("init engine (", "starting the HTTP interface"),
    ("neuronx-cc", "compiling what is not cached"),
    ("Starting to load model", "loading the weights and tracing the model"),
    ("Resolved architecture", "starting the engine's processes"),
    ("non-default args", "reading the model's configuration"),
)
"""vLLM's own lines, the last first, and what happens after each. The plugins' lines change with
every release; only the compiler's name is looked for."""


def neuron_stage(log: str) -> str:
    """Return what a starting server does now, in a few words."""
    return next((words for mark, words in _STAGES if mark in log), "starting Python")
