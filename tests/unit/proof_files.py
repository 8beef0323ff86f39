"""Makes transcripts for tests."""

from __future__ import annotations

from typing import Any

from tests.unit.yard import MOMENT

from trainyard.documents.proof import Proof, ProofStep

IMAGE = (
    "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:"
    "0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04"
)
PASSED = ProofStep(name="start from the bundle", state="passed", detail="It did.")


def proof(**changes: Any) -> Proof:
    """Return a transcript in which everything worked unless it is changed."""
    values: dict[str, Any] = {
        "created_at": MOMENT,
        "proof_id": "adder-0123456789ab",
        "lane": "neuron-native",
        "instance": "trn2.48xlarge",
        "image": IMAGE,
        "sdk": "2.32.0",
        "driver": "2.31.7.0",
        "toolchain": {"vllm": "0.24.0"},
        "model": "adder",
        "revision": "r1",
        "target": "trn2",
        "compile_key": "abc",
        "steps": (PASSED,),
    }
    return Proof(**{**values, **changes})
