"""What single values cannot tell: contradictions inside a spec, and between files.

Each rule yields findings and touches nothing outside its arguments. The rules are kept out of the
models on purpose: a stored release stays readable when a later version has stricter rules.
"""

from __future__ import annotations

import graphlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise

from trainyard.errors import BadInput
from trainyard.spec.cron import cron_problem
from trainyard.spec.environments import Environment, Environments
from trainyard.spec.metrics import MetricsSource
from trainyard.spec.model import (
    AVERAGES,
    LOGIT_LANE,
    MAX_PARITY_POSITIONS,
    PARITY_SHARES,
    SLO_METRICS,
    AccuracyTask,
    BehaviourName,
    BehaviourWaiver,
    Bound,
    Capacity,
    CostGate,
    HuggingFaceSource,
    JudgeSettings,
    LatencyGate,
    LatencyMetric,
    LoadLevel,
    LocalSource,
    LogitValidation,
    Margins,
    ModelSpec,
    ParityCheck,
    RateSearch,
    RolloutSpec,
    S3Source,
    Source,
    Target,
)
from trainyard.spec.partial import known, whole
from trainyard.spec.patterns import matches, selected
from trainyard.spec.sentences import SECRETS_ELSEWHERE, choose, holds_secret
from trainyard.spec.ways import Allowed, Notify
from trainyard.spec.windows import QuietHours, has_time_zones, never_opens, time_zone
from trainyard.spec.yaml_source import Location

GENEROSITY: tuple[Capacity, ...] = ("single", "replace", "surge")
"""Capacity rules from the least to the most generous."""

LANE_PARTS: Mapping[str, tuple[str, ...]] = {
    "neuron": ("neuron-native", "neuron-nxdi"),
    "native": ("neuron-native",),
    "nxdi": ("neuron-nxdi",),
}
"""Keys of a target that only some lanes have."""


@dataclass(frozen=True)
class Finding:
    """Something that contradicts something else."""

    location: Location
    message: str
    """What is wrong, one sentence."""
    remedy: str
    """What would be right, one sentence."""

    def below(self, *location: str | int) -> Finding:
        """Return the finding as seen from further out."""
        return replace(self, location=(*location, *self.location))


def spec_findings(spec: ModelSpec) -> Iterator[Finding]:
    """Yield every contradiction inside a model spec (which may have holes)."""
    if known(spec, "source"):
        yield from _below(source_findings(spec.source), "source")
    targets = spec.targets if known(spec, "targets") else ()
    yield from _below(_repeated(targets, "target"), "targets")
    for index, target in enumerate(targets):
        yield from _below(target_findings(target), "targets", index)
    if known(spec, "gates"):
        yield from _below(gate_findings(spec, targets), "gates")
    if known(spec, "rollout"):
        yield from _below(rollout_findings(spec.rollout), "rollout")
    if known(spec, "refresh") and spec.refresh is not None and known(spec.refresh, "cron"):
        problem = cron_problem(spec.refresh.cron)
        if problem is not None:
            yield Finding(
                ("refresh", "cron"),
                problem,
                "Write minute, hour, day of the month, month and day of the week, "
                "such as `0 3 * * mon`.",
            )


def gate_findings(spec: ModelSpec, targets: Sequence[Target]) -> Iterator[Finding]:
    """Yield contradictions inside the gates, and between their loads and the targets."""
    gates = spec.gates
    if known(gates, "accuracy"):
        yield from _below(_accuracy_findings(spec, targets), "accuracy")
    if known(gates, "behaviour") and known(gates.behaviour, "waivers"):
        yield from _below(waiver_findings(gates.behaviour.waivers), "behaviour", "waivers")
    if not known(gates, "latency"):
        return
    yield from _below(latency_findings(gates.latency), "latency")
    if known(gates.latency, "levels"):
        levels = gates.latency.levels
        yield from _below(_repeated(levels, "level"), "latency", "levels")
        for index, level in enumerate(levels):
            yield from _below(level_findings(level), "latency", "levels", index)
            yield from _below(fit_findings(level, targets), "latency", "levels", index)
    if known(gates, "cost") and gates.cost is not None:
        yield from _below(cost_findings(gates.cost, gates.latency), "cost")


def waiver_findings(waivers: Mapping[BehaviourName, BehaviourWaiver]) -> Iterator[Finding]:
    """Yield which waivers say nothing."""
    for name, waiver in waivers.items():
        if known(waiver, "reason") and not waiver.reason.strip():
            yield Finding(
                (name, "reason"),
                f"Nobody can tell why {name} is waived.",
                "Write the reason as a sentence: the verdict shows it.",
            )


def source_findings(source: Source) -> Iterator[Finding]:
    """Yield what is wrong with a source."""
    for name, value in vars(source).items():
        if any(holds_secret(text) for text in ([value] if isinstance(value, str) else value or ())):
            yield Finding((name,), "Credentials do not belong into a spec.", SECRETS_ELSEWHERE)
    if isinstance(source, LocalSource):
        if known(source, "path"):
            yield from _below(_path_findings(source.path), "path")
    else:
        yield from _pattern_findings(source)
    if isinstance(source, HuggingFaceSource):
        yield from _hub_findings(source)
    elif isinstance(source, S3Source):
        yield from _s3_findings(source)
    if known(source, "allow_files"):
        yield from _below(_allowed_findings(source.allow_files), "allow_files")


def _path_findings(path: str) -> Iterator[Finding]:
    for variable in re.findall(r"\$\{?([A-Za-z0-9_]*)\}?", path):
        if variable != "TRAINYARD_HOME":
            yield Finding(
                (),
                f"{path!r} uses a variable that has no meaning here.",
                "Only ${TRAINYARD_HOME} is filled in.",
            )


def _pattern_findings(source: HuggingFaceSource | S3Source) -> Iterator[Finding]:
    for name in ("allow_patterns", "ignore_patterns"):
        for index, pattern in enumerate(getattr(source, name) if known(source, name) else ()):
            if _leaves_folder(pattern):
                yield Finding(
                    (name, index),
                    f"{pattern!r} can match nothing: names of files are relative, without '..'.",
                    "Write a pattern such as `*.safetensors`.",
                )
    if not known(source, "allow_patterns", "ignore_patterns"):
        return
    allow, ignore = source.allow_patterns, source.ignore_patterns
    needed = ("config.json", "tokenizer.json")
    if left_out := [path for path in needed if not selected(path, allow=allow, ignore=ignore)]:
        key = "ignore_patterns" if matches(left_out[0], ignore) else "allow_patterns"
        yield Finding(
            (key,),
            f"The patterns leave out {' and '.join(left_out)}, and no model loads without.",
            f"Change {key} so that {' and '.join(left_out)} counts.",
        )
    for index, name in enumerate(source.allow_files if known(source, "allow_files") else ()):
        if not selected(name, allow=allow, ignore=ignore):
            yield Finding(
                ("allow_files", index),
                f"{name!r} is allowed here, and left out by allow_patterns or ignore_patterns.",
                "Decide for one of the two.",
            )


def _hub_findings(source: HuggingFaceSource) -> Iterator[Finding]:
    if known(source, "repo") and any(part in source.repo for part in ("--", "..")):
        yield Finding(
            ("repo",),
            f"{source.repo!r} is no name that the Hub gives: it has '--' or '..' in it.",
            "Write the model's name on the Hub, such as `organization/model`.",
        )
    if known(source, "revision") and source.revision and ".." in source.revision:
        yield Finding(
            ("revision",),
            f"{source.revision!r} is no revision: it has '..' in it.",
            "Write a branch, a tag or a commit, such as `main`.",
        )


def _s3_findings(source: S3Source) -> Iterator[Finding]:
    if known(source, "uri") and any(part in {".", ".."} for part in source.uri.split("/")):
        yield Finding(
            ("uri",),
            f"{source.uri!r} has '.' or '..' among its folders, which mean nothing in S3.",
            "Write the prefix as it is in the bucket.",
        )
    without_folders = known(source, "layout", "latest") and source.layout == "snapshot"
    if without_folders and source.latest != "name":
        yield Finding(
            ("latest",),
            f"latest: {source.latest} chooses a subfolder, and layout snapshot has none.",
            "Remove latest, or choose layout subfolders.",
        )


def _allowed_findings(names: Sequence[str]) -> Iterator[Finding]:
    for index, name in enumerate(names):
        if _leaves_folder(name) or "/" in name or re.search(r"[*?\[\]]", name):
            yield Finding(
                (index,),
                f"{name!r} is not the exact name of one file at the top of the model.",
                "Write each name out, such as `modeling_x.py`.",
            )
        elif name in names[:index]:
            yield Finding((index,), f"{name} is allowed twice.", "Name it once.")


def _leaves_folder(text: str) -> bool:
    return (
        not text.strip()
        or text.startswith("/")
        or "\\" in text
        or not text.isprintable()
        or ".." in text.split("/")
    )


def target_findings(target: Target) -> Iterator[Finding]:
    """Yield contradictions between a target's settings that hold on every lane."""
    if known(target, "max_num_batched_tokens", "max_num_seqs"):
        tokens, requests = target.max_num_batched_tokens, target.max_num_seqs
        if tokens < requests:
            yield Finding(
                ("max_num_batched_tokens",),
                f"max_num_batched_tokens {tokens} is less than max_num_seqs {requests}; each "
                "running request needs one token of a step.",
                f"Give at least {requests}, or a smaller max_num_seqs.",
            )
    if known(target, "block_size", "max_model_len"):
        size, length = target.block_size, target.max_model_len
        if size is not None and size > length:
            yield Finding(
                ("block_size",),
                f"block_size {size} is more than max_model_len {length}.",
                f"Give at most {length}, or leave it out for the lane's default.",
            )
    yield from _lane_part_findings(target)


def _lane_part_findings(target: Target) -> Iterator[Finding]:
    """Yield the parts of a target that belong to another lane."""
    if not known(target, "lane"):
        return
    for part, lanes in LANE_PARTS.items():
        if known(target, part) and getattr(target, part) is not None and target.lane not in lanes:
            yield Finding(
                (part,),
                f"{part} is for lane {' and '.join(lanes)}, and this target's is {target.lane}.",
                f"Remove {part}, or change the lane.",
            )


def _accuracy_findings(spec: ModelSpec, targets: Sequence[Target]) -> Iterator[Finding]:
    accuracy = spec.gates.accuracy
    if known(accuracy, "tasks"):
        yield from _below(_repeated(accuracy.tasks, "task"), "tasks")
    if known(accuracy, "parity") and accuracy.parity is not None:
        yield from _below(parity_findings(accuracy.parity, spec, targets), "parity")
    if known(accuracy, "logit_validation") and accuracy.logit_validation is not None:
        findings = logit_findings(accuracy.logit_validation, spec, targets)
        yield from _below(findings, "logit_validation")


def logit_findings(
    validation: LogitValidation, spec: ModelSpec, targets: Sequence[Target]
) -> Iterator[Finding]:
    """Yield why AWS's logit validation cannot be made."""
    parity = spec.gates.accuracy.parity if known(spec.gates.accuracy, "parity") else None
    prompts = parity.prompts if parity is not None and known(parity, "prompts") else None
    if known(spec, "prompts") and not (prompts or spec.prompts):
        yield Finding(
            (),
            "There are no prompts to compare logits of.",
            "Give `prompts` at the top of the spec.",
        )
    lanes = [target.lane for target in targets if known(target, "lane")]
    if len(lanes) == len(targets) and lanes and LOGIT_LANE not in lanes:
        yield Finding(
            (),
            f"AWS's logit validation is part of the image of lane {LOGIT_LANE}, and no target is "
            f"of that lane ({', '.join(dict.fromkeys(lanes))}).",
            "Leave it out: parity compares what is served with the checkpoint on every lane.",
        )
    if known(validation, "output_tokens"):
        for target in targets:
            short = known(target, "max_model_len", "lane") and target.lane == LOGIT_LANE
            if short and validation.output_tokens >= target.max_model_len:
                yield Finding(
                    ("output_tokens",),
                    f"{validation.output_tokens} tokens leave no room for a prompt in "
                    f"max_model_len {target.max_model_len}.",
                    f"Give less than {target.max_model_len}.",
                )


def parity_findings(
    parity: ParityCheck, spec: ModelSpec, targets: Sequence[Target]
) -> Iterator[Finding]:
    """Yield what is wrong with the parity check."""
    if known(parity, "prompts") and known(spec, "prompts") and not (parity.prompts or spec.prompts):
        yield Finding(
            ("prompts",),
            "There are no prompts to compare answers to.",
            "Give `prompts` here or at the top of the spec.",
        )
    if known(parity, "num_prompts", "max_tokens"):
        positions = parity.num_prompts * parity.max_tokens
        if positions > MAX_PARITY_POSITIONS:
            yield Finding(
                ("num_prompts",),
                f"{parity.num_prompts} prompts of {parity.max_tokens} tokens are {positions} "
                f"positions, and a reference holds {MAX_PARITY_POSITIONS}.",
                "Give fewer prompts or a smaller max_tokens.",
            )
    if known(parity, "max_tokens"):
        for target in targets:
            if known(target, "max_model_len") and parity.max_tokens >= target.max_model_len:
                yield Finding(
                    ("max_tokens",),
                    f"Answers of {parity.max_tokens} tokens leave no room for a prompt in "
                    f"max_model_len {target.max_model_len}.",
                    f"Give less than {target.max_model_len}.",
                )
    if known(parity, "bounds"):
        for metric, bound in parity.bounds.items():
            findings = [*_bound_findings(bound), *_parity_bound_findings(metric, bound)]
            yield from _below(findings, "bounds", metric)
        yield from _below(_ratio_findings(parity, targets), "bounds")


def _parity_bound_findings(metric: str, bound: Bound) -> Iterator[Finding]:
    if not known(bound, "min", "max"):
        return
    limits = [("min", bound.min), ("max", bound.max)]
    highest = 1.0 if metric in PARITY_SHARES else float("inf")
    for name, limit in limits:
        if limit is not None and not 0 <= limit <= highest:
            yield Finding(
                (name,),
                f"{metric} is never {limit:g}.",
                "Give a share from 0 to 1." if highest == 1 else "Give a number of at least 0.",
            )


def _ratio_findings(parity: ParityCheck, targets: Sequence[Target]) -> Iterator[Finding]:
    """Yield why the ratio to the served number format's rounding cannot be told."""
    if "error_ratio" not in parity.bounds:
        return
    if known(parity, "dtype") and parity.dtype != "float32":
        yield Finding(
            ("error_ratio",),
            "error_ratio tells a served number format from its rounding, and a reference in "
            f"{parity.dtype} has rounding of its own.",
            "Set dtype: float32, or bound logprob_error instead.",
        )
    for target in targets:
        if known(target, "dtype", "name") and target.dtype == "float32":
            yield Finding(
                ("error_ratio",),
                f"Target {target.name} serves in float32, where a float32 reference rounds alike.",
                "Bound logprob_error instead.",
            )


def latency_findings(gate: LatencyGate) -> Iterator[Finding]:
    """Yield contradictions between SLO, search and load levels."""
    levels = gate.levels if known(gate, "levels") else ()
    slo = gate.slo if known(gate, "slo") else None
    if slo is not None:
        limits = ("ttft_ms", "tpot_ms", "e2e_ms")
        if known(slo, *limits) and not any(getattr(slo, name) for name in limits):
            yield Finding(
                ("slo",), "The SLO limits nothing.", f"Give at least one of {', '.join(limits)}."
            )
        if not levels and not known(gate, "levels"):
            yield Finding(
                ("slo",),
                "The SLO has no load level at which it could be looked at.",
                "Describe the load under gates.latency.levels.",
            )
    elif known(gate, "slo"):
        for index, level in enumerate(levels):
            for part in ("bounds", "max_regression"):
                for metric in getattr(level, part) if known(level, part) else ():
                    if metric in SLO_METRICS:
                        yield Finding(
                            ("levels", index, part, metric),
                            f"{metric} is a figure of requests that keep the SLO, and there is "
                            "none.",
                            "Add gates.latency.slo.",
                        )
    if known(gate, "search", "slo") and gate.search is not None:
        yield from _below(_search_findings(gate.search, gate, levels), "search")


def _search_findings(
    search: RateSearch, gate: LatencyGate, levels: Sequence[LoadLevel]
) -> Iterator[Finding]:
    names = [level.name for level in levels if known(level, "name")]
    if known(search, "level") and known(gate, "levels") and search.level not in names:
        yield Finding(
            ("level",), f"There is no load level {search.level!r}.", choose(search.level, names)
        )
    if known(search, "min_rate", "max_rate") and search.min_rate > search.max_rate:
        yield Finding(
            ("min_rate",),
            f"min_rate {search.min_rate:g} is above max_rate {search.max_rate:g}.",
            "Exchange or correct the two.",
        )
    if known(search, "bound") and search.bound is not None:
        yield from _below(_bound_findings(search.bound), "bound")
        if known(search, "max_rate") and (search.bound.min or 0) > search.max_rate:
            yield Finding(
                ("bound", "min"),
                f"min {search.bound.min:g} is above max_rate {search.max_rate:g}, the highest that "
                "is tried; nothing can pass.",
                "Raise max_rate, or lower min.",
            )
    if gate.slo is None:
        yield Finding((), "Without an SLO no rate meets it.", "Add gates.latency.slo.")
    elif known(gate.slo, "ttft_ms", "e2e_ms") and not (gate.slo.ttft_ms or gate.slo.e2e_ms):
        # A server that queues keeps its time per token: every rate would do.
        yield Finding(
            (),
            "tpot_ms alone does not tell how many requests wait.",
            "Give the SLO ttft_ms or e2e_ms as well.",
        )


def cost_findings(cost: CostGate, latency: LatencyGate) -> Iterator[Finding]:
    """Yield why the cost of tokens could not be told, and contradictions of its bounds."""
    if known(latency, "slo") and latency.slo is None:
        yield Finding(
            (),
            "Tokens are priced at the load that the SLO allows, and there is none.",
            "Add gates.latency.slo.",
        )
    if known(cost, "bounds"):
        for metric, bound in cost.bounds.items():
            yield from _below(_bound_findings(bound), "bounds", metric)


def level_findings(level: LoadLevel) -> Iterator[Finding]:
    """Yield contradictions inside one load level."""
    yield from _load_findings(level)
    yield from _length_findings(level)
    if known(level, "bounds"):
        for metric, bound in level.bounds.items():
            yield from _below(_bound_findings(bound), "bounds", metric)
        yield from _below(_order_findings(level.bounds), "bounds")


def _load_findings(level: LoadLevel) -> Iterator[Finding]:
    if not known(level, "max_concurrency"):
        return
    if level.max_concurrency is None:
        if known(level, "request_rate") and level.request_rate is None:
            yield Finding(
                ("max_concurrency",),
                "The level says neither how many requests run at a time nor how many come.",
                "Give max_concurrency, request_rate, or both.",
            )
    elif known(level, "num_prompts") and level.num_prompts < level.max_concurrency:
        yield Finding(
            ("num_prompts",),
            f"num_prompts {level.num_prompts} never reaches max_concurrency "
            f"{level.max_concurrency}.",
            f"Give at least {level.max_concurrency} prompts, better several times as many.",
        )


def _length_findings(level: LoadLevel) -> Iterator[Finding]:
    if not known(level, "prompts", "input_len", "output_len"):
        return
    if level.prompts is None:
        for name in ("input_len", "output_len"):
            if getattr(level, name) is None:
                yield Finding(
                    (name,),
                    f"The key {name!r} is missing.",
                    f"Add `{name}:`, or `prompts:` with a file of real prompts.",
                )
        return
    if level.input_len is not None:
        yield Finding(
            ("input_len",),
            "prompts brings the prompts, so they have the lengths they have.",
            "Remove input_len, or prompts.",
        )
    for name in ("input_range", "output_range"):
        if known(level, name) and getattr(level, name):
            yield Finding((name,), f"{name} is for random prompts.", f"Remove {name}, or prompts.")


def _bound_findings(bound: Bound) -> Iterator[Finding]:
    if not known(bound, "min", "max"):
        return
    if bound.min is None and bound.max is None:
        yield Finding((), "The bound has neither min nor max.", "Give at least one of them.")
    elif bound.min is not None and bound.max is not None and bound.min > bound.max:
        yield Finding(
            ("min",),
            f"min {bound.min:g} is above max {bound.max:g}; nothing can pass.",
            "Exchange or correct the two.",
        )
    elif bound.max is not None and bound.max < 0:
        yield Finding(
            ("max",),
            f"max {bound.max:g} is below 0, and no figure is; nothing can pass.",
            "Give 0 or more.",
        )


def _order_findings(bounds: Mapping[LatencyMetric, Bound]) -> Iterator[Finding]:
    """Yield bounds that no figures can keep together."""
    attainment = bounds.get("slo_attainment")
    if attainment is not None and known(attainment, "min") and (attainment.min or 0) > 1:
        yield Finding(
            ("slo_attainment", "min"),
            f"min {attainment.min:g} is above 1, and slo_attainment is a share of 1.",
            "Give 1 or less, such as 0.99.",
        )
    for low, high in _percentile_pairs(bounds):
        least, most = bounds[low], bounds[high]
        if not (known(least, "min") and known(most, "max")):
            continue
        if least.min is not None and most.max is not None and least.min > most.max:
            yield Finding(
                (low, "min"),
                f"min {least.min:g} is above max {most.max:g} of {high}, which is never below "
                f"{low}; nothing can pass.",
                "Correct one of the two.",
            )


def _percentile_pairs(
    bounds: Mapping[LatencyMetric, Bound],
) -> Iterator[tuple[LatencyMetric, LatencyMetric]]:
    """Yield pairs of figures of which the first is never above the second."""
    places = {metric: re.fullmatch(r"(\w+)_p(\d+)_ms", metric) for metric in bounds}
    for low, first in places.items():
        for high, second in places.items():
            if first and second and first[1] == second[1] and int(first[2]) < int(second[2]):
                yield low, high


def fit_findings(level: LoadLevel, targets: Sequence[Target]) -> Iterator[Finding]:
    """Yield the targets whose longest sequence is too short for a load level."""
    if not known(level, "input_len", "output_len", "input_range", "output_range"):
        return
    if level.output_len is None or (level.input_len is None and level.prompts is None):
        return
    answer = math.ceil(level.output_len * (1 + level.output_range))
    prompt = math.ceil((level.input_len or 1) * (1 + level.input_range))
    for target in targets:
        if known(target, "max_model_len") and prompt + answer > target.max_model_len:
            name = target.name if known(target, "name") else "without a name"
            yield Finding(
                ("output_len",),
                f"{_lengths(level)} is {prompt + answer}, more than max_model_len "
                f"{target.max_model_len} of target {name}.",
                f"Keep the sum at {target.max_model_len} or less, or raise max_model_len.",
            )


def _lengths(level: LoadLevel) -> str:
    """Return the sum of a level's longest prompt and answer, in words."""
    prompt = "a prompt" if level.input_len is None else f"input_len {level.input_len}"
    if level.input_range:
        prompt += f" + {level.input_range:.0%}"
    answer = f"output_len {level.output_len}"
    if level.output_range:
        answer += f" + {level.output_range:.0%}"
    return f"{prompt} + {answer}"


def rollout_findings(rollout: RolloutSpec) -> Iterator[Finding]:
    """Yield contradictions inside the rollout's settings."""
    if known(rollout, "steps"):
        yield from _below(_step_findings(rollout), "steps")
        steps = rollout.steps
        holds = sum(step.hold_s for step in steps if known(step, "hold_s"))
        if known(rollout, "max_duration_s") and holds > rollout.max_duration_s:
            yield Finding(
                ("max_duration_s",),
                f"The steps hold for {holds:g} s, longer than max_duration_s "
                f"{rollout.max_duration_s:g}.",
                f"Give at least {holds:g}, or shorter holds.",
            )
    yield from _probe_findings(rollout)
    if not known(rollout, "judge"):
        return
    judge = rollout.judge
    if known(rollout, "max_duration_s") and known(judge, "block_s", "min_blocks_last_step"):
        needed = judge.block_s * judge.min_blocks_last_step
        if needed > rollout.max_duration_s:
            yield Finding(
                ("judge", "block_s"),
                f"{judge.min_blocks_last_step} blocks of {judge.block_s:g} s do not fit into "
                f"max_duration_s {rollout.max_duration_s:g}.",
                "Give shorter blocks or a longer max_duration_s.",
            )
    yield from _below(_margin_findings(judge), "judge", "margins")


def _probe_findings(rollout: RolloutSpec) -> Iterator[Finding]:
    if not known(rollout, "probes"):
        return
    probes = rollout.probes
    if probes is not None and known(rollout, "capacity") and rollout.capacity == "single":
        yield Finding(
            ("probes",),
            "With capacity single the two releases never serve at the same time, so there is "
            "nothing to compare.",
            "Remove the probes, or choose replace or surge.",
        )
    judged = known(rollout, "judge") and known(rollout.judge, "margins")
    if probes is None and judged and "quality" in rollout.judge.margins:
        yield Finding(
            ("judge", "margins", "quality"),
            "Only probes tell of quality, and there are none.",
            "Add `rollout.probes`, or remove the margins.",
        )


def _step_findings(rollout: RolloutSpec) -> Iterator[Finding]:
    steps = rollout.steps
    if not steps:
        yield Finding(
            (),
            "A rollout without steps would give a candidate all traffic at once.",
            "Give at least one step, such as `{weight: 50, hold_s: 600}`.",
        )
        return
    for index, (before, after) in enumerate(pairwise(steps), start=1):
        if known(before, "weight") and known(after, "weight") and after.weight <= before.weight:
            yield Finding(
                (index, "weight"),
                f"Weight {after.weight} follows weight {before.weight}; the weights must grow.",
                f"Give more than {before.weight}, or remove the step.",
            )
    first, last = steps[0], steps[-1]
    surge = known(rollout, "capacity") and rollout.capacity == "surge"
    if surge and known(first, "weight") and first.weight > 50:
        yield Finding(
            (0, "weight"),
            f"The first weight {first.weight} gives the candidate's servers more load than the "
            "stable release's, so their latencies could never be compared.",
            "Begin with 50 or less.",
        )
    if known(last, "weight") and known(rollout, "holdback_weight"):
        share = 100 - rollout.holdback_weight
        if last.weight > share:
            yield Finding(
                (len(steps) - 1, "weight"),
                f"The last weight {last.weight} is more than the {share} % that the candidate "
                f"has in the bake, where holdback_weight {rollout.holdback_weight} stays behind.",
                f"Give at most {share}, or a smaller holdback_weight.",
            )


def _margin_findings(judge: JudgeSettings) -> Iterator[Finding]:
    if not known(judge, "margins"):
        return
    for metric, margins in judge.margins.items():
        kind = "average" if metric in AVERAGES else "count"
        yield from _below(_one_margin(metric, kind, margins), metric)


def _one_margin(metric: str, kind: str, margins: Margins) -> Iterator[Finding]:
    if known(margins, "harm", "promote") and margins.harm > margins.promote:
        yield Finding(
            ("harm",),
            f"harm {margins.harm:g} is above promote {margins.promote:g}; a candidate between the "
            "two could be neither rolled back nor promoted.",
            f"Give at most {margins.promote:g}.",
        )
    if kind == "count":
        for name in ("harm", "promote"):
            if known(margins, name) and getattr(margins, name) < 1:
                yield Finding(
                    (name,),
                    f"{name} {getattr(margins, name):g} is below 1; {metric} is a count and its "
                    "margin a ratio to the stable release.",
                    "Give 1 or more; 2 is twice as many.",
                )
        floors = known(margins, "harm_floor", "promote_ceiling")
        if floors and margins.harm_floor > margins.promote_ceiling > 0:
            yield Finding(
                ("harm_floor",),
                f"harm_floor {margins.harm_floor:g} is above promote_ceiling "
                f"{margins.promote_ceiling:g}.",
                f"Give at most {margins.promote_ceiling:g}.",
            )
        return
    for name in ("harm_floor", "promote_ceiling"):
        if known(margins, name) and getattr(margins, name) > 0:
            yield Finding(
                (name,),
                f"{metric} is an average and has no {name}.",
                "Remove the key; it is for errors, ttft_tail and quality.",
            )


def environments_findings(environments: Environments) -> Iterator[Finding]:
    """Yield every contradiction inside the environments file (which may have holes)."""
    if not known(environments, "environments"):
        return
    by_name = environments.environments
    for name, environment in by_name.items():
        yield from _below(_environment_findings(environment), "environments", name)
    yield from _below(_requires_findings(by_name), "environments")
    yield from _people_findings(environments)


def _environment_findings(environment: Environment) -> Iterator[Finding]:
    if known(environment, "capacity", "allow_downtime", "devices"):
        if environment.capacity == "single" and not environment.allow_downtime:
            yield Finding(
                ("capacity",),
                "capacity single stops the stable release before the candidate starts, and "
                "allow_downtime is false.",
                "Set allow_downtime: true, or choose replace or surge.",
            )
        elif environment.capacity != "single" and environment.devices < 2:
            yield Finding(
                ("capacity",),
                f"capacity {environment.capacity} needs room for two servers, and devices is "
                f"{environment.devices}.",
                "Give 2 or more devices, or choose single and set allow_downtime: true.",
            )
    if known(environment, "soak_s", "requires") and environment.soak_s and not environment.requires:
        yield Finding(
            ("soak_s",),
            "soak_s counts in the required environments, and requires names none.",
            "Name the environment to soak in under requires, or remove soak_s.",
        )
    yield from _place_findings(environment)
    yield from _window_findings(environment)
    if known(environment, "metrics"):
        yield from _below(_metrics_findings(environment.metrics), "metrics")


def _metrics_findings(source: MetricsSource) -> Iterator[Finding]:
    """Yield where the keys of a source of metrics contradict each other."""
    if not known(source, "source", "url", "auth"):
        return
    if source.source == "scrape":
        if source.url is not None:
            yield Finding(
                ("url",),
                "source scrape asks each server itself and has no url.",
                "Remove url, or set source: prometheus.",
            )
        return
    if source.url is None:
        yield Finding(
            ("source",),
            "source prometheus needs to know where.",
            "Add `url`: what comes before `/api/v1/query`.",
        )
    elif source.auth != "none" and not _is_private(source.url):
        yield Finding(
            ("url",),
            f"auth {source.auth} would go over the network in the clear.",
            "Write https://, or set auth: none.",
        )


def _is_private(url: str) -> bool:
    """Tell whether nobody but the server can read what is sent to it."""
    host = re.sub(r"^https?://|[:/].*$", "", url)
    return url.startswith("https://") or host in {"127.0.0.1", "localhost"}


def _window_findings(environment: Environment) -> Iterator[Finding]:
    """Yield windows without promotions that make no sense."""
    for index, window in enumerate(environment.freeze if known(environment, "freeze") else ()):
        # Beside other mistakes values are still text.
        moments = [each for each in vars(window).values() if isinstance(each, datetime)]
        if len(moments) == 2 and window.end <= window.start:
            yield Finding(
                ("freeze", index, "end"),
                "The window ends before it begins.",
                "Give an end after the start.",
            )
    if not known(environment, "quiet_hours"):
        return
    findings = [
        finding.below("quiet_hours", index)
        for index, hours in enumerate(environment.quiet_hours)
        for finding in _hours_findings(hours)
    ]
    yield from findings
    sound = not findings and all(map(whole, environment.quiet_hours))
    if sound and has_time_zones() and never_opens(environment.quiet_hours):
        yield Finding(
            ("quiet_hours",),
            "The quiet hours leave no minute of the week.",
            "Leave some hours in which promotions may begin.",
        )


def _hours_findings(hours: QuietHours) -> Iterator[Finding]:
    # Images that only serve have no database of time zones, and no need of one.
    if known(hours, "time_zone") and has_time_zones():
        try:
            time_zone(hours.time_zone)
        except BadInput as error:
            yield Finding(("time_zone",), error.message, error.hint)
    if known(hours, "start", "end") and hours.start == hours.end:
        yield Finding(
            ("end",),
            f"They begin and end at {hours.end}.",
            'Write `start: "00:00"` and `end: "24:00"` for whole days.',
        )


def _people_findings(environments: Environments) -> Iterator[Finding]:
    """Yield what is wrong with who may do what, who approves and who is told."""
    if not known(environments, "groups", "release"):
        return
    groups = environments.groups
    yield from _below(_group_findings(environments.release, groups), "release")
    for name, environment in environments.environments.items():
        if known(environment, "allowed", "approval") and whole(environment.allowed):
            yield from _below(_permission_findings(environment, groups), "environments", name)
        yield from _below(_told_findings(environment), "environments", name)
    yield from _told_findings(environments)


def _permission_findings(
    environment: Environment, groups: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    for act in ("promote", "rollback", "approve"):
        yield from _below(
            _group_findings(getattr(environment.allowed, act), groups), "allowed", act
        )
    approval, approvers = environment.approval, environment.allowed.approve
    if approval is None or not whole(approval) or approvers is None or approvers.roles:
        return
    people = {*approvers.users, *(who for name in approvers.groups for who in groups.get(name, ()))}
    if len(people) < approval.needs:
        yield Finding(
            ("approval", "needs"),
            f"{approval.needs} people have to approve, and allowed.approve names {len(people)}.",
            "Name more people, or ask for fewer.",
        )


def _group_findings(
    allowed: Allowed | None, groups: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    named = allowed.groups if allowed is not None and known(allowed, "groups") else ()
    for index, name in enumerate(named):
        if name not in groups:
            yield Finding(
                ("groups", index),
                f"There is no group {name!r}.",
                choose(name, list(groups)) if groups else "Add it under `groups`.",
            )


def _told_findings(part: Environment | Environments) -> Iterator[Finding]:
    for index, each in enumerate(part.notify if known(part, "notify") else ()):
        yield from _below(_notify_findings(each), "notify", index)


def _notify_findings(notify: Notify) -> Iterator[Finding]:
    if not whole(notify):
        return
    if bool(notify.to) != (notify.kind == "email"):
        yield Finding(
            ("to",),
            f"to has {len(notify.to)} addresses, and the kind is {notify.kind}.",
            "Addresses are for kind email, which needs at least one.",
        )
    if (notify.topic is not None) != (notify.kind == "sns"):
        yield Finding(
            ("topic",),
            f"topic is {'given' if notify.topic else 'missing'}, and the kind is {notify.kind}.",
            "A topic is for kind sns, which needs one.",
        )


def _place_findings(environment: Environment) -> Iterator[Finding]:
    """Yield where an environment's platform and its place in a cluster contradict each other."""
    if not known(environment, "platform", "kubernetes"):
        return
    if environment.platform == "kubernetes" and environment.kubernetes is None:
        yield Finding(
            ("platform",),
            "Platform kubernetes needs to know where in the cluster servers run.",
            "Add `kubernetes: {namespace: …}`, with the namespace that `k8s/` made.",
        )
    elif environment.platform != "kubernetes" and environment.kubernetes is not None:
        yield Finding(
            ("kubernetes",),
            f"kubernetes is for platform kubernetes, and the platform is {environment.platform}.",
            "Remove it, or set platform: kubernetes.",
        )


def _requires_findings(environments: Mapping[str, Environment]) -> Iterator[Finding]:
    required = {
        name: environment.requires if known(environment, "requires") else ()
        for name, environment in environments.items()
    }
    circles = _circles(required)
    for circle in circles:
        yield Finding(
            (circle[0], "requires"),
            f"The environments require each other: {' → '.join(circle)}.",
            "Remove one of the requirements.",
        )
    earlier: set[str] = set()
    for name, needed in required.items():
        for index, other in enumerate(needed):
            problem = None
            if other in needed[:index]:
                problem = (f"{other} is required twice.", "Name it once.")
            elif other not in environments:
                others = [each for each in environments if each != name]
                problem = (f"There is no environment {other!r}.", choose(other, others))
            elif other not in earlier and not any(other in circle for circle in circles):
                problem = (
                    f"{name} requires {other}, which comes after it.",
                    f"Move {other} above {name}: releases pass through in this order.",
                )
            if problem is not None:
                yield Finding((name, "requires", index), *problem)
        earlier.add(name)


def _circles(required: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the circles of environments that require each other, each with its first repeated."""
    graph = {name: set(needed) for name, needed in required.items()}
    circles: list[list[str]] = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            # The error lists each before the one that requires it.
            circle = list(reversed(error.args[1]))
            circles.append(circle)
            graph[circle[0]].discard(circle[1])
        else:
            return circles


def refresh_findings(spec: ModelSpec, environments: Environments) -> Iterator[Finding]:
    """Yield what is wrong with a spec's refresh, given the environments."""
    if not (known(spec, "refresh", "targets") and known(environments, "environments")):
        return
    if spec.refresh is None or not known(spec.refresh, "environments"):
        return
    named = [target.name for target in spec.targets if known(target, "name")]
    findings = destination_findings(
        spec.refresh.environments, environments, named, promoted=lambda _name: False
    )
    yield from _below(findings, "refresh", "environments")
    for name in spec.refresh.environments:
        environment = environments.environments.get(name)
        if environment is not None and known(spec, "rollout"):
            yield from _below(room_findings(spec.rollout, name, environment), "rollout")


def destination_findings(
    wanted: Sequence[str],
    environments: Environments,
    targets: Sequence[str],
    *,
    promoted: Callable[[str], bool],
) -> Iterator[Finding]:
    """Yield why a release cannot go to the environments `wanted`, in this order.

    Args:
        wanted: names of environments.
        environments: all there are.
        targets: names of the targets that the release has.
        promoted: may an environment count as passed although it is not in `wanted` before?
    """
    every = environments.environments
    for index, name in enumerate(wanted):
        if name in wanted[:index]:
            yield Finding((index,), f"{name} is named twice.", "Name it once.")
            continue
        environment = every.get(name)
        if environment is None:
            yield Finding((index,), f"There is no environment {name!r}.", choose(name, list(every)))
            continue
        if known(environment, "target") and environment.target not in targets:
            yield Finding(
                (index,),
                f"Environment {name} serves target {environment.target!r}, and the release has "
                f"{', '.join(targets) or 'none'}.",
                f"Add target {environment.target}, or leave {name} out.",
            )
        if not known(environment, "requires"):
            continue
        for needed in environment.requires:
            if needed in every and needed not in wanted[:index] and not promoted(needed):
                yield Finding(
                    (index,),
                    f"Environment {name} requires {needed}, where the release has not been.",
                    f"Name {needed} before {name}.",
                )


def room_findings(rollout: RolloutSpec, name: str, environment: Environment) -> Iterator[Finding]:
    """Yield why a rollout does not find room in an environment, at the rollout's keys."""
    if not (known(rollout, "capacity", "replicas") and whole(environment)):
        return
    capacity = min(rollout.capacity, environment.capacity, key=GENEROSITY.index)
    replicas, devices = rollout.replicas, environment.devices
    needed = {"surge": 2 * replicas, "replace": replicas + 1, "single": replicas}[capacity]
    if needed > devices:
        yield Finding(
            ("replicas",),
            f"{replicas} replicas with capacity {capacity} need {needed} servers at the same time; "
            f"environment {name} has room for {devices}.",
            "Ask for fewer replicas or a less generous capacity, or raise `devices` there.",
        )
    elif capacity == "single" and not environment.allow_downtime:
        yield Finding(
            ("capacity",),
            f"capacity single stops the stable release in {name} before the candidate starts, and "
            f"{name} does not allow downtime.",
            "Set allow_downtime: true there, or choose replace or surge.",
        )


def served_findings(environments: Environments, targets: Iterable[str]) -> Iterator[Finding]:
    """Yield the environments whose target no model has."""
    if not known(environments, "environments"):
        return
    every = sorted(set(targets))
    for name, environment in environments.environments.items():
        if known(environment, "target") and environment.target not in every:
            yield Finding(
                ("environments", name, "target"),
                f"No model has a target {environment.target!r}.",
                choose(environment.target, every),
            )


def image_findings(
    name: str, environment: Environment, targets: Iterable[Target]
) -> Iterator[Finding]:
    """Yield the targets that pods of an environment would have no image for, at `environments`."""
    if not known(environment, "kubernetes", "target") or environment.kubernetes is None:
        return
    if not known(environment.kubernetes, "image") or environment.kubernetes.image:
        return
    for target in targets:
        if not known(target, "name", "lane", "neuron") or target.name != environment.target:
            continue
        if target.neuron is not None and (not known(target.neuron, "image") or target.neuron.image):
            continue
        remedy = "Give kubernetes.image there"
        yield Finding(
            ("environments", name, "kubernetes"),
            f"No image is named for the servers of target {target.name} (lane {target.lane}) in "
            f"environment {name}.",
            f"{remedy}." if target.neuron is None else f"{remedy}, or neuron.image of the target.",
        )
        return


def _below(findings: Iterable[Finding], *location: str | int) -> Iterator[Finding]:
    return (finding.below(*location) for finding in findings)


def _repeated(parts: Sequence[Target | LoadLevel | AccuracyTask], what: str) -> Iterator[Finding]:
    seen: set[str] = set()
    for index, part in enumerate(parts):
        if not known(part, "name"):
            continue
        if part.name in seen:
            yield Finding(
                (index, "name"),
                f"There is another {what} named {part.name!r} above.",
                "Rename one of them.",
            )
        seen.add(part.name)
