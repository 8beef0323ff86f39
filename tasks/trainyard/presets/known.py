"""The presets as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainyard.errors import NotFound
from trainyard.spec.loader import load_spec
from trainyard.spec.model import ModelSpec
from trainyard.spec.sentences import did_you_mean

_SOURCE = re.compile(r"\A# Source: (?P<text>(?:.*\n)(?:# .+\n)*?)(?=#\n|schema:)", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """One model spec to copy."""

    path: Path
    """The YAML file."""

    @property
    def name(self) -> str:
        """As the model's."""
        return self.path.stem

    @property
    def text(self) -> str:
        """The YAML, comments included."""
        return self.path.read_text(encoding="utf-8")

    @property
    def source(self) -> str:
        """Where the recipe is published."""
        match = _SOURCE.search(self.text)
        return "" if match is None else " ".join(match["text"].replace("\n# ", " ").split())

    @property
    def spec(self) -> ModelSpec:
        """The spec."""
        return load_spec(self.path)


@dataclass(frozen=True)
class NotYet:
    """Something that people look for and no preset covers."""

    what: str
    where: str
    """Instances."""
    reason: str
    source: str


_SDK = "AWS Neuron SDK 2.32"

NOT_YET = (
    NotYet(
        "Models that span several nodes (Llama 3.1 405B on a trn2 UltraServer)",
        "four trn2u.48xlarge",
        "A replica of Trainyard is one pod on one node; the recipe joins four.",
        f"{_SDK}, libraries/nxd-inference/tutorials/trn2-llama3.1-405b-tutorial",
    ),
    NotYet(
        "Speculative decoding (EAGLE3 for Llama 3 and gpt-oss, draft models)",
        "trn2, trn3",
        "A release pins one checkpoint: the draft's has no place of its own yet, so plans refuse "
        "neuron.speculation.",
        f"{_SDK}, vllm-neuron/docs/tutorials/tutorial-eagle3-speculative-decoding-llama-3-1.md",
    ),
    NotYet(
        "gpt-oss 120B",
        "trn2.48xlarge, trn3",
        "The recipe needs --no-disable-hybrid-kv-cache-manager, which no typed setting gives; its "
        "8 cores hold the MXFP4 weights of Trn3, not the bfloat16 ones of Trn2.",
        f"{_SDK}, vllm-neuron/docs/tutorials/tutorial-gpt-oss.md",
    ),
    NotYet(
        "Qwen3-Embedding 8B",
        "trn2, trn3",
        "Embedding models are served with --runner pooling and have no tokens to measure or judge.",
        f"{_SDK}, vllm-neuron/docs/model-recipes/qwen3-embedding-8b.md",
    ),
    NotYet(
        "Disaggregated inference (prefill and decode servers, separate encoders)",
        "trn2, trn3",
        "A release is one kind of server.",
        f"{_SDK}, vllm-neuron/docs/tutorials/tutorial-di-1p1d-xpyd.md",
    ),
    NotYet(
        "LoRA adapters",
        "trn1, trn2",
        "Lane neuron-native does not support them; adapters are no part of a release.",
        f"{_SDK}, vllm-neuron/docs/guides/reference-feature-model-compatibility.md",
    ),
    NotYet(
        "Llama 3.1 8B and larger on Inf2",
        "inf2.24xlarge, inf2.48xlarge",
        "AWS publishes no serving recipe for Inf2 with a plugin of vLLM; copy llama-3-1-8b-nxdi, "
        "lower tensor_parallel_size to the cores, and prove it.",
        f"{_SDK}, libraries/nxd-inference (searched)",
    ),
    NotYet(
        "Llama 3 70B in FP8 on lane neuron-nxdi",
        "trn2.48xlarge",
        "AWS: the FP8 model cannot be compiled through vLLM, only through inference_demo. Use "
        "llama-3-3-70b-fp8 on lane neuron-native.",
        f"{_SDK}, libraries/nxd-inference/tutorials/trn2-llama3.3-70b-fp8.rst",
    ),
    NotYet(
        "Llama 4, Pixtral, Qwen2-VL",
        "trn2.48xlarge",
        "Their recipes are notebooks of lane neuron-nxdi, which ends on Trn2 with SDK 2.34.",
        f"{_SDK}, libraries/nxd-inference/tutorials",
    ),
)
"""What is not supported yet, and why."""


def presets() -> tuple[Preset, ...]:
    """Return all presets, sorted by name."""
    return tuple(Preset(path) for path in sorted(Path(__file__).parent.glob("*.yaml")))


def preset(name: str) -> Preset:
    """Return the preset of that name. Raises NotFound if there is none."""
    every = {each.name: each for each in presets()}
    if name not in every:
        raise NotFound(
            f"There is no preset {name!r}.",
            hint=f"{did_you_mean(name, every)} Presets: {', '.join(every)}.".strip(),
        )
    return every[name]
