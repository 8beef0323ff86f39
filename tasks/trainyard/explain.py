"""Which field makes two compile keys, releases or plans differ, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trainyard.canonical import canonical_json
from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.plan import Plan, PlannedTarget
from trainyard.errors import BadInput, NotFound
from trainyard.identity import meaning
from trainyard.releases import peek_release
from trainyard.store.documents import read_document
from trainyard.store.layout import MANIFEST_NAME, bundle_manifest_key, plan_key, release_key
from trainyard.store.protocol import Store

_KEY = re.compile(r"[0-9a-f]{6,64}")
_RELEASE = re.compile(r"(?P<model>[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)-[0-9a-f]{12}")
_KEY_DIGITS = 64


class Absent(Enum):
    """The value of a field that is not there."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


@dataclass(frozen=True)
class FieldDifference:
    """One field that differs."""

    path: str
    """Dotted, such as `neuron_config.num_seqs_buckets`."""
    left: Any
    """`ABSENT` if the field is not there."""
    right: Any
    why: str
    """What the field is to the code or the release; may be empty."""


@dataclass(frozen=True)
class Identity:
    """What something is made of."""

    name: str
    compile_key: str
    key_inputs: Mapping[str, Any]
    serving: Mapping[str, Any] = field(default_factory=dict)
    """Empty for a compile key, which says nothing of it."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """Weights: revision and digest, as far as they are known."""


@dataclass(frozen=True)
class Explanation:
    """Everything that differs between two identities."""

    code: tuple[FieldDifference, ...]
    serving: tuple[FieldDifference, ...]
    checkpoint: tuple[FieldDifference, ...]

    @property
    def consequence(self) -> str:
        """What follows, in a sentence or two."""
        if self.code:
            fields = "1 field" if len(self.code) == 1 else f"{len(self.code)} fields"
            return f"The compile keys differ in {fields}: the code is compiled anew for each."
        if self.serving and self.checkpoint:
            return (
                "The same compiled code serves both; they are different releases, with other "
                "weights and other serving settings."
            )
        if self.serving:
            return "The same compiled code serves both; another serving is another release."
        if self.checkpoint:
            return "The same compiled code serves both; other weights are another release."
        return "Nothing differs."


def difference(
    left: Mapping[str, Any], right: Mapping[str, Any], *, below: str = ""
) -> tuple[FieldDifference, ...]:
    """Return the fields that differ, sorted by name; mappings are compared field by field.

    There is none exactly if both have the same canonical JSON, and so the same digest: 1 is neither
    1.0 nor true, and a field that is not there is not null. Lists are compared as a whole.
    """
    found: list[FieldDifference] = []
    for name in sorted(left.keys() | right.keys()):
        path = f"{below}{name}"
        ours, theirs = left.get(name, ABSENT), right.get(name, ABSENT)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += difference(ours, theirs, below=f"{path}.")
        elif _json(ours) != _json(theirs):
            found.append(FieldDifference(path, ours, theirs, meaning(path)))
    return tuple(found)


def explain(left: Identity, right: Identity) -> Explanation:
    """Return everything in which two identities differ.

    What only one of them knows (a compile key knows no weights) is left out.
    """
    known = left.checkpoint.keys() & right.checkpoint.keys()
    return Explanation(
        code=difference(left.key_inputs, right.key_inputs),
        serving=difference(left.serving, right.serving) if left.serving and right.serving else (),
        checkpoint=difference(
            {name: left.checkpoint[name] for name in known},
            {name: right.checkpoint[name] for name in known},
        ),
    )


def find_identity(store: Store, text: str) -> Identity:
    """Return what `text` stands for.

    Args:
        store: where bundles, releases and plans are.
        text: a compile key or at least 6 of its first digits, a release id, or a plan id; with
            `/<target>` after it if the plan has several targets.

    Raises:
        NotFound: the store has nothing of that name.
        BadInput: it stands for several things.
    """
    if _KEY.fullmatch(text):
        return _of_key(store, text)
    name, _, target = text.partition("/")
    release = _RELEASE.fullmatch(name)
    if release is not None and store.exists(release_key(release["model"], name)):
        return _of_release(store, release["model"], name)
    try:
        plan = read_document(store, plan_key(name), Plan)
    except NotFound as error:
        raise NotFound(
            f"The store has no compile key, release or plan {text!r}.",
            hint="`trainyard releases MODEL` lists releases with their compile keys; a compile key "
            "needs at least 6 digits.",
        ) from error
    return _of_plan(plan, target)


def _of_key(store: Store, text: str) -> Identity:
    keys = [text] if len(text) == _KEY_DIGITS else _keys_beginning(store, text)
    if len(keys) > 1:
        raise BadInput(
            f"{text!r} could mean several compile keys: {', '.join(key[:16] for key in keys)}.",
            hint="Give more digits.",
        )
    for key in keys:
        try:
            bundle = read_document(store, bundle_manifest_key(key), BundleManifest)
        except NotFound:
            continue
        return Identity(f"bundle {key[:12]}", key, bundle.key_inputs)
    return _planned_key(store, text)


def _keys_beginning(store: Store, text: str) -> list[str]:
    manifests = (
        entry.key.split("/")
        for entry in store.list("bundles")
        if entry.key.endswith(f"/{MANIFEST_NAME}")
    )
    return [parts[1] for parts in manifests if len(parts) == 3 and parts[1].startswith(text)]


def _planned_key(store: Store, text: str) -> Identity:
    """Return a compile key that was planned and never compiled."""
    found: dict[str, Identity] = {}
    for entry in store.list("plans"):
        plan = read_document(store, entry.key, Plan)
        for planned in plan.targets:
            if planned.compile_key.startswith(text):
                key = planned.compile_key
                found[key] = Identity(f"planned key {key[:12]}", key, planned.key_inputs)
    if len(found) > 1:
        raise BadInput(
            f"{text!r} could mean several compile keys: {', '.join(key[:16] for key in found)}.",
            hint="Give more digits.",
        )
    for identity in found.values():
        return identity
    raise NotFound(
        f"No bundle and no plan has a compile key that begins with {text!r}.",
        hint="`trainyard releases MODEL` prints the compile key of each release.",
    )


def _of_release(store: Store, model: str, release_id: str) -> Identity:
    release = peek_release(store, model, release_id)
    bundle = read_document(store, bundle_manifest_key(release.compile_key), BundleManifest)
    return Identity(
        f"release {release_id}",
        release.compile_key,
        bundle.key_inputs,
        release.serving,
        {"revision": release.revision, "checkpoint_digest": release.checkpoint_digest},
    )


def _of_plan(plan: Plan, target: str) -> Identity:
    planned = _planned(plan, target)
    return Identity(
        f"plan {plan.plan_id}/{planned.target.name}",
        planned.compile_key,
        planned.key_inputs,
        planned.serving,
        {"revision": plan.revision, "source_fingerprint": plan.source_fingerprint},
    )


def _planned(plan: Plan, target: str) -> PlannedTarget:
    by_name = {planned.target.name: planned for planned in plan.targets}
    if target in by_name:
        return by_name[target]
    if not target and len(by_name) == 1:
        return plan.targets[0]
    names = ", ".join(f"{plan.plan_id}/{name}" for name in by_name)
    if target:
        raise NotFound(f"Plan {plan.plan_id} has no target {target!r}.", hint=f"It has: {names}.")
    raise BadInput(f"Plan {plan.plan_id} has several targets.", hint=f"Name one: {names}.")


def _json(value: Any) -> bytes:
    return b"" if value is ABSENT else canonical_json(value)
