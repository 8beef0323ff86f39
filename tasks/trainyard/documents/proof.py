"""What `trainyard doctor neuron` saw on one node: the transcript that makes a triple proven."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainyard.canonical import canonical_json
from trainyard.documents.base import Document, Frozen

ProofState = Literal["passed", "failed", "skipped"]


class ProofStep(Frozen):
    """One thing that was tried."""

    name: str
    """Such as `compile on the device`."""
    state: ProofState
    """`skipped`: the lane has no such thing; the detail says why."""
    detail: str
    """One sentence with what was seen."""
    seconds: float = 0.0
    seen: dict[str, Any] = Field(default_factory=dict)
    """Figures and names, for programs."""


class Proof(Document):
    """`proofs/<lane>/<instance>/<proof id>.json`, signed.

    It is about an image, an instance and a lane: not about a model, although it was made with one.
    """

    proof_id: str
    lane: str
    instance: str
    image: str
    """As the target names it; best with a digest."""
    sdk: str = ""
    driver: str = ""
    """Version of the node's Neuron driver; empty on lane `cpu`."""
    toolchain: dict[str, str]
    machine: dict[str, Any] = Field(default_factory=dict)
    model: str
    revision: str
    target: str
    compile_key: str
    feature_bits: tuple[str, ...] = ()
    """Feature bits of the NEFFs that this driver and runtime loaded, in hex."""
    steps: tuple[ProofStep, ...]

    @property
    def proven(self) -> bool:
        """Did everything work that the lane has?"""
        states = [step.state for step in self.steps]
        return "passed" in states and "failed" not in states

    @property
    def triple(self) -> tuple[str, str, str]:
        """Image, instance and lane."""
        return self.image, self.instance, self.lane


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class _Subject(_Wire):
    name: str
    digest: dict[str, str]


class _Predicate(_Wire):
    result: Literal["PASSED", "FAILED"]
    trainyard: Proof


class _Statement(_Wire):
    """An in-toto Statement v1 with the predicate `test-result`, our findings as an extension."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        default="https://in-toto.io/Statement/v1", alias="_type"
    )
    subject: tuple[_Subject, ...]
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        default="https://in-toto.io/attestation/test-result/v0.1", alias="predicateType"
    )
    predicate: _Predicate


def payload_of_proof(proof: Proof) -> bytes:
    """Return what is signed for a proof: canonical JSON of its statement."""
    name, _, digest = proof.image.partition("@sha256:")
    subject = _Subject(name=name or proof.lane, digest={"sha256": digest} if digest else {})
    statement = _Statement(
        subject=(subject,),
        predicate=_Predicate(result="PASSED" if proof.proven else "FAILED", trainyard=proof),
    )
    return canonical_json(statement.model_dump(mode="json", by_alias=True))


def proof_of_payload(payload: bytes) -> Proof:
    """Return the proof that a signed payload states.

    Raises:
        ValueError: it states none, or contradicts itself.
    """
    predicate = _Statement.model_validate_json(payload).predicate
    if (predicate.result == "PASSED") != predicate.trainyard.proven:
        raise ValueError("its parts contradict each other")
    return predicate.trainyard
