"""Logs of blocks: as a file of JSON lines, and as the looks of a rollout that is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import ValidationError

from trainyard.documents.channel import Channel
from trainyard.documents.evidence import Block, JudgeSpec, default_metrics
from trainyard.documents.look import Comparison, Look
from trainyard.errors import BadInput, NotFound
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.driver import ending_of
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.looks import LookLog
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store


def parse_blocks(text: str, *, name: str) -> list[Block]:
    """Return the blocks of a file of JSON lines; empty lines are passed over.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        BadInput: a line is no block, or there is none.
    """
    blocks: list[Block] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            blocks.append(Block.model_validate_json(line))
        except ValidationError as error:
            raise BadInput(
                f"Line {number} of {name} is no block: {_first(error)}.",
                hint="docs/judge.md describes every field of a block.",
            ) from error
    if not blocks:
        raise BadInput(f"{name} has no blocks.", hint="It needs one JSON object a line.")
    return blocks


def dump_blocks(blocks: Iterable[Block]) -> str:
    """Return blocks as JSON lines."""
    return "".join(block.model_dump_json(exclude_defaults=True) + "\n" for block in blocks)


def parse_judge_spec(values: object, *, name: str) -> JudgeSpec:
    """Return a specification from what a YAML or JSON file holds.

    Without `metrics` it has the default ones.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(values, dict):
        raise BadInput(f"{name} is no mapping.", hint="docs/judge.md describes its fields.")
    try:
        return JudgeSpec.model_validate({"metrics": default_metrics(), **values})
    except ValidationError as error:
        raise BadInput(
            f"{name} is no specification of the judge: {_first(error)}.",
            hint="docs/judge.md describes its fields.",
        ) from error


class StoredLog(NamedTuple):
    """What the judge was shown of a rollout."""

    blocks: list[Block]
    spec: JudgeSpec
    ending: str
    """How the rollout ended, and whether the judge wanted that, in a sentence or two."""


def stored_log(store: Store, model: str, environment: str, number: int) -> StoredLog:
    """Return the blocks and the specification of a rollout, over or not.

    Raises:
        NotFound: there is no such rollout, or it never compared anything.
    """
    looks = LookLog(store).read(model, environment, number)
    if not looks:
        raise NotFound(
            f"Rollout {number} of {model} in {environment} has no looks.",
            hint=_rollouts_there_are(store, model),
        )
    channel = read_channel(store, model, environment)
    comparison = _comparison(looks, channel, number)
    if comparison is None:
        raise NotFound(
            f"Rollout {number} of {model} in {environment} compared nothing. "
            f"{_ending(channel, number, None, looks)}",
            hint="It ended before its candidate had traffic, or had nothing to be compared with.",
        )
    history = HistoryLog(store).read(model, environment, number)
    before = history.snapshots if history is not None else ()
    blocks = blocks_from_snapshots(
        [*before, *(look.snapshot for look in looks)],
        exposed_since=comparison.exposed_since,
        candidate=comparison.candidate,
        stable=comparison.stable,
    )
    return StoredLog(blocks, comparison.judge, _ending(channel, number, comparison, looks))


def _ending(
    channel: Channel, number: int, comparison: Comparison | None, looks: Sequence[Look]
) -> str:
    """Tell how a rollout ended; the judge's own verdicts do not say what others have done."""
    pair = f" ({comparison.candidate} against {comparison.stable})" if comparison else ""
    name = f"Rollout {number} of {channel.model} in {channel.environment}{pair}"
    rollout = channel.rollout
    if rollout is not None and rollout.number == number and channel.in_progress:
        return f"{name} is under way: {rollout.phase.replace('_', ' ')}."
    ended = ending_of(channel, number)
    if ended is None:
        return f"{name} is over; the channel does not know any more how it ended."
    outcome, why = ended
    told = f"{name} was {outcome.replace('_', ' ')}: {why}"
    harm = any(look.verdict is not None and look.verdict.outcome == "HARM" for look in looks)
    if outcome == "promoted" or harm:
        return told
    return f"{told} The judge did not find harm; that was not what ended it."


def _rollouts_there_are(store: Store, model: str) -> str:
    """Say which rollouts of a model have looks, in every environment."""
    folder = rollout_prefix(model, "x", 0).rsplit("/", 2)[0]
    found: dict[str, set[int]] = {}
    for entry in store.list(folder):
        environment, number, kind, *_ = [*entry.key.removeprefix(f"{folder}/").split("/"), "", ""]
        if kind == "looks" and number.isdigit():
            found.setdefault(environment, set()).add(int(number))
    if not found:
        return f"No rollout of {model} has any; `trainyard status` shows all channels."
    return f"Rollouts with looks: {_listed(found)}."


def _listed(found: Mapping[str, Iterable[int]]) -> str:
    return "; ".join(
        f"{', '.join(_ranges(sorted(numbers)))} in {environment}"
        for environment, numbers in sorted(found.items())
    )


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Return ascending numbers as `3` and `5-9`."""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return [
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    ]


def _comparison(looks: Sequence[Look], channel: Channel, number: int) -> Comparison | None:
    """Return what the newest look was told; looks of older versions do not say, but the channel
    knows it of its present rollout."""
    told = [look.comparison for look in looks if look.comparison is not None]
    if told:
        return told[-1]
    rollout = channel.rollout
    if rollout is None or rollout.number != number or rollout.exposed_since is None:
        return None
    return Comparison(
        candidate=rollout.release_id,
        stable=rollout.reference_id,
        exposed_since=rollout.exposed_since,
        judge=rollout.plan.judge,
    )


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
