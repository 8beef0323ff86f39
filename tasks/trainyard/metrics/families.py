"""The metrics of `trainyard metrics`: names, meanings and labels, in one table.

All of them are gauges. They say what the documents in the store say now, so a restart, a second
exporter and garbage collection break nothing; a counter made from documents would be read as reset
whenever one of them is removed. What happened is told by its time (`…_timestamp_seconds`).

Cardinality is bounded: `release` appears only for the releases that a channel has in a role now,
all other labels have few values.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily

CHANNEL = ("environment", "model")


@dataclass(frozen=True)
class Family:
    """One metric."""

    name: str
    help: str
    labels: tuple[str, ...]

    def empty(self) -> GaugeMetricFamily:
        """Return the metric without samples."""
        return GaugeMetricFamily(self.name, self.help, labels=self.labels)


FAMILIES: dict[str, Family] = {
    each.name: each
    for each in (
        # --- channels
        Family(
            "trainyard_channel_release_info",
            "1 for each release that a channel has in a role: stable, candidate, previous (the one "
            "that a rollback returns to).",
            (*CHANNEL, "track", "release", "verified"),
        ),
        Family(
            "trainyard_channel_generation",
            "Changes of the channel so far.",
            CHANNEL,
        ),
        Family(
            "trainyard_channel_weight_percent",
            "Share of the traffic that the channel wishes for a track.",
            (*CHANNEL, "track"),
        ),
        Family(
            "trainyard_channel_phase",
            "1 for the phase that the channel is in, 0 for the others.",
            (*CHANNEL, "phase"),
        ),
        Family(
            "trainyard_channel_servers",
            "Servers of a track during a rollout: desired ones and those seen ready.",
            (*CHANNEL, "track", "kind"),
        ),
        Family(
            "trainyard_channel_rejected_releases",
            "Releases that must not be promoted again without force.",
            CHANNEL,
        ),
        Family(
            "trainyard_channel_last_event_timestamp_seconds",
            "When the channel's history last has an event: rollout_started, held, promoted, "
            "returned, rolled_back, withdrawn.",
            (*CHANNEL, "event"),
        ),
        # --- rollouts
        Family(
            "trainyard_rollout_number",
            "Number of the channel's present or last rollout: how many there were.",
            CHANNEL,
        ),
        Family("trainyard_rollout_in_progress", "1 while a rollout is under way.", CHANNEL),
        Family(
            "trainyard_rollout_started_timestamp_seconds",
            "Start of the present or last rollout.",
            CHANNEL,
        ),
        Family(
            "trainyard_rollout_phase_since_timestamp_seconds",
            "Begin of the present phase of a rollout that is under way.",
            CHANNEL,
        ),
        Family(
            "trainyard_rollout_held_since_timestamp_seconds",
            "When an undecided rollout froze its weights; absent while it does not.",
            CHANNEL,
        ),
        Family(
            "trainyard_rollout_lease_seconds",
            "Length of the lease that the driver of a rollout under way renews.",
            CHANNEL,
        ),
        Family("trainyard_rollout_looks", "Looks at the metrics in this rollout.", CHANNEL),
        Family(
            "trainyard_rollout_last_look_timestamp_seconds",
            "When this rollout's metrics were looked at last.",
            CHANNEL,
        ),
        Family(
            "trainyard_rollout_verdict",
            "1 for what the judge said at the last look, 0 for the others.",
            (*CHANNEL, "outcome"),
        ),
        Family(
            "trainyard_rollout_exposed_requests",
            "Requests that this rollout's candidate answered, as of the last verdict.",
            CHANNEL,
        ),
        Family(
            "trainyard_rollout_evidence_ratio",
            "Evidence over its threshold; 1 or more decides. `direction`: harm or promote.",
            (*CHANNEL, "metric", "direction"),
        ),
        Family(
            "trainyard_rollout_metric_ratio",
            "Candidate's value of a judged metric over stable's.",
            (*CHANNEL, "metric"),
        ),
        Family(
            "trainyard_rollout_guard_events",
            "What the guard did by itself in this rollout: lease_expired, fuse, failover.",
            (*CHANNEL, "event"),
        ),
        Family(
            "trainyard_rollouts_ended",
            "Rollouts in the channel's history (its last 200 entries) by how they ended.",
            (*CHANNEL, "outcome"),
        ),
        Family(
            "trainyard_rollback_seconds",
            "The last rollback in the channel's history: from the decision until the losing "
            "side's servers were gone.",
            CHANNEL,
        ),
        # --- releases and their steps
        Family("trainyard_releases", "Releases in the store.", ("model",)),
        Family(
            "trainyard_release_last_published_timestamp_seconds",
            "When a release of the model was published last.",
            ("model",),
        ),
        Family(
            "trainyard_gate_verdicts",
            "Verdicts in the store by gate and outcome.",
            ("model", "gate", "outcome"),
        ),
        Family(
            "trainyard_steps",
            "Steps in the store by their state: running, done, failed.",
            ("model", "step", "state"),
        ),
        Family(
            "trainyard_step_failures",
            "Steps that ended as failed, by exit code.",
            ("model", "step", "exit_code"),
        ),
        Family(
            "trainyard_step_last_end_timestamp_seconds",
            "When a step ended last, by how.",
            ("model", "step", "state"),
        ),
        Family(
            "trainyard_step_heartbeat_timestamp_seconds",
            "Oldest sign of life of the steps that are running; each gives one every 10 s.",
            ("model", "step"),
        ),
        Family(
            "trainyard_step_seconds",
            "How long a step's last attempt took that did its work and found nothing done.",
            ("model", "step", "target"),
        ),
        Family(
            "trainyard_bundle_lookups",
            "Compile steps that are done: `hit` found a bundle, `miss` made one.",
            ("model", "result"),
        ),
        Family(
            "trainyard_compile_seconds",
            "The last compile: from the start of the compiling server until it was ready.",
            ("model", "target"),
        ),
        Family(
            "trainyard_compile_peak_memory_bytes",
            "The last compile: most resident memory of all its processes together.",
            ("model", "target"),
        ),
        Family(
            "trainyard_moved_bytes",
            "Bytes that steps brought into the store: checkpoints (download), bundles (compile).",
            ("model", "step"),
        ),
        # --- the exporter itself
        Family(
            "trainyard_metrics_last_look_timestamp_seconds",
            "When the store was last read without failure. Everything else is as of then.",
            (),
        ),
        Family(
            "trainyard_metrics_unreadable_documents",
            "Documents that could not be parsed, by folder (of rollouts: looks and histories of "
            "those under way); `trainyard store verify` names them.",
            ("folder",),
        ),
    )
}
"""By name, in the order of the page."""
