"""What the checks ask with: prompts, lengths, and how near a tie is."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput
from trainyard.measure.behaviour.answers import Prompt

PROBES = 8
"""Prompts whose answers are compared."""
ANSWER_TOKENS = 16
MOST_AT_ONCE = 256
"""Requests that a full batch has at most here; a server may be able to run more."""
RANDOM_TOKENS = 12
"""Tokens of a random prompt."""

NEAR_TIE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5}
"""Nats by number format. Logits of common models lie between 8 and 32, where neighbouring numbers
of bfloat16 are 0.06 to 0.13 apart, of float16 0.008 to 0.016; a token's logit and its rival's are
each a few of those off when sums are made in another order."""
UNKNOWN_BLOCK = 128
"""Tokens in a block of the KV cache where the target leaves it to the lane: the most of any."""


@dataclass(frozen=True)
class Setting:
    """The server's limits and what is asked of it."""

    max_model_len: int
    max_num_seqs: int
    block_size: int
    prefix_caching: bool
    near_tie: float
    vocabulary: tuple[int, ...]
    """Token ids that mean text."""
    probes: tuple[Prompt, ...]
    seed: int = 0

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer: as many as there is room for beside the prompts."""
        return max(1, min(ANSWER_TOKENS, self.max_model_len // 4))

    @property
    def batch(self) -> int:
        """Requests of a full batch."""
        return min(self.max_num_seqs, MOST_AT_ONCE)

    def tokens(self, count: int, name: str) -> tuple[int, ...]:
        """Return random tokens, the same for each name and seed."""
        chosen = random.Random(f"{self.seed}/{name}")
        return tuple(chosen.choices(self.vocabulary, k=count))


def probes_of(texts: Sequence[str], setting: Setting) -> tuple[Prompt, ...]:
    """Return the prompts whose answers are compared: half from the spec's, half random tokens."""
    room = min(RANDOM_TOKENS, max(1, setting.max_model_len // 4))
    # Each character may become several tokens, and the answer needs room too.
    short = [text for text in texts if text and len(text.encode()) <= setting.max_model_len // 2]
    chosen: list[Prompt] = []
    chosen += [*dict.fromkeys(short)][: PROBES // 2]
    numbers = itertools.count()
    while len(chosen) < PROBES:
        chosen.append(setting.tokens(room, f"probe {next(numbers)}"))
    return tuple(chosen)


def read_vocabulary(model_dir: Path) -> tuple[int, ...]:
    """Return the ids of a model's tokens, without those that stand for something else than text.

    Raises:
        BadInput: config.json does not say how many there are.
    """
    config = _read(model_dir / "config.json")
    text = config.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else {}
    size = config.get("vocab_size", inner.get("vocab_size"))
    if not isinstance(size, int) or size < 1:
        raise BadInput(
            "The model's config.json has no `vocab_size`.",
            hint="The behaviour checks ask with token ids; complete the file.",
        )
    special = {
        number
        for values in (config, inner, _read(model_dir / "generation_config.json"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for number in _numbers(values.get(name))
    }
    added = _read(model_dir / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("special"):
            special.update(_numbers(token.get("id")))
    # Rows beyond the tokenizer's own are padding of the matrix, and refused by the server.
    size = min(size, _known_tokens(model_dir) or size)
    return tuple(number for number in range(size) if number not in special) or tuple(range(size))


def _known_tokens(model_dir: Path) -> int:
    model = _read(model_dir / "tokenizer.json").get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return len(vocab) if isinstance(vocab, dict | list) else 0


def read_texts(path: Path | None) -> tuple[str, ...]:
    """Return the prompts of a spec's JSONL file, none without a file."""
    if path is None:
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(str(json.loads(line)["prompt"]) for line in lines if line.strip())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int)]
