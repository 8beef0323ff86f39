"""Warm-up: real requests to a new server before it gets traffic."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import httpx

from trainyard.documents.release import Release
from trainyard.errors import CorruptFile, NotFound
from trainyard.rollout.release_assets import asset_text
from trainyard.serving.protocol import ServerStatus
from trainyard.store.protocol import Store

DEFAULT_PROMPTS = ("12345", "1, 2, 3, ", "10 + 20 = ")
"""Digits: every tokenizer knows them."""

MAX_TOKENS = 16
REQUEST_TIMEOUT_S = 30.0
CONCURRENCY = 4
"""Requests at the same time, so that a batch of more than one is warmed up as well."""


@dataclass(frozen=True)
class WarmUpReport:
    """What came of the requests."""

    asked: int
    answered: int
    refused: int
    """Answered with an error; the rest got no answer at all."""
    message: str
    """The first failure, in one sentence; else empty."""


class Warmer(Protocol):
    """Sends warm-up requests."""

    def warm_up(
        self, server: ServerStatus, release: Release, *, requests: int, budget_s: float
    ) -> WarmUpReport:
        """Have a server answer so many requests; those not sent within `budget_s` are lost."""


class HttpWarmer:
    """Sends completions straight to a server."""

    def __init__(
        self,
        store: Store,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take prompts from `store`; a request may take `timeout_s`."""
        self._store = store
        self._timeout_s = timeout_s
        self._monotonic = monotonic

    def warm_up(
        self, server: ServerStatus, release: Release, *, requests: int, budget_s: float
    ) -> WarmUpReport:
        """Have a server answer so many requests; those not sent within `budget_s` are lost."""
        until = self._monotonic() + budget_s
        prompts = list(
            itertools.islice(itertools.cycle(load_prompts(self._store, release)), requests)
        )
        with (
            httpx.Client(
                base_url=server.url, timeout=min(self._timeout_s, budget_s), trust_env=False
            ) as client,
            ThreadPoolExecutor(CONCURRENCY) as pool,
        ):

            def ask(prompt: str) -> tuple[str, str]:
                if self._monotonic() >= until:
                    return "lost", f"there was no time for it within {budget_s:g} s"
                return _ask(client, release.served_model_name, prompt)

            results = list(pool.map(ask, prompts))
        failures = [message for outcome, message in results if outcome != "answered"]
        return WarmUpReport(
            asked=requests,
            answered=sum(outcome == "answered" for outcome, _ in results),
            refused=sum(outcome == "refused" for outcome, _ in results),
            message=failures[0] if failures else "",
        )


def _ask(client: httpx.Client, model: str, prompt: str) -> tuple[str, str]:
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    try:
        response = client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        return "lost", f"{type(error).__name__}: {error}"
    if response.status_code != httpx.codes.OK:
        return "refused", f"status {response.status_code}: {response.text[:200]}"
    try:
        text = response.json()["choices"][0]["text"]
    except (ValueError, LookupError, TypeError):
        return "refused", f"no completion in the answer: {response.text[:200]}"
    return ("answered", "") if isinstance(text, str) else ("refused", "the completion is no text")


def load_prompts(store: Store, release: Release) -> Sequence[str]:
    """Return the prompts that were frozen with the release's plan, or the default ones."""
    if release.spec.prompts is None:
        return DEFAULT_PROMPTS
    try:
        text = asset_text(store, release, release.spec.prompts)
    except (NotFound, CorruptFile):
        return DEFAULT_PROMPTS
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return tuple(str(json.loads(line)["prompt"]) for line in lines) or DEFAULT_PROMPTS
