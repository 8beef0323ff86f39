"""The reference: a forward pass of the checkpoint's own files with transformers, on the CPU.

It shares nothing with what it judges but the files: neither the compiled code nor the server's
loader, kernels or tokenizer process. Runs in the serving environment.

    python -m trainyard.measure.reference OUT

makes one apart from a measurement: it reads a `ReferenceJob` as JSON from standard input and writes
the reference to the file OUT, or says on standard error why it cannot.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainyard.documents.base import Frozen
from trainyard.documents.parity import (
    REFERENCE_TOKENS,
    Reference,
    ReferenceAnswer,
    ReferencePosition,
    ReferenceSettings,
)
from trainyard.errors import OutOfCapacity, Refused, TrainyardError

_SMALL = 100_000_000
"""Parameters below which one thread is faster than many that wait for each other."""

Tell = Callable[[float, str], None]
"""Told the fraction (0 to 1) and what happens."""


class ReferenceJob(Frozen):
    """A reference to be made."""

    model_dir: str
    prompts: tuple[str, ...]
    settings: ReferenceSettings
    checkpoint_digest: str


def main() -> int:
    """Make the reference of the job on standard input.

    Returns:
        An exit code of `trainyard.errors`.
    """
    job = ReferenceJob.model_validate_json(sys.stdin.read())
    try:
        made = make_reference(
            Path(job.model_dir),
            job.prompts,
            job.settings,
            checkpoint_digest=job.checkpoint_digest,
            tell=lambda fraction, what: print(f"{fraction:.0%} {what}", flush=True),
        )
    except TrainyardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    Path(sys.argv[1]).write_bytes(made.to_bytes())
    return 0


def make_reference(
    model_dir: Path,
    prompts: Sequence[str],
    settings: ReferenceSettings,
    *,
    checkpoint_digest: str,
    tell: Tell = lambda _fraction, _what: None,
) -> Reference:
    """Answer all prompts greedily with the checkpoint in `model_dir`.

    Where the served number format is another one than the reference's, a second pass in that format
    over the same tokens shows what rounding alone does.

    Raises:
        Refused: transformers cannot load or run the model.
        OutOfCapacity: there is not enough memory.
    """
    began = time.monotonic()
    with reference_model(model_dir, settings.dtype) as model:
        answers = []
        for number, prompt in enumerate(prompts):
            tell(number / len(prompts), "parity: making the reference")
            answers.append(model.answer(prompt, settings.max_tokens))
    if settings.dtype == "float32" and settings.served_dtype != "float32":
        with reference_model(model_dir, settings.served_dtype) as model:
            answers = [model.rounded(answer) for answer in answers]
    return Reference(
        checkpoint_digest=checkpoint_digest,
        settings=settings,
        answers=tuple(answers),
        made_with={name: version(name) for name in ("torch", "transformers")},
        seconds=round(time.monotonic() - began, 1),
    )


class ReferenceModel:
    """A loaded checkpoint."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take what transformers loaded."""
        self._model = model
        self._tokenizer = tokenizer
        self._ends = _end_tokens(model, tokenizer)

    def answer(self, prompt: str, max_tokens: int) -> ReferenceAnswer:
        """Return the greedy answer to `prompt`, up to and with the token that ends it."""
        import torch
        from transformers import GenerationConfig

        prompt_tokens = [int(each) for each in self._tokenizer(prompt)["input_ids"]]
        # What the model's files prefer (penalties, sampling) is not what the server was asked for.
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=0,
        )
        inputs = torch.tensor([prompt_tokens])
        with torch.inference_mode():
            written = self._model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=greedy
            )
        tokens = [int(each) for each in written[0, len(prompt_tokens) :]]
        return ReferenceAnswer(
            prompt_tokens=tuple(prompt_tokens),
            tokens=tuple(tokens),
            positions=tuple(self.positions(prompt_tokens, tokens)),
        )

    def positions(
        self, prompt_tokens: Sequence[int], tokens: Sequence[int]
    ) -> list[ReferencePosition]:
        """Return what the model says about each token of any answer, in one forward pass."""
        logprobs = self._logprobs(prompt_tokens, tokens)
        top = logprobs.topk(min(REFERENCE_TOKENS, logprobs.shape[-1]))
        return [
            ReferencePosition(tokens=tuple(indices), logprobs=tuple(values))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    def rounded(self, answer: ReferenceAnswer) -> ReferenceAnswer:
        """Return `answer` with what this model says about the same tokens."""
        logprobs = self._logprobs(answer.prompt_tokens, answer.tokens)
        positions = [
            position.model_copy(update={"rounded": tuple(row[list(position.tokens)].tolist())})
            for position, row in zip(answer.positions, logprobs, strict=True)
        ]
        return answer.model_copy(update={"positions": tuple(positions)})

    def _logprobs(self, prompt_tokens: Sequence[int], tokens: Sequence[int]) -> Any:
        """Return log-probs of all tokens at each position of an answer: (positions, vocabulary)."""
        import torch

        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([[*prompt_tokens, *tokens]])).logits[0]
        here = logits[len(prompt_tokens) - 1 : len(prompt_tokens) + len(tokens) - 1]
        return torch.log_softmax(here.double(), dim=-1)


class Rescorer:
    """Asks the reference about answers that are not its own; loads it when it is first asked."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        """Load nothing yet."""
        self._model_dir, self._dtype = model_dir, dtype
        self._loaded = ExitStack()
        self._model: ReferenceModel | None = None

    def positions(
        self, prompt_tokens: Sequence[int], tokens: Sequence[int]
    ) -> list[ReferencePosition]:
        """Return what the reference says about each token of an answer."""
        if self._model is None:
            self._model = self._loaded.enter_context(reference_model(self._model_dir, self._dtype))
        return self._model.positions(prompt_tokens, tokens)

    def __enter__(self) -> Rescorer:
        """Nothing to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the memory back."""
        self._model = None
        self._loaded.close()


@contextmanager
def reference_model(model_dir: Path, dtype: str) -> Iterator[ReferenceModel]:
    """Load a checkpoint in a number format, and give its memory back in the end.

    Raises:
        Refused: transformers cannot load or run it.
        OutOfCapacity: there is not enough memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    model = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        large = sum(each.numel() for each in model.parameters()) > _SMALL
        torch.set_num_threads(len(os.sched_getaffinity(0)) if large else 1)
        yield ReferenceModel(model, tokenizer)
    except MemoryError as error:
        raise OutOfCapacity(
            "There is not enough memory for the reference of the parity check.",
            hint="Measure on a machine with more, or set gates.accuracy.parity.dtype: bfloat16.",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise Refused(
            f"transformers cannot compute the reference of the parity check: "
            f"{type(error).__name__}: {error}",
            hint="Parity needs a model that transformers knows by itself, without remote code.",
        ) from error
    finally:
        del model
        gc.collect()
        torch.set_num_threads(threads)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, by everything that names them."""
    found: list[Any] = []
    for named in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found += named if isinstance(named, list | tuple) else [named]
    return frozenset(each for each in found if isinstance(each, int))


if __name__ == "__main__":
    raise SystemExit(main())
