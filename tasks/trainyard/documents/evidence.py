"""The evidence of a rollout: blocks of counts, what the judge is told, and what it says.

Blocks are stored one JSON object a line in `rollouts/<model>/<environment>/<n>/`. They only ever
grow in number, and every verdict can be derived from them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from trainyard.documents.base import Frozen
from trainyard.spec.model import OTHER_TOKENS, WORSE_ANSWERS, Ending, EndingMargins

Track = Literal["stable", "candidate"]
MetricKind = Literal["mean", "count"]
Outcome = Literal["HARM", "NON_INFERIOR", "UNDECIDED"]
Comparing = Literal["tokens", "answers"]
"""What pairs of probes are compared by: the tokens of the two answers (same checkpoint), or each
answer with its reference."""

QUALITY = "quality"
"""The metric that only probes have."""
PROBE = "probe"
"""The stratum of probes."""


class _Figures(Frozen):
    """A value whose numbers are finite: NaN and infinity are refused, not carried along."""

    model_config = ConfigDict(allow_inf_nan=False)


class Block(_Figures):
    """Counts of one metric on one release (one pod) in one slice of time.

    A metric that could not be read has no block; `requests=0` says that it was read and that
    nothing had arrived.
    """

    t: float
    """End of the slice: seconds since the candidate was first exposed. Rows at or before 0 with
    weight 0 are the history of stable, from which its noise is learned."""
    duration_s: float = Field(gt=0)
    """Length of the slice."""
    release: str = Field(min_length=1)
    """Release id."""
    track: Track
    pod: str = Field(min_length=1)
    """Name of the replica."""
    metric: str = Field(min_length=1)
    """`ttft`, `tpot`, `errors`, `ttft_tail`, `quality`, ..."""
    kind: MetricKind
    requests: int = Field(ge=0)
    """Requests of the slice that have a value of this metric."""
    total: float = Field(default=0.0, ge=0)
    """`mean` only: sum of the metric over the requests, in seconds (`prompts`: in tokens)."""
    bad: int = Field(default=0, ge=0)
    """`count` only: how many of the requests were bad."""
    weight_candidate: int = Field(ge=0, le=100)
    """Percent of the traffic that the candidate had."""
    stratum: str = ""
    """What kind of requests: empty for users' own, else a name such as `probe`. Requests are only
    ever compared within their stratum; the evidence of all strata adds up."""

    @model_validator(mode="after")
    def _no_more_bad_than_requests(self) -> Self:
        if self.bad > self.requests:
            raise ValueError(
                f"{self.bad} bad of {self.requests} requests in {self.metric} of pod {self.pod} "
                f"at {self.t:g} s; count both at the same moment, when a request ends"
            )
        return self


class Covariance(_Figures):
    """How much the log of a pod's average latency moves though nothing changed.

    The difference d of two tracks' log averages has, between the blocks t and u,
    `Cov = K (sb2 + sa2 rho^(|t-u| / rho_lag_s)) + [t = u] (K nug + se2 (1/n_c + 1/n_s))`, where K
    sums the products of the pods' shares (one pod a side: 2; nine and one: 1.11). All of it times
    `inflation`. The defaults stand for an ordinary fleet; they must be fixed before exposure, from
    the history of stable pods where there is one.
    """

    sb2: float = Field(default=0.03**2, ge=0)
    """Variance between pods that lasts (a slower machine). 0.03**2: 3 % standard deviation."""
    sa2: float = Field(default=0.1**2, ge=0)
    """Variance inside a pod that comes and goes over minutes. 0.1**2: 10 %."""
    rho: float = Field(default=0.6, ge=0, lt=1)
    """Correlation of that part between two moments `rho_lag_s` apart."""
    rho_lag_s: float = Field(default=30.0, gt=0)
    """Seconds that `rho` refers to."""
    nug: float = Field(default=0.0, ge=0)
    """Variance of one pod's block average that is new in every block, apart from sampling."""
    se2: float = Field(default=0.4, gt=0)
    """Variance of one request's latency over its squared mean. 0.4: 63 %."""
    most_rps: float | None = Field(default=None, gt=0)
    """Requests a second of a pod up to which `se2` is known to fall with their number; unset: any.
    With little traffic, a pod's passing moods and its requests' own noise look alike."""
    inflation: float = Field(default=1.3, ge=1)
    """Factor on the whole covariance, for what its estimate does not know."""
    pod_floor: float = Field(default=0.03, ge=0)
    """Least standard deviation between pods; `sb2` is not taken below its square."""

    def with_block_noise(self, sd: float) -> Covariance:
        """Return this covariance with extra noise of each pod's block average.

        Args:
            sd: in log units, such as 0.1 for about 10 %, as on a machine that pods share.
        """
        return self.model_copy(update={"nug": self.nug + sd**2})


class MetricSpec(_Figures):
    """One judged metric: its margins and its share of the error budget."""

    name: str = Field(min_length=1)
    kind: MetricKind
    harm_margin: float = Field(gt=0)
    """Harm is more than this. `mean`: relative, 0.10 is 10 % slower. `count`: ratio to stable."""
    promote_margin: float = Field(gt=0)
    """Non-inferior is less than this. `mean`: relative. `count`: ratio to stable."""
    harm_floor: float = Field(default=0.0, ge=0, lt=0.5)
    """`count` only: share of requests that harm must exceed as well."""
    promote_ceiling: float = Field(default=0.0, ge=0, lt=0.5)
    """`count` only: share of requests below which the ratio does not matter."""
    harm_alpha: float = Field(gt=0, lt=0.5)
    """This metric's share of the rollout's false-rollback budget."""
    promote_beta: float = Field(default=0.05, gt=0, lt=0.5)
    """Probability of calling a candidate non-inferior that is exactly at the promotion margin."""
    dispersion: float = Field(default=1.0, ge=1)
    """`count` only: variance of pods' counts over their mean when nothing changed; the evidence of
    counts is divided by it. 1: events come singly, apart from bursts, which are clipped anyway."""
    covariance: Covariance | None = None
    """`mean` only: this metric's own covariance; none: that of the `JudgeSpec`."""
    harm_only: bool = False
    """It can show harm and nothing else: promotion neither waits for it nor asks what it says, so
    its `promote_margin`, `promote_ceiling` and `promote_beta` do not matter. For figures that not
    every server has."""

    @model_validator(mode="after")
    def _ratios_are_not_below_one(self) -> Self:
        if self.kind == "count" and min(self.harm_margin, self.promote_margin) < 1:
            raise ValueError(
                f"the margins of {self.name} are {self.harm_margin:g} and {self.promote_margin:g}; "
                "margins of counts are ratios to stable, so give 1 or more (2 is twice as many)"
            )
        return self


class JudgeSpec(_Figures):
    """Everything the judge needs to know, fixed before the candidate is exposed."""

    metrics: tuple[MetricSpec, ...] = Field(min_length=1)
    max_duration_s: float = Field(gt=0)
    """Seconds of exposure for which the sharper tests are planned."""
    block_s: float = Field(default=30.0, gt=0)
    """Planned length of a slice; no closed block is much shorter."""
    min_requests_per_block: int = Field(default=20, ge=1)
    """Slices are merged until both tracks have so many requests."""
    min_blocks_last_step: int = Field(default=2, ge=1)
    """Promotion only after so many closed blocks of every metric at `last_weight` or more."""
    last_weight: int = Field(default=50, ge=1, le=99)
    """Candidate's percent of the traffic at the last step."""
    last_pods: tuple[int, int] | None = None
    """Pods of stable and of the candidate at the last step, for the information that is planned;
    none: those of the first closed block."""
    covariance: Covariance = Covariance()
    """Of the log averages of every `mean` metric that has none of its own."""
    prompt_drift: float = Field(default=0.1, ge=0)
    """Relative difference between the two tracks' prompts, in tokens, beyond which their latencies
    say nothing. 0: not looked at (two checkpoints may count the same text differently)."""
    prefix_drift: float = Field(default=0.1, ge=0)
    """As `prompt_drift`, of the shares of prompt tokens found in the prefix cache, in absolute
    terms: 0.1 is ten percentage points. 0: not looked at."""
    learn_from_history: bool = True
    """Estimate covariances and dispersions from stable's own pods before exposure, where rows of
    the log tell of at least two of them for half an hour."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"metrics are named twice: {', '.join(sorted(names))}")
        if all(metric.harm_only for metric in self.metrics):
            raise ValueError("no metric is left that promotion waits for; all are harm_only")
        return self


class MetricVerdict(_Figures):
    """What the judge says about one metric."""

    metric: str
    outcome: Outcome
    stable_value: float | None
    """Average in seconds or share of requests over closed blocks, weighted like the candidate's."""
    candidate_value: float | None
    """As `stable_value`, of the candidate."""
    ratio: float | None
    """Candidate's value over stable's."""
    harm_margin: float
    promote_margin: float
    harm_evidence: float
    """Evidence of harm: a z score or the log of an e-value. Compare it with its threshold only."""
    harm_threshold: float
    promote_evidence: float
    """Evidence that the candidate is inside the promotion margin, as `harm_evidence`."""
    promote_threshold: float
    """0: promotion does not wait for this metric, which can only show harm."""
    stable_requests: int
    """Requests in closed blocks."""
    candidate_requests: int
    blocks: int
    """Closed blocks."""
    note: str
    """What a reader should know besides, or empty."""

    @property
    def harm_only(self) -> bool:
        """Can it only show harm? (see `MetricSpec`)"""
        return self.promote_threshold == 0

    @property
    def standing(self) -> str:
        """The outcome for tables; of a metric that can only show harm, whether it has any data."""
        if self.outcome == "HARM" or not self.harm_only:
            return self.outcome
        return "no harm shown" if self.blocks else "no data"

    @property
    def needs_a_word(self) -> bool:
        """Is it worth its place in one line about all metrics?"""
        return not self.harm_only or self.outcome == "HARM" or self.harm_evidence > 0


class Verdict(_Figures):
    """What the judge says about the candidate."""

    outcome: Outcome
    metrics: tuple[MetricVerdict, ...]
    looks: int
    """Closed blocks of the metric that has most."""
    exposed_requests: int
    """Requests that the candidate has answered, closed block or not."""
    at: float
    """Seconds of exposure at the newest slice."""
    reason: str
    """One plain sentence with the figures that decided."""


def default_metrics() -> tuple[MetricSpec, ...]:
    """Return the default metrics. Their shares of false rollbacks sum to 0.9 %."""
    return (
        MetricSpec(
            name="ttft", kind="mean", harm_margin=0.10, promote_margin=0.15, harm_alpha=0.003
        ),
        MetricSpec(
            name="tpot", kind="mean", harm_margin=0.10, promote_margin=0.15, harm_alpha=0.002
        ),
        MetricSpec(
            name="errors",
            kind="count",
            harm_margin=2.0,
            promote_margin=3.0,
            harm_floor=0.005,
            promote_ceiling=0.008,
            harm_alpha=0.003,
        ),
        MetricSpec(
            name="ttft_tail",
            kind="count",
            harm_margin=1.5,
            promote_margin=3.0,
            harm_floor=0.02,
            promote_ceiling=0.03,
            harm_alpha=0.001,
        ),
    )


def quality_metric(comparing: Comparing) -> MetricSpec:
    """Return how pairs of probes are judged; its share of false rollbacks is 0.07 %.

    Requests are pairs, and a bad one is a pair that only this release got wrong. Of tokens, only
    the candidate can be wrong: stable's are the measure, so the shares alone decide. They leave
    room for ties, which another compiler may break in another way.
    """
    floor, ceiling = (0.10, OTHER_TOKENS) if comparing == "tokens" else (0.02, WORSE_ANSWERS)
    return MetricSpec(
        name=QUALITY,
        kind="count",
        harm_margin=1.5,
        promote_margin=3.0,
        harm_floor=floor,
        promote_ceiling=ceiling,
        harm_alpha=0.0007,
    )


def ending_metrics(settings: Mapping[Ending, EndingMargins]) -> tuple[MetricSpec, ...]:
    """Return how the ends of answers are judged: for harm only.

    Their shares of false rollbacks are 0.006 % each: with the default metrics and `quality`, 1 %.

    Args:
        settings: of those that do not have the default ones.
    """
    names: tuple[Ending, ...] = get_args(Ending)
    margins = [(name, settings.get(name, EndingMargins())) for name in names]
    return tuple(
        MetricSpec(
            name=name,
            kind="count",
            harm_margin=its.harm,
            promote_margin=its.harm,
            harm_floor=its.harm_floor,
            harm_alpha=0.00006,
            harm_only=True,
        )
        for name, its in margins
        if its.judged
    )
