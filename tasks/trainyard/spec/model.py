"""The model spec: one YAML file a model, in the catalogue."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, StringConstraints

from trainyard.names import NAME_PATTERN, REVISION_PATTERN
from trainyard.spec.neuron import NativeSettings, NeuronSettings, NxdiSettings
from trainyard.spec.part import SpecPart as SpecPart

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Revision = Annotated[str, StringConstraints(pattern=REVISION_PATTERN)]
LaneName = Literal["cpu", "neuron-native", "neuron-nxdi"]
Capacity = Literal["surge", "replace", "single"]
"""`surge`: the candidate comes on top of the full stable release. `replace`: stable shrinks as the
candidate grows. `single`: the stable release stops before the candidate starts."""
TASK_NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9])?$"
TaskName = Annotated[str, StringConstraints(pattern=TASK_NAME_PATTERN)]
"""Names of accuracy tasks: what lm-evaluation-harness calls them, underscores included."""
SERVED_NAME_PATTERN = r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,199})?$"
INSTANCE_PATTERN = r"^[a-z0-9][a-z0-9.-]{0,49}$"
HUB_REPO_PATTERN = (
    r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?$"
)
HUB_REVISION_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,198}[A-Za-z0-9])?$"
S3_URI_PATTERN = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()=+@ -]+)*/?$"


class LocalSource(SpecPart):
    """A folder on this machine with one subfolder for each revision."""

    kind: Literal["local"]
    """`local`: a folder on this machine."""
    path: str = Field(min_length=1)
    """The folder, absolute or relative to the spec file; `${TRAINYARD_HOME}` is filled in."""
    revision: Revision | None = None
    """The revision that a release takes when it names none. Empty: the newest subfolder by name."""
    allow_files: tuple[str, ...] = ()
    """Exact names of code or pickle files that may go into the checkpoint all the same."""


class HuggingFaceSource(SpecPart):
    """A model on the Hugging Face Hub, or on a mirror that speaks its protocol."""

    kind: Literal["huggingface"]
    """`huggingface`: a model on the Hugging Face Hub."""
    repo: str = Field(pattern=HUB_REPO_PATTERN)
    """The model's name there, such as `organization/model`."""
    revision: Annotated[str, StringConstraints(pattern=HUB_REVISION_PATTERN)] | None = None
    """Branch, tag or commit that a release takes when it names none; always pinned to the commit.
    Empty: the newest commit of the default branch."""
    allow_patterns: tuple[str, ...] = ()
    """Only files that match one of these (`*`, `?`, `[…]`) count. Empty: all."""
    ignore_patterns: tuple[str, ...] = ()
    """Files that match one of these are as if they were not there."""
    allow_files: tuple[str, ...] = ()
    """Exact names of code or pickle files that may go into the checkpoint all the same."""


class S3Source(SpecPart):
    """A prefix in an S3 bucket, or in a store that speaks S3's protocol."""

    kind: Literal["s3"]
    """`s3`: a prefix in a bucket."""
    uri: str = Field(pattern=S3_URI_PATTERN)
    """The prefix, as `s3://BUCKET/PREFIX/`."""
    layout: Literal["subfolders", "snapshot"] = "subfolders"
    """`subfolders`: one below the prefix for each revision, named by it. `snapshot`: the files of
    the model lie directly below the prefix, and each content of it is a revision."""
    latest: Literal["name", "modified"] = "name"
    """Which subfolder is the newest: by name (`v10` after `v9`), or the one written last."""
    revision: Revision | None = None
    """The revision that a release takes when it names none. Empty: the newest."""
    allow_patterns: tuple[str, ...] = ()
    """Only files that match one of these (`*`, `?`, `[…]`) count. Empty: all."""
    ignore_patterns: tuple[str, ...] = ()
    """Files that match one of these are as if they were not there."""
    allow_files: tuple[str, ...] = ()
    """Exact names of code or pickle files that may go into the checkpoint all the same."""


Source = Annotated[LocalSource | HuggingFaceSource | S3Source, Field(discriminator="kind")]
"""Where a model comes from; `kind` says which it is."""


class Target(SpecPart):
    """A lane on a kind of instance, with its shapes and serving settings."""

    name: Name
    """What the spec and the environments call it. Unique in the spec."""
    lane: LaneName
    """The way to compile and serve."""
    instance: str = Field(default="local", pattern=INSTANCE_PATTERN)
    """Kind of machine: `local`, or an EC2 instance type such as `trn2.48xlarge`."""
    required: bool = True
    """Must this target succeed? If not, the release goes on without it when it fails."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=128)
    """Devices (logical cores) that one replica spans."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of weights and arithmetic."""
    max_model_len: int = Field(default=2048, ge=16)
    """Longest prompt plus answer, in tokens."""
    max_num_batched_tokens: int = Field(default=2048, ge=16)
    """Most tokens one engine step may process."""
    max_num_seqs: int = Field(default=16, ge=1, le=4096)
    """Most requests that run at the same time; the rest queues."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens in one block of the KV cache; empty: the lane's default."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for the KV cache, in GiB. Used by lane `cpu`."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache of shared prompt prefixes."""
    neuron: NeuronSettings | None = None
    """What both Neuron lanes need to know; only, and always, on those."""
    native: NativeSettings | None = None
    """More settings of lane `neuron-native`; only there."""
    nxdi: NxdiSettings | None = None
    """More settings of lane `neuron-nxdi`; only there."""


Severity = Literal["critical", "warning", "info"]
"""What a figure outside its bound means."""


class AccuracyTask(SpecPart):
    """One task of lm-evaluation-harness with its bounds."""

    name: TaskName
    """The task's name, as in the `task:` line of its YAML file. Unique in the spec."""
    path: str | None = None
    """The task's YAML file, relative to the spec file; its folder goes with the release.
    Empty: `name` is a task that lm-evaluation-harness brings."""
    metric: str = Field(default="exact_match", min_length=1)
    """The task's metric to compare, with its filter after a comma if it has one."""
    num_fewshot: int = Field(default=0, ge=0)
    """Solved examples in front of each question."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many samples."""
    min: float = Field(ge=0, le=1)
    """The score a release must reach, as a share of 1."""
    max_drop: float | None = Field(default=None, ge=0, le=1)
    """How much lower than the stable release's score it may be, as a share of 1."""
    on_undecided: Literal["warn", "fail"] = "warn"
    """What follows when the samples are too few to prove that `max_drop` is kept."""


class Bound(SpecPart):
    """Limits of one figure; at least one of them is given."""

    min: float | None = None
    """The least that passes."""
    max: float | None = None
    """The most that passes."""
    severity: Severity = "critical"
    """`critical`: a figure outside stops the release. `warning`: the release carries a warning.
    `info`: it is shown only."""


LatencyMetric = Literal[
    "ttft_p50_ms",
    "ttft_p90_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p90_ms",
    "tpot_p99_ms",
    "itl_p50_ms",
    "itl_p90_ms",
    "itl_p99_ms",
    "e2e_p50_ms",
    "e2e_p90_ms",
    "e2e_p99_ms",
    "input_tokens_per_s",
    "output_tokens_per_s",
    "requests_per_s",
    "good_requests_per_s",
    "slo_attainment",
    "failed_requests",
]
"""Figures of one load level: milliseconds at a percentile, rates, a share of 1, or a count."""

SLO_METRICS: frozenset[str] = frozenset({"good_requests_per_s", "slo_attainment"})
"""Figures that only exist under an SLO."""


class LoadLevel(SpecPart):
    """One load on the server and the bounds that its figures must keep.

    It has `max_concurrency`, `request_rate`, or both; and `input_len` with `output_len`, or
    `prompts`.
    """

    name: Name
    """Unique in the spec."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Requests in flight at most. Empty: as many as the rate brings."""
    request_rate: float | None = Field(default=None, gt=0)
    """Requests a second on average (Poisson). Empty: as fast as the concurrency allows."""
    num_prompts: int = Field(ge=1)
    """Requests in all, of each repeat."""
    input_len: int | None = Field(default=None, ge=1)
    """Tokens of a prompt, which is made of random tokens."""
    output_len: int | None = Field(default=None, ge=1)
    """Tokens of an answer."""
    input_range: float = Field(default=0.0, ge=0, lt=1)
    """Prompts have `input_len` tokens plus or minus this share, each length as likely."""
    output_range: float = Field(default=0.0, ge=0, lt=1)
    """Answers have `output_len` tokens plus or minus this share, each length as likely."""
    prompts: str | None = None
    """JSONL file with real prompts (`{"prompt": …, "output_tokens": …}` a line), relative to the
    spec file, instead of `input_len`. `output_tokens` may be left out if there is `output_len`."""
    repeats: int = Field(default=1, ge=1, le=20)
    """How often it is measured. Figures are medians; their spread over the repeats is kept."""
    warm_up_requests: int | None = Field(default=None, ge=0)
    """Requests before each repeat that count for nothing. Empty: as many as run at the same time,
    at least 2."""
    bounds: dict[LatencyMetric, Bound] = Field(min_length=1)
    """Absolute limits by figure."""
    max_regression: dict[LatencyMetric, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """How much worse than the stable release's figure it may be, as a share (0.2 is 20 %)."""


class Slo(SpecPart):
    """What users are promised: limits that a request must keep to be good; at least one."""

    ttft_ms: float | None = Field(default=None, gt=0)
    """Most milliseconds to the first token."""
    tpot_ms: float | None = Field(default=None, gt=0)
    """Most milliseconds for each token after the first."""
    e2e_ms: float | None = Field(default=None, gt=0)
    """Most milliseconds for the whole request."""
    attainment: float = Field(default=0.99, gt=0, le=1)
    """Share of the requests that must be good."""


class RateSearch(SpecPart):
    """Looks for the highest request rate that meets the SLO."""

    level: Name
    """The load level whose prompts and answers are used; its rate and concurrency are not."""
    min_rate: float = Field(default=1.0, gt=0)
    """Requests a second that are tried first."""
    max_rate: float = Field(default=64.0, gt=0)
    """Requests a second that are tried at most."""
    probe_s: float = Field(default=30.0, gt=0)
    """Seconds for which each rate is tried, at least 20 requests."""
    precision: float = Field(default=0.1, gt=0, lt=1)
    """It is found once the lowest rate that fails is at most this share above the best."""
    max_duration_s: float = Field(default=600.0, gt=0)
    """Seconds after which no rate is tried any more."""
    bound: Bound | None = None
    """Limits of the rate that is found. Empty: it is reported only."""


ParityMetric = Literal[
    "agreement",
    "excused",
    "exact_answers",
    "first_divergence",
    "logprob_error",
    "error_ratio",
]
"""Figures of the parity check: shares, a number of tokens, an error in nats, a ratio of errors."""
PARITY_SHARES: frozenset[str] = frozenset({"agreement", "excused", "exact_answers"})
PARITY_LOGPROBS: frozenset[str] = frozenset({"logprob_error", "error_ratio"})
MAX_PARITY_POSITIONS = 20_000
"""Tokens of all answers of a parity check."""


class ParityCheck(SpecPart):
    """The server's greedy answers against a forward pass of the same checkpoint on a CPU."""

    prompts: str | None = None
    """JSONL file (`{"prompt": …}` a line), relative to the spec file. Empty: the spec's prompts."""
    num_prompts: int = Field(default=32, ge=1, le=2000)
    """How many of them, from the first; all if there are fewer."""
    max_tokens: int = Field(default=32, ge=1, le=1024)
    """Longest answer, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the reference; `bfloat16` needs half the memory and tells less."""
    reference: Literal["made", "imported"] = "made"
    """`made`: where the release is measured, unless the store has it. `imported`: with `trainyard
    import-reference`, because the model is too large for the machine that measures."""
    near_tie: float = Field(default=0.25, ge=0, le=5)
    """Nats between the reference's two best tokens below which either of them is right."""
    top_logprobs: int = Field(default=5, ge=1, le=10)
    """Tokens whose log-probs are compared at each position, where the lane returns any."""
    bounds: dict[ParityMetric, Bound] = Field(min_length=1)
    """Limits by figure."""


LOGIT_LANE = "neuron-native"
"""The lane whose image has AWS's three-way logit validation."""


class LogitValidation(SpecPart):
    """AWS's three-way validation of logits, on graphs that are not served. Decides nothing."""

    num_prompts: int = Field(default=3, ge=1, le=32)
    """How many of the parity check's prompts, or of the spec's, from the first."""
    output_tokens: int = Field(default=16, ge=1, le=128)
    """Tokens after each prompt whose logits are compared."""
    severity: Literal["warning", "info"] = "info"
    """How the report shows logits that are not alike."""


class AccuracyGate(SpecPart):
    """The answers that a release must get right."""

    tasks: tuple[AccuracyTask, ...] = Field(min_length=1)
    """Tasks of lm-evaluation-harness."""
    parity: ParityCheck | None = None
    """Does the compiled code answer as the checkpoint does? Empty: it is not asked."""
    logit_validation: LogitValidation | None = None
    """AWS's logit validation beside it, in a job of its own. Empty: it is not made."""

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """Return the names of those tasks that lm-evaluation-harness brings."""
        return tuple(task.name for task in self.tasks if task.path is None)


class LatencyGate(SpecPart):
    """The speed that a release must have."""

    levels: tuple[LoadLevel, ...] = Field(min_length=1)
    """Loads that are measured one after the other."""
    slo: Slo | None = None
    """What is promised to users. Empty: nothing, and there are no figures of it."""
    search: RateSearch | None = None
    """Empty: the highest rate that meets the SLO is not looked for."""
    other_machine: Literal["critical", "warning"] = "warning"
    """What it is if the stable release was measured on another kind of machine or with another
    driver, so that `max_regression` cannot be checked: `critical` stops the release."""


CostMetric = Literal["usd_per_million_input_tokens", "usd_per_million_output_tokens"]
"""What tokens cost when the server is as busy as the SLO allows."""


class CostGate(SpecPart):
    """What tokens may cost. Needs an SLO, and a price of the target's instance."""

    output_weight: float = Field(default=4.0, gt=0)
    """How many times as much as an input token an output token costs."""
    replicas_per_instance: int = Field(default=1, ge=1)
    """Replicas that share the price of one instance."""
    bounds: dict[CostMetric, Bound] = Field(min_length=1)
    """Limits by figure, in US dollars."""


BehaviourName = Literal[
    "batching",
    "prefix_cache",
    "penalties",
    "stop_strings",
    "streaming",
    "longest_prompt",
    "concurrency",
    "cancellation",
]
"""Checks of how a server behaves, whatever its model answers."""


class BehaviourWaiver(SpecPart):
    """Why a check of the behaviour does not stop this model's releases."""

    severity: Literal["warning", "skip"]
    """`warning`: what it finds is reported only. `skip`: it is not made."""
    reason: str = Field(min_length=1)
    """Why, for whoever reads the verdict."""


class BehaviourGate(SpecPart):
    """How a server must behave, whatever its model answers. Every check is made by itself."""

    waivers: dict[BehaviourName, BehaviourWaiver] = Field(default_factory=dict)
    """The checks that do not stop a release, by name."""

    @property
    def checks(self) -> tuple[BehaviourName, ...]:
        """The checks that are made, in their order."""
        names: tuple[BehaviourName, ...] = get_args(BehaviourName)
        skipped = {name for name, waiver in self.waivers.items() if waiver.severity == "skip"}
        return tuple(name for name in names if name not in skipped)


class Gates(SpecPart):
    """What a release must show before it is published."""

    accuracy: AccuracyGate
    """Bounds on task scores."""
    latency: LatencyGate
    """Bounds on latency and throughput under load."""
    cost: CostGate | None = None
    """Bounds on the price of tokens. Empty: it is reported only."""
    behaviour: BehaviourGate = BehaviourGate()
    """How the server must behave; part of the accuracy gate."""


class RolloutStep(SpecPart):
    """One step of a canary."""

    weight: int = Field(ge=1, le=99)
    """Percent of the traffic that the candidate gets."""
    hold_s: float = Field(ge=0)
    """Seconds to stay on it at least."""


JudgedMetric = Literal["ttft", "tpot", "errors", "ttft_tail", "quality"]
"""`ttft` and `tpot` are averages, the others counts. Only probes have `quality`."""
AVERAGES: frozenset[str] = frozenset({"ttft", "tpot"})


class Margins(SpecPart):
    """When the judge calls a metric harmed and when it calls it good enough."""

    harm: float = Field(gt=0)
    """Averages: relative slowdown (0.1 is 10 %). Counts: ratio to stable (2 is twice)."""
    promote: float = Field(gt=0)
    """As `harm`, for promotion: the candidate is proven better than this."""
    harm_floor: float = Field(default=0.0, ge=0, lt=0.5)
    """Counts only: a share of requests below which nothing is harm."""
    promote_ceiling: float = Field(default=0.0, ge=0, lt=0.5)
    """Counts only: a share of requests below which the candidate is good enough by itself."""


Ending = Literal["aborted", "truncated", "empty", "unanswered", "refused"]
"""How requests can end badly without failing: the engine gave them up; the answer was cut, mostly
at the limit on its length; it has one token at most; the client left before its first byte, or the
server was too busy for it; the server refused the request (4xx)."""


class EndingMargins(SpecPart):
    """When more answers than stable's end in one way is harm. Promotion never waits for that."""

    judged: bool = True
    """False where the release is meant to change it, such as one that answers at greater length."""
    harm: float = Field(default=2.0, ge=1)
    """Harm is more than so many times stable's share of requests."""
    harm_floor: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of requests that harm must exceed as well. With 2 % and twice stable's share, harm is
    always more than one percentage point above stable."""


class JudgeSettings(SpecPart):
    """How the canary is judged. Empty margins take the documented defaults."""

    block_s: float = Field(default=30.0, gt=0)
    """Planned seconds of one slice of counts."""
    min_requests_per_block: int = Field(default=20, ge=5)
    """Requests that each side needs before a slice counts."""
    min_blocks_last_step: int = Field(default=2, ge=1)
    """Slices that must count at the last step's weight before a promotion."""
    block_noise: float = Field(default=0.0, ge=0, le=1)
    """Extra noise of one pod's block mean, in log units, on machines that are shared (0.1 is about
    10 %). Added to the judge's default covariance."""
    prompt_drift: float = Field(default=0.1, ge=0, le=1)
    """Relative difference between the prompts of the two releases, in tokens, beyond which their
    latencies are not compared. 0: not looked at, for a checkpoint with another tokenizer."""
    prefix_drift: float = Field(default=0.1, ge=0, le=1)
    """Difference between the shares of prompt tokens that the two releases find in their prefix
    caches beyond which times to the first token are not compared. 0: not looked at."""
    margins: dict[JudgedMetric, Margins] = Field(default_factory=dict)
    """Other margins than the documented ones, by metric."""
    endings: dict[Ending, EndingMargins] = Field(default_factory=dict)
    """Other settings than the defaults for requests that were aborted, truncated, answered with
    nothing, left unanswered or refused."""


class LatencyObjective(SpecPart):
    """How many requests must be how fast."""

    within_s: float = Field(gt=0)
    """Seconds. The server's next larger bucket edge counts."""
    share: float = Field(default=0.95, gt=0, lt=1)
    """Share of requests that must not take longer."""


class ServingSlo(SpecPart):
    """What a release must keep while it serves, watched once its rollout is over."""

    availability: float | None = Field(default=0.999, gt=0, lt=1)
    """Share of requests that must not fail. Empty: failed requests are not watched."""
    ttft: LatencyObjective | None = None
    """Of the time to the first token. Empty: not watched."""
    tpot: LatencyObjective | None = None
    """Of the time per output token. Empty: not watched."""
    period_s: float = Field(default=30 * 86400.0, ge=86400.0)
    """Seconds for which the allowance of bad requests is meant to last."""
    min_requests: int = Field(default=100, ge=1)
    """Requests in a window below which nothing is said about it."""


Scoring = Literal["exact", "starts_with", "contains", "none"]
"""When an answer is right: white space around it apart, it is the reference, begins with it, or
contains it. `none`: there are no references."""

WORSE_ANSWERS = 0.05
"""Share of pairs with a worse answer that a promotion must rule out, unless margins say so."""
OTHER_TOKENS = 0.20
"""The same, of answers with other tokens though the checkpoint is the same."""


class Probes(SpecPart):
    """Prompts that are sent to both releases at the same moment while they are compared."""

    prompts: str
    """JSONL file (`{"prompt": …, "answer": …}` a line), relative to the spec file. `answer` is the
    reference; without `scoring` it may be left out."""
    pairs_per_s: float = Field(default=0.5, gt=0, le=50)
    """Prompts a second, on average; each goes to both releases."""
    max_tokens: int = Field(default=16, ge=2, le=1024)
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=4)
    """Texts at which an answer ends; they are no part of it."""
    scoring: Scoring = "exact"
    """When an answer is right, for another checkpoint than the stable release's. The same
    checkpoint must give the same tokens."""
    timeout_s: float = Field(default=30.0, gt=0, le=600)
    """Seconds after which an answer that is not complete counts as failed."""
    max_in_flight: int = Field(default=16, ge=1, le=256)
    """Prompts under way at the same time at most; what would exceed it is not sent."""


class RolloutSpec(SpecPart):
    """How a release gets its traffic."""

    capacity: Capacity = "surge"
    """How the candidate gets its servers: `surge` adds them to the stable release's, `replace`
    takes them from it one by one, `single` stops the stable release first."""
    replicas: int = Field(default=1, ge=1, le=1000)
    """Replicas of the stable release."""
    steps: tuple[RolloutStep, ...] = (
        RolloutStep(weight=10, hold_s=600),
        RolloutStep(weight=50, hold_s=600),
    )
    """The canary's weights, growing."""
    bake_s: float = Field(default=600.0, ge=0)
    """Seconds after promotion in which the old release keeps its servers and a holdback share."""
    holdback_weight: int = Field(default=10, ge=0, le=50)
    """Percent of the traffic that the old release keeps during the bake. With 10 the new release
    is seen under nearly all of the load while the old one can still take it back, but its busier
    servers cannot be compared by latency: errors, answers to probes and fuses decide then. 50 with
    equal servers compares latencies as well, and leaves half of the traffic on the old release."""
    max_duration_s: float = Field(default=3600.0, gt=0)
    """Seconds of exposure after which the judge's horizon ends."""
    on_undecided: Literal["hold", "rollback"] = "hold"
    """What happens when the judge cannot tell in `max_duration_s`."""
    max_hold_s: float = Field(default=4 * 3600.0, gt=0)
    """Seconds that an undecided candidate may keep its servers before it is withdrawn."""
    max_pause_s: float = Field(default=4 * 3600.0, gt=0)
    """Seconds that people may pause a rollout in all before it is withdrawn. They do not count
    against the other limits."""
    warm_up_requests: int = Field(default=20, ge=0)
    """Requests that each new server answers before it gets traffic."""
    deploy_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a candidate may take to become ready."""
    judge: JudgeSettings = JudgeSettings()
    """How the candidate is compared with the stable release."""
    probes: Probes | None = None
    """Prompts that both releases answer while they are compared. Empty: users' requests are all
    the evidence there is, and nothing is said about the quality of answers."""
    slo: ServingSlo | None = None
    """What the release must keep after its rollout (`neuron_watch`). Empty: it is not watched."""
    expected_rps: float | None = Field(default=None, gt=0)
    """Requests a second that a channel is expected to get, for the plan's forecast. Empty: what the
    channel's last rollout saw."""
    on_scarce_evidence: Literal["refuse", "warn"] = "refuse"
    """What the plan does where fewer than half of all good releases could be proven in
    `max_duration_s`: `refuse`, before anything is compiled, or `warn`."""


class Refresh(SpecPart):
    """When to look for a new revision."""

    cron: str
    """When to look: five fields (minute, hour, day of the month, month, day of the week), UTC."""
    environments: tuple[Name, ...] = ()
    """Where a release of a new revision goes, in this order. Empty: it is published only."""
    follow_toolchain: bool = True
    """Also release again when the toolchain has changed, once for each."""
    max_attempts: int = Field(default=2, ge=1, le=10)
    """Runs that one revision gets with one toolchain, if they fail, before it is left alone."""


class ModelSpec(SpecPart):
    """Everything Trainyard knows about one model."""

    schema_: Literal["trainyard/v1"] = Field(alias="schema")
    """Always `trainyard/v1`."""
    model: Name
    """The model's name, the same as the file's (`<model>.yaml`)."""
    owner: str = Field(min_length=1)
    """Who answers for the model: a team or a person."""
    description: str = ""
    """What the model is for, for people."""
    source: Source
    """Where its files come from."""
    served_model_name: str = Field(default="", pattern=SERVED_NAME_PATTERN)
    """The name clients ask for; empty: the model's name. The same on both sides of a canary."""
    prompts: str | None = None
    """JSONL file (`{"prompt": …}` a line), relative to the spec file, for warm-up requests."""
    targets: tuple[Target, ...] = Field(min_length=1)
    """What is compiled, measured and published; each becomes a release of its own."""
    gates: Gates
    """What stands between a measurement and a release."""
    rollout: RolloutSpec = RolloutSpec()
    """How a release gets its traffic, in every environment."""
    refresh: Refresh | None = None
    """Empty: releases start only when somebody asks."""

    @property
    def client_model_name(self) -> str:
        """The model name clients put into requests."""
        return self.served_model_name or self.model
