"""Makes the behaviour checks of one job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainyard.documents.base import Frozen
from trainyard.documents.behaviour import (
    Behaviour,
    BehaviourCase,
    BehaviourRecord,
    Capability,
)
from trainyard.measure.behaviour import (
    batching,
    cancellation,
    longest_prompt,
    penalties,
    prefix_cache,
    stop_strings,
    streaming,
)
from trainyard.measure.behaviour.answers import describe, excused_without_ranks
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import (
    NEAR_TIE,
    PROBES,
    UNKNOWN_BLOCK,
    Setting,
    probes_of,
    read_texts,
    read_vocabulary,
)
from trainyard.spec.model import BehaviourName

Cases = tuple[BehaviourCase, ...]

_COMPARING = frozenset({"batching", "prefix_cache", "streaming", "stop_strings", "concurrency"})
"""Checks that compare answers, which rounding may change."""


class BehaviourJob(Frozen):
    """Which checks to make, and what the server promises."""

    capabilities: dict[BehaviourName, Capability]
    """Of the checks to make, by name."""
    dtype: str
    max_num_seqs: int
    block_size: int | None = None
    prefix_caching: bool
    prompts: str | None = None
    """The spec's prompts, a path in the folder of assets."""
    seed: int = 0
    """Another one asks with other random tokens."""


def run_behaviour(
    job: BehaviourJob,
    *,
    base_url: str,
    served_model_name: str,
    model_dir: Path,
    assets_dir: Path,
    max_model_len: int,
) -> Behaviour:
    """Make the checks of `job` on a server that does nothing else meanwhile.

    What goes wrong on the way is in the cases.

    Raises:
        BadInput: the model's files do not say what tokens there are.
    """
    prompts = assets_dir / job.prompts if job.prompts else None
    setting = Setting(
        max_model_len=max_model_len,
        max_num_seqs=job.max_num_seqs,
        block_size=job.block_size or UNKNOWN_BLOCK,
        prefix_caching=job.prefix_caching,
        near_tie=NEAR_TIE[job.dtype],
        vocabulary=read_vocabulary(model_dir),
        probes=(),
        seed=job.seed,
    )
    setting = replace(setting, probes=probes_of(read_texts(prompts), setting))
    return asyncio.run(_run(job, setting, base_url, served_model_name))


async def _run(job: BehaviourJob, setting: Setting, base_url: str, model: str) -> Behaviour:
    began = time.monotonic()
    async with Client(base_url, model) as client:
        alone = await batching.ask_alone(client, setting)
        if any(each.answer.status == 400 for each in alone):
            # A lane that samples on the device may return no log-probabilities, and say so.
            client.ranks = False
            alone = await batching.ask_alone(client, setting)
        rounds = _Checks(client, setting, alone, job)
        records = [await rounds.record(name) for name in job.capabilities]
    return Behaviour(
        near_tie=setting.near_tie,
        records=tuple(records),
        duration_s=round(time.monotonic() - began, 2),
    )


class _Checks:
    """Makes one check after the other with the answers that all of them start from."""

    def __init__(
        self,
        client: Client,
        setting: Setting,
        alone: Sequence[batching.Asked],
        job: BehaviourJob,
    ) -> None:
        self._client, self._setting, self._alone, self._job = client, setting, alone, job
        # Some of the spec's prompts and some random ones.
        self._few = alone[PROBES // 4 : PROBES - PROBES // 4]
        self._remark = ""
        """What the check that is being made says beside its cases."""
        self._checks: dict[BehaviourName, Callable[[float], Awaitable[Cases]]] = {
            "batching": self._batching,
            "prefix_cache": self._prefix_cache,
            "penalties": self._penalties,
            "stop_strings": self._stop_strings,
            "streaming": self._streaming,
            "longest_prompt": self._longest_prompt,
            "concurrency": self._concurrency,
            "cancellation": self._cancellation,
        }

    async def record(self, name: BehaviourName) -> BehaviourRecord:
        """Make one check, if the server answers at all."""
        self._remark = ""
        capability = self._job.capabilities[name]
        near_tie = 0.0 if capability.ability == "exact" else self._setting.near_tie
        failed = [each for each in self._alone if not each.answer.good]
        if failed:
            cases: Cases = (
                BehaviourCase(
                    outcome="broken",
                    sent=f"{describe(failed[0].prompt)}, to a server that does nothing else",
                    came=str(failed[0].answer),
                    expected="an answer to compare with",
                ),
            )
        else:
            cases = await self._checks[name](near_tie)
            ranked = all(each.answer.ranked for each in self._alone)
            if name in _COMPARING and not ranked and capability.ability != "exact":
                cases = excused_without_ranks(cases)
        return BehaviourRecord(name=name, capability=capability, cases=cases, remark=self._remark)

    async def _batching(self, near_tie: float) -> Cases:
        together = await batching.ask_together(self._client, self._setting, self._setting.batch)
        return batching.judge_batching(self._alone, together, near_tie)

    async def _concurrency(self, near_tie: float) -> Cases:
        requests = batching.over_batch(self._setting)
        together = await batching.ask_together(self._client, self._setting, requests)
        return batching.judge_concurrency(self._alone, together, self._setting, near_tie)

    async def _prefix_cache(self, near_tie: float) -> Cases:
        warmed = await prefix_cache.ask(self._client, self._setting)
        self._remark = prefix_cache.remark(warmed, self._setting)
        return prefix_cache.judge(warmed, near_tie)

    async def _penalties(self, near_tie: float) -> Cases:
        asked = await penalties.ask(self._client, self._setting, self._few)
        return penalties.judge(asked, near_tie)

    async def _stop_strings(self, near_tie: float) -> Cases:
        asked = await stop_strings.ask(self._client, self._setting, self._few)
        return stop_strings.judge(asked, near_tie)

    async def _streaming(self, near_tie: float) -> Cases:
        asked = await streaming.ask(self._client, self._setting, self._few)
        return streaming.judge(asked, near_tie)

    async def _longest_prompt(self, near_tie: float) -> Cases:
        return longest_prompt.judge(
            await longest_prompt.ask(self._client, self._setting), self._setting
        )

    async def _cancellation(self, near_tie: float) -> Cases:
        asked = await cancellation.ask(self._client, self._setting, self._alone[0])
        return cancellation.judge(asked, near_tie)
