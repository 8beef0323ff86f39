"""The pure part of the step `plan`: from what is known about a release to its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from trainyard.canonical import digest, short
from trainyard.documents.base import Provenance
from trainyard.documents.logits import logits_digest
from trainyard.documents.plan import (
    EvalAssets,
    GateName,
    Plan,
    PlannedStep,
    PlannedTarget,
    Price,
    ReleaseRequest,
)
from trainyard.errors import BadInput
from trainyard.releases import release_id_of
from trainyard.sources.protocol import ResolvedRevision
from trainyard.spec.environments import Environments
from trainyard.spec.model import LOGIT_LANE, Gates, ModelSpec, Target
from trainyard.spec.overrides import apply_overrides
from trainyard.spec.rules import (
    Finding,
    destination_findings,
    fit_findings,
    image_findings,
    room_findings,
)
from trainyard.spec.sentences import choose
from trainyard.store.layout import (
    bundle_manifest_key,
    checkpoint_manifest_key,
    logits_key,
    measurement_key,
    release_key,
    release_prefix,
    tasks_key,
    verdict_key,
)

LaneRules = Callable[[Target], Sequence[str]]


@dataclass(frozen=True)
class TargetFacts:
    """What a lane says about one target."""

    target: Target
    """With the overrides applied."""
    key_inputs: Mapping[str, Any]
    toolchain: Mapping[str, str]
    serving: Mapping[str, Any]
    """The lane's serving settings, without the served model name."""
    baselines: Mapping[str, str] = field(default_factory=dict)
    """Measurement id of the stable release, by environment."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """The kind of machine that it is measured on, as far as it is known."""
    price: Price | None = None
    """Of the target's instance."""
    incomparable: Mapping[str, str] = field(default_factory=dict)
    """Why a stable release cannot be compared with, by environment."""
    warnings: Sequence[str] = ()
    """What the lane wants people to know."""


@dataclass(frozen=True)
class Facts:
    """Everything a plan is made of."""

    request: ReleaseRequest
    spec: ModelSpec
    resolved: ResolvedRevision
    architecture_digest: str
    assets: EvalAssets | None
    targets: tuple[TargetFacts, ...]
    checkpoint_digest: str = ""
    """Empty as long as the checkpoint is not in the store."""
    reference_gib: float = 0.0
    """Memory that the parity reference takes where it is measured; 0: none is made there."""
    golden_gib: float = 0.0
    """Memory that the goldens of AWS's logit validation take; 0: it is not made."""
    asks_image: bool = False
    """The serving environment is in an image, so nobody has asked its harness about tasks yet."""


@dataclass(frozen=True)
class StepLine:
    """One line of the explanation of a plan."""

    step: str
    target: str
    """Empty for a step that serves all targets."""
    will_run: bool
    reason: str

    def __str__(self) -> str:
        name = f"{self.step} {self.target}".strip()
        return f"{name}: {'will run' if self.will_run else 'exists already'}. {self.reason}"


def choose_targets(
    request: ReleaseRequest, spec: ModelSpec, *, lane_rules: LaneRules
) -> tuple[Target, ...]:
    """Return the targets of a request, in the spec's order, with its overrides applied.

    Raises:
        BadInput: a target does not exist, or an override or a lane's rule is broken; the message
            names everything that is wrong.
    """
    by_name = {target.name: target for target in spec.targets}
    problems = [
        f"Model {spec.model} has no target {name!r}. {choose(name, list(by_name))}"
        for name in request.targets
        if name not in by_name
    ]
    problems += [f"Target {name} is named twice." for name in _repeated(request.targets)]
    targets: list[Target] = []
    for name, target in by_name.items():
        if request.targets and name not in request.targets:
            continue
        try:
            targets.append(apply_overrides(target, request.overrides))
        except BadInput as error:
            problems.append(str(error))
    for target in targets:
        problems += [f"Target {target.name}: {sentence}" for sentence in lane_rules(target)]
        for level in spec.gates.latency.levels:
            problems += [
                f"Level {level.name}: {finding.message} {finding.remedy}"
                for finding in fit_findings(level, [target])
            ]
    refuse("The request", problems)
    return tuple(targets)


def destination_problems(
    request: ReleaseRequest,
    spec: ModelSpec,
    environments: Environments,
    targets: Sequence[Target],
    *,
    promoted: Callable[[str], bool],
) -> list[str]:
    """Return why the release cannot go to the environments of a request, each as sentences.

    Args:
        request: names the environments.
        spec: its rollout needs room in each of them.
        environments: all there are.
        targets: those of the release.
        promoted: has the release been in this environment already?
    """
    names = [target.name for target in targets]
    findings: list[Finding] = list(
        destination_findings(request.environments, environments, names, promoted=promoted)
    )
    for name in dict.fromkeys(request.environments):
        environment = environments.environments.get(name)
        if environment is not None:
            findings += room_findings(spec.rollout, name, environment)
            findings += image_findings(name, environment, targets)
    return [f"{finding.message} {finding.remedy}" for finding in findings]


def unproven_problems(
    request: ReleaseRequest,
    environments: Environments,
    targets: Sequence[Target],
    is_proven: Callable[[Target], bool],
) -> list[str]:
    """Return which targets must be proven on a device first, each as sentences.

    Args:
        request: names the environments; one that accepts unproven targets has no such problems.
        environments: all there are.
        targets: those of the release.
        is_proven: was a target's image, instance and lane proven?
    """
    problems = []
    for name in () if request.accept_unproven else dict.fromkeys(request.environments):
        environment = environments.environments[name]
        for target in targets:
            concerned = target.neuron is not None and target.name == environment.target
            if concerned and environment.takes_only_proven(name) and not is_proven(target):
                image = target.neuron.image if target.neuron else ""
                problems.append(
                    f"Target {target.name}: nobody has proven lane {target.lane} on "
                    f"{target.instance} with {image or 'an image without a name'}, and environment "
                    f"{name} takes only what is proven. Run `trainyard doctor neuron` on such a "
                    "node, or accept it (--accept-unproven)."
                )
    return problems


def architecture_problems(targets: Iterable[Target], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a model's configuration does not allow, each as sentences.

    Args:
        targets: with their overrides.
        config: the model's config.json.
    """
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    longest, heads = text.get("max_position_embeddings"), text.get("num_attention_heads")
    stretched = any(
        isinstance(text.get(key), dict) and "factor" in text[key]
        for key in ("rope_scaling", "rope_parameters")
    )
    for target in targets:
        length, ways = target.max_model_len, target.tensor_parallel_size
        if isinstance(longest, int) and not stretched and length > longest:
            yield (
                f"Target {target.name}: max_model_len {length} is more than the model's "
                f"{longest} positions. Give at most {longest}."
            )
        if isinstance(heads, int) and heads % ways:
            yield (
                f"Target {target.name}: tensor_parallel_size {ways} does not divide the model's "
                f"{heads} attention heads. Give a divisor of {heads}."
            )


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise BadInput with all `problems`, if there are any."""
    if len(problems) == 1:
        raise BadInput(f"{what} cannot be planned: {problems[0]}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise BadInput(f"{what} cannot be planned for {len(problems)} reasons:\n{listed}")


def make_plan(
    facts: Facts,
    *,
    exists: Callable[[str], bool],
    plan_id: str | None = None,
    provenance: Provenance | None = None,
) -> Plan:
    """Return the plan that follows from `facts`.

    Args:
        facts: everything known about the release.
        exists: tells whether the store has a key.
        plan_id: the plan's id; None: made from the plan's substance, so that equal facts give equal
            plans, whatever exists already.
        provenance: who plans.
    """
    spec, resolved = facts.spec, facts.resolved
    targets = tuple(_planned_target(facts, target) for target in facts.targets)
    substance = {
        "request": facts.request.model_dump(mode="json"),
        "spec_digest": digest(spec.model_dump(mode="json", by_alias=True)),
        "revision": resolved.revision,
        "source_fingerprint": resolved.fingerprint,
        "architecture_digest": facts.architecture_digest,
        "assets": facts.assets.digest if facts.assets else "",
        # Later versions may warn of more, and the plan is the same.
        "targets": [target.model_dump(mode="json", exclude={"warnings"}) for target in targets],
    }
    chosen_id = plan_id or f"{spec.model}-{short(digest(substance))}"
    return Plan(
        plan_id=chosen_id,
        request=facts.request,
        spec=spec,
        spec_digest=substance["spec_digest"],
        revision=resolved.revision,
        source_fingerprint=resolved.fingerprint,
        checkpoint_key=checkpoint_manifest_key(spec.model, resolved.revision),
        checkpoint_bytes=sum(file.size for file in resolved.files),
        reference_gib=facts.reference_gib,
        golden_gib=facts.golden_gib,
        architecture_digest=facts.architecture_digest,
        assets=facts.assets,
        targets=targets,
        steps=tuple(_steps(facts, targets, chosen_id, exists)),
        provenance=provenance or Provenance(),
    )


def explain(plan: Plan) -> list[StepLine]:
    """Return one line for each step of a plan, in their order."""
    return [
        StepLine(
            step=_gate_name(step) or step.step,
            target=step.target,
            will_run=not step.exists,
            reason=step.reason,
        )
        for step in plan.steps
    ]


def price_problems(spec: ModelSpec, targets: Iterable[TargetFacts]) -> list[str]:
    """Return which targets have bounds on cost and no price, each as sentences."""
    if spec.gates.cost is None:
        return []
    return [
        f"Target {each.target.name}: gates.cost has bounds, and nobody said what an hour of "
        f"instance {each.target.instance} costs. Name a file with its price in TRAINYARD_PRICES."
        for each in targets
        if each.price is None
    ]


def measurement_id(
    facts: Facts, *, compile_key: str, serving_digest: str, machine: Mapping[str, Any]
) -> str:
    """Return the id of the measurement of one target: everything that its figures depend on.

    Bounds are left out: the same figures can be judged by other bounds.
    """
    return short(
        digest(
            {
                "model": facts.spec.model,
                "revision": facts.resolved.revision,
                "fingerprint": facts.resolved.fingerprint,
                "compile_key": compile_key,
                "serving_digest": serving_digest,
                "measured": _measured(facts.spec.gates),
                "assets": facts.assets.digest if facts.assets else "",
                "machine": dict(machine),
            }
        )
    )


def _measured(gates: Gates) -> dict[str, Any]:
    """Return what a measurement does, without what a gate makes of it."""
    parity = gates.accuracy.parity
    return {
        "tasks": [
            task.model_dump(mode="json", exclude={"min", "max_drop", "on_undecided"})
            for task in gates.accuracy.tasks
        ],
        # Left out where there is none, so that measurements of earlier versions stay what they are.
        **(
            {"parity": parity.model_dump(mode="json", exclude={"bounds"})}
            if parity is not None
            else {}
        ),
        "levels": [
            level.model_dump(mode="json", exclude={"bounds", "max_regression"})
            for level in gates.latency.levels
        ],
        # What is promised decides which rates are tried and which requests count as good.
        "slo": gates.latency.slo.model_dump(mode="json") if gates.latency.slo else None,
        "search": gates.latency.search.model_dump(mode="json", exclude={"bound"})
        if gates.latency.search
        else None,
        "behaviour": list(gates.behaviour.checks),
    }


def _planned_target(facts: Facts, target: TargetFacts) -> PlannedTarget:
    compile_key = digest(dict(target.key_inputs))
    serving = {**target.serving, "served_model_name": facts.spec.client_model_name}
    serving_digest = digest(serving)
    return PlannedTarget(
        target=target.target,
        compile_key=compile_key,
        key_inputs=dict(target.key_inputs),
        toolchain=dict(target.toolchain),
        serving=serving,
        serving_digest=serving_digest,
        measurement_id=measurement_id(
            facts,
            compile_key=compile_key,
            serving_digest=serving_digest,
            machine=target.machine,
        ),
        baselines=dict(target.baselines),
        machine=dict(target.machine),
        price=target.price,
        incomparable=dict(target.incomparable),
        warnings=tuple(target.warnings),
    )


def _steps(
    facts: Facts, targets: Sequence[PlannedTarget], plan_id: str, exists: Callable[[str], bool]
) -> Iterator[PlannedStep]:
    spec, resolved = facts.spec, facts.resolved
    size = sum(file.size for file in resolved.files)
    checkpoint = checkpoint_manifest_key(spec.model, resolved.revision)
    stored = exists(checkpoint)
    allowed = ", ".join(resolved.allowed)
    yield PlannedStep(
        step="download",
        key=checkpoint,
        exists=stored,
        reason=(
            f"Revision {resolved.revision} is in the store."
            if stored
            else f"Revision {resolved.revision} is not in the store yet: {len(resolved.files)} "
            f"files, {_size(size)}."
        )
        + (
            f" Code or pickles that the spec allows are among its files: {allowed}." * bool(allowed)
        ),
    )
    for target in targets:
        yield from _target_steps(facts, target, plan_id, exists)


def _target_steps(
    facts: Facts, planned: PlannedTarget, plan_id: str, exists: Callable[[str], bool]
) -> Iterator[PlannedStep]:
    name, compile_key = planned.target.name, planned.compile_key
    yield from _tasks_step(facts, planned, exists)
    key = bundle_manifest_key(compile_key)
    compiled = exists(key)
    yield PlannedStep(
        step="compile",
        target=name,
        key=key,
        exists=compiled,
        reason=f"A bundle for this architecture, these shapes and this toolchain is in the store "
        f"({short(compile_key)}); weights are not compiled in."
        if compiled
        else "No bundle for this architecture, these shapes and this toolchain is in the store "
        f"({short(compile_key)}).",
    )
    key = measurement_key(planned.measurement_id)
    measured = exists(key)
    yield PlannedStep(
        step="measure",
        target=name,
        key=key,
        exists=measured,
        reason="This revision was measured with this bundle, these settings and these tests, on "
        "this kind of machine."
        if measured
        else "This revision was not measured with this bundle, these settings and these tests on "
        "this kind of machine.",
    )
    yield from _logit_step(facts, planned, exists)
    for gate in get_args(GateName):
        key = verdict_key(plan_id, name, gate)
        judged = exists(key)
        yield PlannedStep(
            step="gate",
            target=name,
            key=key,
            exists=judged,
            reason="This plan has its verdict." if judged else _gate_reason(planned),
        )
    yield _publish_step(facts, planned, exists)


def _tasks_step(
    facts: Facts, planned: PlannedTarget, exists: Callable[[str], bool]
) -> Iterator[PlannedStep]:
    """Yield the step that asks the image about the harness's own tasks, if they are measured."""
    names = facts.spec.gates.accuracy.own_tasks
    measured = exists(measurement_key(planned.measurement_id))
    if not names or not facts.asks_image or measured:
        return
    key = tasks_key(planned.measurement_id)
    found = exists(key)
    yield PlannedStep(
        step="tasks",
        target=planned.target.name,
        key=key,
        exists=found,
        reason=f"The image's lm-evaluation-harness was asked about {', '.join(names)}."
        if found
        else f"The image's lm-evaluation-harness is asked about {', '.join(names)} before a device "
        "is taken.",
    )


def _logit_step(
    facts: Facts, planned: PlannedTarget, exists: Callable[[str], bool]
) -> Iterator[PlannedStep]:
    """Yield the step that the spec asks for beside the measurement, with what it costs."""
    validation, target = facts.spec.gates.accuracy.logit_validation, planned.target
    if validation is None or target.lane != LOGIT_LANE:
        return
    key = logits_key(planned.measurement_id, logits_digest(validation))
    found = exists(key)
    yield PlannedStep(
        step="logits",
        target=target.name,
        key=key,
        exists=found,
        reason="AWS's logit validation of this checkpoint was made."
        if found
        else "The spec asks for AWS's logit validation, which compiles graphs of its own (not the "
        f"served graph): it takes the devices of target {target.name} ({target.instance}) once "
        f"more, and {facts.golden_gib:g} GiB of memory for the goldens in float32 on the CPU.",
    )


def _gate_reason(planned: PlannedTarget) -> str:
    if planned.baselines:
        return (
            "Each plan gets its own verdict; compared with the stable release of "
            f"{next(iter(planned.baselines))}."
        )
    for reason in planned.incomparable.values():
        return f"Each plan gets its own verdict, which compares nothing: {reason}"
    return "Each plan gets its own verdict; there is no stable release to compare with."


def _publish_step(
    facts: Facts, planned: PlannedTarget, exists: Callable[[str], bool]
) -> PlannedStep:
    model, name = facts.spec.model, planned.target.name
    if not facts.checkpoint_digest:
        return PlannedStep(
            step="publish",
            target=name,
            key=release_prefix(model),
            exists=False,
            reason="The release is new; its id follows from the checkpoint, once it is stored.",
        )
    release_id = release_id_of(
        model,
        checkpoint_digest=facts.checkpoint_digest,
        compile_key=planned.compile_key,
        serving_digest=planned.serving_digest,
    )
    key = release_key(model, release_id)
    published = exists(key)
    return PlannedStep(
        step="publish",
        target=name,
        key=key,
        exists=published,
        reason=f"Release {release_id} exists; the verdicts of this plan are added to it."
        if published
        else f"Release {release_id} is new.",
    )


def _gate_name(step: PlannedStep) -> str:
    """Return `accuracy gate` or `latency gate` for a gate's step, or nothing."""
    if step.step != "gate":
        return ""
    return f"{step.key.rsplit('/', 1)[1].removesuffix('.json')} gate"


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for index, name in enumerate(names) if name in names[:index]})


def _size(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        value /= 1000
    return f"{value:.4g} TB"
