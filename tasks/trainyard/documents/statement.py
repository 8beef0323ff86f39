"""Releases and verdicts as in-toto statements: what is signed.

A release is a Statement v1 (in-toto.io/Statement/v1) with SLSA provenance v1
(slsa.dev/provenance/v1), a verdict one with the predicate `test-result`. Both say the same as
`Release` and `Attestation`, and are translated here without loss. As the frameworks ask for,
unknown fields are ignored, so that a later version may add some.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic.alias_generators import to_camel

from trainyard.canonical import canonical_json
from trainyard.documents.base import Provenance
from trainyard.documents.plan import ReleaseRequest
from trainyard.documents.release import DEFAULT_BUILDER, Attestation, Pin, Release
from trainyard.spec.model import ModelSpec, Target

PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUILD_TYPE: Literal["urn:trainyard:release:v1"] = "urn:trainyard:release:v1"

_TOOLCHAIN = "toolchain/"
_CHECKPOINT_PIN = "checkpoint-manifest"

_RESULTS: dict[str, Literal["PASSED", "WARNED", "FAILED"]] = {
    "pass": "PASSED",
    "warn": "WARNED",
    "fail": "FAILED",
}


class _Wire(BaseModel):
    """A part of a statement: fields in camel case, absent ones left out, unknown ones ignored."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True
    )

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ResourceDescriptor(_Wire):
    """An in-toto ResourceDescriptor v1."""

    name: str
    uri: str | None = None
    digest: dict[str, str] | None = None
    """By algorithm; ours are `sha256`."""
    annotations: dict[str, Any] | None = None


class ExternalParameters(_Wire):
    """What people asked for."""

    request: ReleaseRequest | None = None
    requested_by: str | None = None
    spec: ModelSpec


class InternalParameters(_Wire):
    """What the plan made of it."""

    release_id: str
    model: str
    revision: str
    target: Target
    lane: str
    checkpoint_key: str
    compile_key: str
    serving: dict[str, Any]
    served_model_name: str
    measurement_id: str
    inputs: tuple[str, ...]
    """Keys of the documents that it was made from, the plan among them."""


class BuildDefinition(_Wire):
    """SLSA's BuildDefinition."""

    build_type: Literal["urn:trainyard:release:v1"] = BUILD_TYPE
    external_parameters: ExternalParameters
    internal_parameters: InternalParameters
    resolved_dependencies: tuple[ResourceDescriptor, ...]


class Builder(_Wire):
    """SLSA's Builder."""

    id: str = DEFAULT_BUILDER
    version: dict[str, str]
    builder_dependencies: tuple[ResourceDescriptor, ...] = ()


class BuildMetadata(_Wire):
    """SLSA's BuildMetadata, with an extension field of ours."""

    invocation_id: str | None = None
    """The DAG run."""
    finished_on: datetime
    host: str | None = Field(default=None, alias="trainyard_host")


class RunDetails(_Wire):
    """SLSA's RunDetails."""

    builder: Builder
    metadata: BuildMetadata
    byproducts: tuple[ResourceDescriptor, ...]


class SlsaProvenance(_Wire):
    """The predicate of a release."""

    build_definition: BuildDefinition
    run_details: RunDetails


class ReleaseStatement(_Wire):
    """A release as it is signed."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        default="https://in-toto.io/Statement/v1", alias="_type"
    )
    subject: tuple[ResourceDescriptor, ...]
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = "https://slsa.dev/provenance/v1"
    predicate: SlsaProvenance


class TestResult(_Wire):
    """The predicate of a verdict, with our own findings as an extension."""

    result: Literal["PASSED", "WARNED", "FAILED"]
    configuration: tuple[ResourceDescriptor, ...]
    trainyard: Attestation


class VerdictStatement(_Wire):
    """A verdict as it is signed."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        default="https://in-toto.io/Statement/v1", alias="_type"
    )
    subject: tuple[ResourceDescriptor, ...]
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = (
        "https://in-toto.io/attestation/test-result/v0.1"
    )
    predicate: TestResult


def payload_of_release(release: Release) -> bytes:
    """Return what is signed for a release: canonical JSON of its statement."""
    return canonical_json(_statement(release).model_dump(mode="json", by_alias=True))


def release_of_payload(payload: bytes) -> Release:
    """Return the release that a signed payload states.

    Raises:
        ValueError: it states none, or contradicts itself.
    """
    statement = ReleaseStatement.model_validate_json(payload)
    release = _release(statement)
    if _statement(release) != statement:
        raise ValueError("its parts contradict each other")
    return release


def payload_of_verdict(attestation: Attestation, release: Release) -> bytes:
    """Return what is signed for a verdict on `release`."""
    found = attestation.subject
    statement = VerdictStatement(
        subject=_subjects(release),
        predicate=TestResult(
            result=_RESULTS[found["outcome"]],
            configuration=(ResourceDescriptor(name="plan", uri=f"plans/{found['plan_id']}.json"),),
            trainyard=attestation,
        ),
    )
    return canonical_json(statement.model_dump(mode="json", by_alias=True))


def verdict_of_payload(payload: bytes) -> Attestation:
    """Return the verdict that a signed payload states.

    Raises:
        ValueError: it states none, or contradicts itself.
    """
    predicate = VerdictStatement.model_validate_json(payload).predicate
    if _RESULTS.get(predicate.trainyard.subject.get("outcome", "")) != predicate.result:
        raise ValueError("its parts contradict each other")
    return predicate.trainyard


def _subjects(release: Release) -> tuple[ResourceDescriptor, ...]:
    """Return what a statement is about: the checkpoint, the bundle, and how they are served.

    Each digest is the sha256 of a canonical JSON: of the lists of files, and of the arguments.
    """
    return (
        ResourceDescriptor(
            name=f"checkpoints/{release.model}/{release.revision}",
            digest={"sha256": release.checkpoint_digest},
        ),
        ResourceDescriptor(
            name=f"bundles/{release.compile_key}", digest={"sha256": release.bundle_digest}
        ),
        ResourceDescriptor(
            name=f"releases/{release.model}/{release.release_id}/serving",
            digest={"sha256": release.serving_digest},
        ),
    )


def _statement(release: Release) -> ReleaseStatement:
    made = release.provenance
    return ReleaseStatement(
        subject=_subjects(release),
        predicate=SlsaProvenance(
            build_definition=BuildDefinition(
                external_parameters=ExternalParameters(
                    request=release.request,
                    requested_by=made.requested_by or None,
                    spec=release.spec,
                ),
                internal_parameters=InternalParameters(
                    release_id=release.release_id,
                    model=release.model,
                    revision=release.revision,
                    target=release.target,
                    lane=release.lane,
                    checkpoint_key=release.checkpoint_key,
                    compile_key=release.compile_key,
                    serving=release.serving,
                    served_model_name=release.served_model_name,
                    measurement_id=release.measurement_id,
                    inputs=made.inputs,
                ),
                resolved_dependencies=_dependencies(release),
            ),
            run_details=RunDetails(
                builder=Builder(
                    id=release.builder,
                    version={"trainyard": made.code_version},
                    builder_dependencies=_images(made.image),
                ),
                metadata=BuildMetadata(
                    invocation_id=made.dag_run or None,
                    finished_on=release.created_at,
                    host=made.host or None,
                ),
                byproducts=_pinned(pin for pin in release.pins if pin.name != _CHECKPOINT_PIN),
            ),
        ),
    )


def _dependencies(release: Release) -> tuple[ResourceDescriptor, ...]:
    """Return what went in: the source, the checkpoint's manifest, the toolchain, the image."""
    source = ResourceDescriptor(
        name="source",
        uri=release.source or None,
        digest={"sha256": release.checkpoint_digest},
        annotations={"revision": release.revision},
    )
    toolchain = (
        ResourceDescriptor(
            name=f"{_TOOLCHAIN}{name}",
            uri=f"urn:trainyard:toolchain:{name}",
            annotations={"version": version},
        )
        for name, version in sorted(release.toolchain.items())
    )
    pinned = _pinned(pin for pin in release.pins if pin.name == _CHECKPOINT_PIN)
    return (source, *pinned, *toolchain, *_images(release.image))


def _images(image: str) -> tuple[ResourceDescriptor, ...]:
    if not image:
        return ()
    algorithm, _, value = image.rpartition("@")[2].partition(":")
    named = "@" in image and value
    return (
        ResourceDescriptor(name="image", uri=image, digest={algorithm: value} if named else None),
    )


def _pinned(pins: Iterable[Pin]) -> tuple[ResourceDescriptor, ...]:
    return tuple(
        ResourceDescriptor(name=pin.name, uri=pin.key, digest={"sha256": pin.sha256})
        for pin in pins
    )


def _release(statement: ReleaseStatement) -> Release:
    """Return the release that a statement makes; what is said twice is compared by the caller."""
    definition = statement.predicate.build_definition
    details = statement.predicate.run_details
    asked, planned = definition.external_parameters, definition.internal_parameters
    dependencies = definition.resolved_dependencies
    if len(statement.subject) != 3:
        raise ValueError(f"it is about {len(statement.subject)} things and not about 3")
    checkpoint, bundle, serving = (
        (each.digest or {}).get("sha256", "") for each in statement.subject
    )
    pinned = [each for each in dependencies if each.name == _CHECKPOINT_PIN] + [*details.byproducts]
    return Release(
        created_at=details.metadata.finished_on,
        provenance=Provenance(
            requested_by=asked.requested_by or "",
            dag_run=details.metadata.invocation_id or "",
            code_version=details.builder.version.get("trainyard", ""),
            image=_image_of(details.builder.builder_dependencies),
            host=details.metadata.host or "",
            inputs=planned.inputs,
        ),
        release_id=planned.release_id,
        model=planned.model,
        target=planned.target,
        lane=planned.lane,
        checkpoint_key=planned.checkpoint_key,
        checkpoint_digest=checkpoint,
        revision=planned.revision,
        source=next((each.uri or "" for each in dependencies if each.name == "source"), ""),
        compile_key=planned.compile_key,
        bundle_digest=bundle,
        serving=planned.serving,
        serving_digest=serving,
        served_model_name=planned.served_model_name,
        image=_image_of(dependencies),
        toolchain={
            each.name.removeprefix(_TOOLCHAIN): str((each.annotations or {}).get("version", ""))
            for each in dependencies
            if each.name.startswith(_TOOLCHAIN)
        },
        measurement_id=planned.measurement_id,
        request=asked.request,
        spec=asked.spec,
        pins=tuple(
            Pin(name=each.name, key=each.uri or "", sha256=(each.digest or {}).get("sha256", ""))
            for each in pinned
        ),
        builder=details.builder.id,
    )


def _image_of(dependencies: Iterable[ResourceDescriptor]) -> str:
    return next((each.uri or "" for each in dependencies if each.name == "image"), "")
