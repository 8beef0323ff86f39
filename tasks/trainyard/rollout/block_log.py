"""Logs of blocks: as a file of JSON lines, and as the looks of a rollout that is stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from trainyard.documents.channel import Channel
from trainyard.documents.evidence import Block, JudgeSpec, default_metrics
from trainyard.documents.look import Comparison, Look
from trainyard.errors import BadInput, NotFound
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.looks import LookLog
from trainyard.rollout.slices import blocks_from_snapshots
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


def stored_log(
    store: Store, model: str, environment: str, number: int
) -> tuple[list[Block], JudgeSpec]:
    """Return the blocks and the specification of a rollout, over or not.

    Raises:
        NotFound: there is no such rollout, or it never compared anything.
    """
    looks = LookLog(store).read(model, environment, number)
    if not looks:
        raise NotFound(
            f"Rollout {number} of {model} in {environment} has no looks.",
            hint=f"`trainyard channel {model} {environment}` shows the rollouts there were.",
        )
    comparison = _comparison(looks, read_channel(store, model, environment), number)
    if comparison is None:
        raise NotFound(
            f"Rollout {number} of {model} in {environment} compared nothing.",
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
    return blocks, comparison.judge


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
