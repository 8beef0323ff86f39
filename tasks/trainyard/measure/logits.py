"""AWS's three-way logit validation, as its plugin for vLLM has it: not the served graph.

    python -m trainyard.measure.logits OUT

reads a `LogitJob` as JSON from standard input, in the image of lane `neuron-native`, and writes
`LogitFigures` to the file OUT, or says on standard error why it cannot. The three are the model in
float32 on the CPU (which also says which tokens follow), the same in bfloat16, and the model on the
device, compiled anew with graphs that return logits.

The interfaces are those of AWS Neuron SDK 2.32 (vllm-neuron/docs/design/accuracy/
logit_validation_design.md): `vllm_neuron.accuracy.goldens.get_cached_reference_goldens` and
`vllm_neuron.accuracy.logit_validation.multi_prompt_logit_validation`. Nobody has run this module on
a device.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainyard.documents.base import Frozen
from trainyard.documents.logits import LogitFigures
from trainyard.errors import BadInput, OutOfCapacity, Refused, TrainyardError

PACKAGES = ("vllm", "vllm-neuron", "torch", "transformers")


class LogitJob(Frozen):
    """What is validated."""

    model_dir: str
    served_model_name: str
    prompts: tuple[str, ...]
    output_tokens: int
    tensor_parallel_size: int
    max_model_len: int
    """Of the graphs that are compiled for it."""


def main() -> int:
    """Validate the job on standard input.

    Returns:
        An exit code of `trainyard.errors`.
    """
    job = LogitJob.model_validate_json(sys.stdin.read())
    try:
        figures = validate(job)
    except TrainyardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    Path(sys.argv[1]).write_text(figures.model_dump_json(), encoding="utf-8")
    return 0


def validate(job: LogitJob) -> LogitFigures:
    """Return what AWS's tool says of the job's checkpoint.

    Raises:
        BadInput: the image lacks the tool.
        OutOfCapacity: there is not enough memory.
        Refused: the model cannot be loaded or run, or the tool fails.
    """
    began = time.monotonic()
    try:
        # Before transformers: the plugin registers its classes first (AWS's own examples say so).
        from vllm import LLM, SamplingParams  # isort: skip
        from transformers import AutoConfig, AutoTokenizer
        from vllm_neuron.accuracy.goldens import get_cached_reference_goldens
        from vllm_neuron.accuracy.logit_validation import multi_prompt_logit_validation
    except ImportError as error:
        raise BadInput(
            f"This image has no logit validation of AWS: {error}.",
            hint="It comes with the vLLM Neuron plugin of SDK 2.32 and newer, lane neuron-native.",
        ) from error
    try:
        goldens = get_cached_reference_goldens(
            model_id=job.served_model_name,
            model_checkpoint=job.model_dir,
            model_config=AutoConfig.from_pretrained(job.model_dir, local_files_only=True),
            tokenizer=AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True),
            prompts=list(job.prompts),
            output_length=job.output_tokens,
        )
        # After the goldens: both at once would not find room.
        llm = LLM(**engine_arguments(job))
        sampling = SamplingParams(
            temperature=0, max_tokens=job.output_tokens, logprobs=-1, detokenize=False
        )
        vocabulary = int(goldens["fp32_logits"][0].shape[-1])
        found = multi_prompt_logit_validation(
            prompts_input_ids=[
                [[int(token) for token in ids] for ids in prompt] for prompt in goldens["input_ids"]
            ],
            generate_fn=logits_on_device(llm, sampling, vocabulary),
            prompts_expected_logits=goldens["dtype_logits"],
            prompts_baseline_logits=goldens["fp32_logits"],
        )
    except MemoryError as error:
        raise OutOfCapacity(
            "There is not enough memory for the goldens of the logit validation.",
            hint="Run it on a machine with more, or leave gates.accuracy.logit_validation out.",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise Refused(
            f"AWS's logit validation failed: {type(error).__name__}: {error}",
            hint="The log of the step has the details.",
        ) from error
    return LogitFigures(
        passed=bool(found.passed),
        prompts=tuple(bool(passed) for passed, _ in found.per_prompt_results),
        metrics=dict(single_values(found.aggregate_metrics)),
        made_with=dict(_versions()),
        seconds=round(time.monotonic() - began, 1),
    )


def engine_arguments(job: LogitJob) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` with which logits come back.

    One request at a time in one bucket, so that little has to be compiled.
    """
    return {
        "model": job.model_dir,
        "max_model_len": job.max_model_len,
        "max_num_batched_tokens": job.max_model_len,
        "max_num_seqs": 1,
        "tensor_parallel_size": job.tensor_parallel_size,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logits",
        "enable_prefix_caching": False,
        # Asynchronous scheduling with sampling on the device returns none.
        "async_scheduling": False,
        "additional_config": {
            "neuron_config": {
                "on_device_sampling_config": {},
                "kv_segment_size_buckets": [job.max_model_len],
                "num_batched_tokens_buckets": [job.max_model_len],
                "num_seqs_buckets": [1],
            }
        },
    }


def logits_on_device(
    llm: Any, sampling: Any, vocabulary: int
) -> Callable[[Sequence[Sequence[int]]], Any]:
    """Return what asks the device for logits: (tokens, prompts, vocabulary), in float32.

    Args:
        llm: an engine made with `engine_arguments`.
        sampling: greedy, with the log-probs of all tokens, which are logits in that mode.
        vocabulary: tokens that the goldens have logits for; one that the device does not return is
            minus infinity.
    """
    import torch

    def logits(prompts: Sequence[Sequence[int]]) -> Any:
        answers = llm.generate([{"prompt_token_ids": list(each)} for each in prompts], sampling)
        found = []
        for answer in answers:
            (completion,) = answer.outputs
            if not completion.logprobs:
                raise ValueError("the engine returned no logits")
            rows = torch.full((len(completion.logprobs), vocabulary), -math.inf)
            for row, values in zip(rows, completion.logprobs, strict=True):
                for token, value in values.items():
                    if token < vocabulary:
                        row[token] = value.logprob
            found.append(rows)
        return torch.stack(found, dim=1)

    return logits


def single_values(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float | bool | str]]:
    """Yield those aggregates that are one value each, numbers only if they are finite."""
    for name, value in sorted(metrics.items()):
        if isinstance(value, bool | str):
            yield name, value
            continue
        try:
            figure = float(value)
        except (TypeError, ValueError, RuntimeError):
            continue
        if math.isfinite(figure):
            yield name, figure


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    raise SystemExit(main())
