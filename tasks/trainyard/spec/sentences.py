"""What the validator found, said in plain sentences."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from trainyard.names import NAME_PATTERN, REVISION_PATTERN
from trainyard.spec.kubernetes import (
    ABSOLUTE_PATH_PATTERN,
    DNS_LABEL_PATTERN,
    DNS_NAME_PATTERN,
    ENV_NAME_PATTERN,
    RESERVATION_PATTERN,
)
from trainyard.spec.metrics import HTTP_URL_PATTERN, LABEL_PATTERN, REGION_PATTERN
from trainyard.spec.model import (
    HUB_REPO_PATTERN,
    HUB_REVISION_PATTERN,
    INSTANCE_PATTERN,
    S3_URI_PATTERN,
    SERVED_NAME_PATTERN,
    TASK_NAME_PATTERN,
    SpecPart,
)
from trainyard.spec.neuron import FLAG_PATTERN, IMAGE_PATTERN, SDK_PATTERN
from trainyard.spec.partial import part_kinds
from trainyard.spec.ways import (
    ADDRESS_PATTERN,
    CONNECTION_PATTERN,
    PERSON_PATTERN,
    TOPIC_PATTERN,
)
from trainyard.spec.windows import TIME_OF_DAY_PATTERN, TIME_ZONE_PATTERN
from trainyard.spec.yaml_source import Location

_PATTERNS = {
    NAME_PATTERN: "Use 1 to 40 lower-case letters, digits and hyphens, starting and ending with a "
    "letter or digit.",
    REVISION_PATTERN: "Use 1 to 100 letters, digits, dots, hyphens and underscores (no '/').",
    TASK_NAME_PATTERN: "Use 1 to 100 letters, digits, dots, hyphens and underscores.",
    SERVED_NAME_PATTERN: "Use letters, digits and . _ : / @ -, starting with a letter or digit.",
    INSTANCE_PATTERN: "Write `local` or the instance type, such as `trn2.48xlarge`.",
    SDK_PATTERN: "Write all three numbers of the AWS Neuron SDK, such as `2.32.0`.",
    RESERVATION_PATTERN: "Write the id of the reservation, such as `cr-0123456789abcdef0`.",
    IMAGE_PATTERN: "Write registry, repository and tag or digest of a container image.",
    FLAG_PATTERN: "Write one flag of neuronx-cc, such as `--auto-cast=none`.",
    HUB_REPO_PATTERN: "Write the model's name on the Hub, such as `organization/model`.",
    HUB_REVISION_PATTERN: "Write a branch, a tag or a commit, such as `main`.",
    S3_URI_PATTERN: "Write `s3://BUCKET/PREFIX/`, without credentials.",
    DNS_LABEL_PATTERN: "Use 1 to 63 lower-case letters, digits and hyphens, starting and ending "
    "with a letter or digit.",
    DNS_NAME_PATTERN: "Use lower-case letters, digits, dots and hyphens, starting and ending with "
    "a letter or digit.",
    ABSOLUTE_PATH_PATTERN: "Write a whole path that begins with `/`.",
    TIME_OF_DAY_PATTERN: 'Write hours and minutes in quotes, such as `"18:00"`.',
    TIME_ZONE_PATTERN: "Write a name of the IANA database, such as `Europe/Berlin`.",
    ENV_NAME_PATTERN: "Use letters, digits and underscores, not starting with a digit.",
    HTTP_URL_PATTERN: "Write `http://` or `https://`, a host and perhaps a path, without user, "
    "password or query.",
    LABEL_PATTERN: "Use letters, digits and underscores, not starting with a digit, as "
    "Prometheus does.",
    REGION_PATTERN: "Write an AWS region, such as `eu-central-1`.",
    PERSON_PATTERN: "Write the name with which they log in to Airflow, without spaces around it.",
    CONNECTION_PATTERN: "Write the id of an Airflow connection: letters, digits, dots, hyphens and "
    "underscores.",
    ADDRESS_PATTERN: "Write an e-mail address, such as `team@example.org`.",
    TOPIC_PATTERN: "Write the ARN of the topic, such as `arn:aws:sns:us-west-2:123456789012:yard`.",
}

_SECRET_KEYS = re.compile(r"token|secret|password|passwd|credential|access_?key|api_?key")
_SECRET_VALUES = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)")

SECRETS_ELSEWHERE = (
    "Set TRAINYARD_HUB_TOKEN or HF_TOKEN, or name an Airflow connection in "
    "TRAINYARD_HUB_CONNECTION; for S3 use the usual AWS configuration."
)
"""Where credentials of a source belong."""

_MOMENT = "Write date, time and time zone, such as `2026-12-01T11:30:00Z`."

_TYPES = {
    "string": ("text", "Write text; put quotes around a value that looks like a number or a word "
               "such as true or null."),
    "int": ("a whole number", "Write a whole number without quotes."),
    "float": ("a number", "Write a number without quotes."),
    "bool": ("true or false", "Write true or false without quotes."),
    "tuple": ("a list", "Write a list: one `- item` a line, or `[a, b]`."),
    "list": ("a list", "Write a list: one `- item` a line, or `[a, b]`."),
    "dict": ("a mapping", "Write keys and values below it, indented."),
    "model": ("a mapping", "Write keys and values below it, indented."),
    "datetime": ("a moment", _MOMENT),
    "timezone": ("a moment with its time zone", _MOMENT),
}  # fmt: skip


def say(error: ErrorDetails, root: type[SpecPart]) -> tuple[Location, str, str]:
    """Return location, message and remedy for one error of the validator.

    Args:
        error: an item of `ValidationError.errors()`.
        root: the type that was validated.
    """
    kind, value = error["type"], error.get("input")
    context: dict[str, Any] = error.get("ctx") or {}
    location, holder = _place(root, tuple(part for part in error["loc"] if part != "[key]"))
    if kind == "extra_forbidden":
        return location, *_unknown_key(str(location[-1]), holder)
    if kind == "missing":
        return location, *_missing_key(str(location[-1]), holder)
    if kind.startswith("union_tag"):
        return (*location, "kind"), *_wrong_kind(context.get("tag"), _annotation_at(root, location))
    if error["loc"] and error["loc"][-1] == "[key]":
        value = location[-1]
    shown = show(value)
    if kind == "literal_error":
        choices = _choices(context)
        return location, f"{shown} is not possible here.", choose(value, choices)
    if kind == "string_pattern_mismatch":
        remedy = _PATTERNS.get(context["pattern"], f"It must match {context['pattern']}.")
        return location, f"{shown} is not a valid name.", remedy
    if kind in ("string_too_short", "too_short"):
        return location, "There is nothing here.", "Give at least one."
    limit = _limit(kind, context)
    if limit is not None:
        return location, f"{shown} is out of range.", f"Give a number {limit}."
    wanted = _TYPES.get(kind.split("_")[0])
    if wanted is not None:
        return location, f"{shown} is not {wanted[0]}.", wanted[1]
    return location, f"{shown} is not possible here.", f"The rule is: {error['msg']}."


def show(value: Any) -> str:
    """Return a value as people wrote it, shortened."""
    if isinstance(value, dict):
        return "A mapping"
    if isinstance(value, list | tuple):
        return "A list"
    if value is None:
        return "Nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = _SECRET_VALUES.sub("***", repr(value))
    return text if len(text) <= 60 else f"{text[:57]}…'"


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return "Did you mean …?" for the nearest choice, or an empty text."""
    near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.55)
    return f"Did you mean {near[0]}?" if near else ""


def choose(value: object, choices: Sequence[str]) -> str:
    """Return the remedy for a value that is none of `choices`."""
    listed = f"Possible: {', '.join(choices)}."
    return f"{did_you_mean(value, choices)} {listed}".strip()


def holds_secret(value: str) -> bool:
    """Tell whether a text has the form of a token, or of a URL with credentials."""
    return _SECRET_VALUES.search(value) is not None


def _annotation_at(root: type[SpecPart], location: Location) -> Any:
    annotation: Any = root
    for step in location:
        annotation = _inside(annotation, step)
    return annotation


def _place(root: type[SpecPart], reported: Location) -> tuple[Location, type[SpecPart] | None]:
    """Return the location in the file that the validator means, and the part that it is in.

    The validator puts the `kind` of a part among the steps where several kinds are possible.
    """
    annotation: Any = root
    holder: type[SpecPart] | None = None
    location: list[str | int] = []
    for step in reported:
        kinds = part_kinds(annotation)
        if step in kinds:
            annotation = kinds[str(step)]
            continue
        holder = _plain(annotation)
        annotation = _inside(annotation, step)
        location.append(step)
    return tuple(location), holder


def _plain(annotation: Any) -> type[SpecPart] | None:
    if isinstance(annotation, type) and issubclass(annotation, SpecPart):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = (_plain(argument) for argument in get_args(annotation))
        return next((part for part in found if part is not None), None)
    return None


def _inside(annotation: Any, step: str | int) -> Any:
    part = _plain(annotation)
    if part is not None:
        for name, field in part.model_fields.items():
            if (field.alias or name) == step:
                return field.annotation
        return None
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return None


def _keys(part: type[SpecPart] | None) -> dict[str, str]:
    """Return the keys of a part with their descriptions."""
    if part is None:
        return {}
    return {
        field.alias or name: field.description or "" for name, field in part.model_fields.items()
    }


def _unknown_key(key: str, part: type[SpecPart] | None) -> tuple[str, str]:
    if key == "<<":
        return "Merge keys are not allowed.", "Write the keys out."
    # Elsewhere it is a typing error, of `max_num_batched_tokens` for example.
    if "kind" in _keys(part) and _SECRET_KEYS.search(key.lower()):
        return f"{key!r}: credentials do not belong into a spec.", SECRETS_ELSEWHERE
    return f"There is no key {key!r} here.", choose(key, list(_keys(part)))


def _missing_key(key: str, part: type[SpecPart] | None) -> tuple[str, str]:
    meaning = " ".join(_keys(part).get(key, "").split())
    return f"The key {key!r} is missing.", f"Add `{key}:`. {meaning}".strip()


def _wrong_kind(kind: str | None, annotation: Any) -> tuple[str, str]:
    kinds = list(part_kinds(annotation))
    if kind is None:
        return "The key 'kind' is missing.", choose("", kinds)
    return f"{show(kind)} is not possible here.", choose(kind, kinds)


def _choices(context: dict[str, Any]) -> list[str]:
    text = str(context.get("expected") or "")
    return [item.strip(" '") for item in text.replace(" or ", ", ").split(", ")]


def _limit(kind: str, context: dict[str, Any]) -> str | None:
    words = {
        "greater_than_equal": ("of at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("of at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind not in words:
        return None
    word, bound = words[kind]
    return f"{word} {context[bound]:g}"
