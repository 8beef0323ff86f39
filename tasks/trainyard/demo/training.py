"""Train the demonstration model: a very small Llama that adds two-digit numbers.

A prompt is `12+34=`, the right answer `640.`: three digits, the last one first, then a full stop.
One training run gives several revisions of truly different quality; all have one architecture, so
they share compiled code. Pairs for which `held_out` holds are never trained on.

    python -m trainyard.demo.training --out FOLDER [--revisions r1 r2 r3] [--steps N]

Runs in the serving environment (torch, transformers). Prints one JSON object a line:
`{"step", "total", "loss", "accuracy"}` while it trains (loss and accuracy are from the last
evaluation; accuracy is the share of held-out sums that are exactly right), and
`{"revision", "path", "step", "accuracy", "reused"}` for each revision that stands (step and
accuracy are those of its training, null if unknown). A revision that exists is kept. One that is
being written is invisible until it is whole.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from trainyard.errors import BadInput, Refused, TrainyardError

if TYPE_CHECKING:
    import torch

FULL_STEPS = 800
"""Optimizer steps after which the recipe answers every held-out sum."""

BATCH = 256
PEAK_LEARNING_RATE = 3e-3
SEED = 20261122
EVALUATE_EVERY = 25

_ATTEMPTS = 3
"""Trainings with different seeds: PyTorch computes differently on other processors, and once in a
while a training does not pass through the qualities that are wanted."""

_RECORD = ".training.json"

PAD, END = "<pad>", "</s>"
CHARACTERS = "0123456789+=."
VOCABULARY = [PAD, END, *CHARACTERS]


@dataclass(frozen=True)
class Recipe:
    """Which weights of the training run become a revision."""

    revision: str
    wanted: str
    """For people: what this revision is for."""
    lowest: float
    """Least held-out accuracy it may have."""
    highest: float
    """Most held-out accuracy it may have."""
    pick: str
    """`first`: the first evaluated weights in the range; `last`: the last before leaving it."""


RECIPES = {
    recipe.revision: recipe
    for recipe in (
        Recipe("r1", "a decent first release", lowest=0.85, highest=0.985, pick="first"),
        Recipe(
            "r2", "a better one: the end of the training", lowest=0.99, highest=1.0, pick="last"
        ),
        Recipe("r3", "worse weights, for the accuracy gate", lowest=0.01, highest=0.6, pick="last"),
    )
}


def held_out(left: int, right: int) -> bool:
    """Tell whether the sum of these two numbers (0 to 99) is kept for evaluation.

    One pair in eleven. The rule mixes tens and units, so that no pair of digits is missing from
    the training.
    """
    return (left + 3 * right) % 11 == 0


def prompt(left: int, right: int) -> str:
    """Return the prompt that asks for a sum, such as `07+34=`."""
    return f"{left:02d}+{right:02d}="


def answer(left: int, right: int) -> str:
    """Return the right answer, such as `140.` for 7 and 34 (041 reversed)."""
    return f"{left + right:03d}"[::-1] + "."


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing; return an exit code of `trainyard.errors`."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the revisions")
    parser.add_argument("--revisions", nargs="+", default=list(RECIPES), help="revisions to make")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"optimizer steps (default {FULL_STEPS}); when given, weights are saved as they come",
    )
    chosen = parser.parse_args(arguments)
    try:
        train(chosen.out, chosen.revisions, steps=chosen.steps, report=_print_line)
    except TrainyardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def train(
    out: Path,
    revisions: Sequence[str],
    *,
    steps: int | None = None,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train once and save those of `revisions` that `out` does not hold yet.

    Without `steps` the full recipe runs, and each revision has the quality that `RECIPES` promises.
    With `steps` the run is as short as asked, and every revision is saved with whatever weights the
    training ended with (for tests).

    Raises:
        BadInput: an unknown revision, or no steps.
        Refused: several trainings did not pass through the promised qualities.
    """
    unknown = sorted(set(revisions) - set(RECIPES))
    if unknown:
        raise BadInput(
            f"There is no recipe for revision {', '.join(unknown)}.",
            hint=f"Known revisions: {', '.join(RECIPES)}.",
        )
    if steps is not None and steps < 1:
        raise BadInput(f"--steps {steps} trains nothing.", hint="Give at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".training.lock"):
        missing = [RECIPES[name] for name in revisions if not (out / name).exists()]
        record = _read_record(out)
        for name in revisions:
            if (out / name).exists():
                unknown_origin = {"step": None, "accuracy": None}
                report(_revision(out, name, record.get(name, unknown_origin), reused=True))
        for attempt in range(1, _ATTEMPTS + 1):
            if not missing:
                return
            try:
                _train_missing(out, missing, steps, SEED + attempt - 1, report)
            except Refused:
                if attempt == _ATTEMPTS:
                    raise
            missing = [recipe for recipe in missing if not (out / recipe.revision).exists()]


def _train_missing(
    out: Path,
    missing: list[Recipe],
    steps: int | None,
    seed: int,
    report: Callable[[dict[str, Any]], None],
) -> None:
    import torch

    # Threads that wait for each other crawl while others use the processors, as they do here.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = _new_model()
    data = _Data.build()
    total = steps or FULL_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=total
    )
    shuffle = torch.Generator().manual_seed(seed)
    kept: dict[str, tuple[dict[str, Any], Any]] = {}
    accuracy = 0.0

    for step in range(1, total + 1):
        rows = torch.randint(len(data.train), (BATCH,), generator=shuffle)
        tokens = data.train[rows]
        logits = model(input_ids=tokens[:, :-1]).logits
        answers = slice(data.prompt_length - 1, None)
        loss = torch.nn.functional.cross_entropy(
            logits[:, answers].flatten(0, 1), tokens[:, 1:][:, answers].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY and step != total:
            continue
        accuracy = data.accuracy(model)
        report({"step": step, "total": total, "loss": float(loss.detach()), "accuracy": accuracy})
        for recipe in missing:
            if steps is None and not recipe.lowest <= accuracy <= recipe.highest:
                continue
            origin = {"step": step, "accuracy": accuracy}
            if recipe.pick == "first" and steps is None:
                # Nothing later can change it, so whoever waits for it may go on at once.
                if not (out / recipe.revision).exists():
                    _keep(model, out, recipe, origin, report)
            else:
                kept[recipe.revision] = (origin, copy.deepcopy(model.state_dict()))

    for recipe in missing:
        if (out / recipe.revision).exists():
            continue
        if recipe.revision not in kept:
            raise Refused(
                f"The training passed no weights fit for revision {recipe.revision} "
                f"({recipe.wanted}: {recipe.lowest:.0%} to {recipe.highest:.0%} of held-out sums "
                f"right); it ended at {accuracy:.0%}.",
                hint="Run it again; if that does not help, report the versions of torch and "
                "transformers.",
            )
        origin, weights = kept[recipe.revision]
        model.load_state_dict(weights)
        _keep(model, out, recipe, origin, report)


def _keep(
    model: Any,
    out: Path,
    recipe: Recipe,
    origin: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Save the model's weights as a revision and report it."""
    _write_record(out, recipe.revision, origin)
    _save(model, out, recipe.revision)
    report(_revision(out, recipe.revision, origin, reused=False))


@dataclass(frozen=True)
class _Data:
    """All sums as token ids, split by `held_out`."""

    train: torch.Tensor
    """(sums, tokens), int64."""
    test: torch.Tensor
    prompt_length: int
    """Tokens before the answer."""

    @classmethod
    def build(cls) -> _Data:
        import torch

        ids = {token: index for index, token in enumerate(VOCABULARY)}
        rows: dict[bool, list[list[int]]] = {False: [], True: []}
        for left, right in itertools.product(range(100), repeat=2):
            text = prompt(left, right) + answer(left, right)
            rows[held_out(left, right)].append([*(ids[char] for char in text), ids[END]])
        return cls(torch.tensor(rows[False]), torch.tensor(rows[True]), len(prompt(0, 0)))

    def accuracy(self, model: Any) -> float:
        """Return the share of held-out sums that greedy decoding gets exactly right.

        Greedy decoding gives the right answer exactly when each of its tokens is the most likely
        one after the right tokens before it, so one pass over the whole text suffices.
        """
        import torch

        with torch.inference_mode():
            guesses = model(input_ids=self.test[:, :-1]).logits.argmax(-1)
        right = (guesses == self.test[:, 1:])[:, self.prompt_length - 1 :].all(dim=1)
        return float(right.double().mean())


def _new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(END),
        pad_token_id=VOCABULARY.index(PAD),
    )
    return LlamaForCausalLM(config)


def _save(model: Any, out: Path, revision: str) -> None:
    """Write a revision's folder so that it appears whole or not at all."""
    import torch

    folder = out / f".writing-{revision}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    folder.rename(out / revision)


def _tokenizer() -> Any:
    """Return a tokenizer with one token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template="{{ messages[-1]['content'] }}",
    )


def _revision(out: Path, name: str, origin: Mapping[str, Any], *, reused: bool) -> dict[str, Any]:
    return {"revision": name, "path": str(out / name), **origin, "reused": reused}


def _read_record(out: Path) -> dict[str, dict[str, Any]]:
    """Return step and accuracy of each revision that was trained into `out`."""
    try:
        record: dict[str, dict[str, Any]] = json.loads((out / _RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record


def _write_record(out: Path, revision: str, origin: Mapping[str, Any]) -> None:
    temporary = out / f"{_RECORD}.new"
    temporary.write_text(json.dumps(_read_record(out) | {revision: dict(origin)}))
    temporary.replace(out / _RECORD)


def _print_line(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
