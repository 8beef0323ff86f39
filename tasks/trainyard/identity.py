"""Which setting changes which identity: the table that the documentation and `explain` show.

A *compile key* stands for compiled code, a *release id* for what is served (weights, code and
serving settings). Whatever changes the compile key changes the release id as well. The table is not
what computes them, the lanes are; a test walks every field of a target and of each toolchain and
compares the two.

    python -m trainyard.identity

prints the table as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Effect = Literal["compile key", "release id", "neither", "refused"]
"""`refused`: the lane does not have the setting and says so."""

LANES = ("cpu", "neuron-native", "neuron-nxdi")

_EFFECTS: dict[str, Effect] = {
    "K": "compile key", "R": "release id", "n": "neither", "-": "refused",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One thing that somebody can change."""

    path: str
    """Where it is: a key of a target, or another input by name."""
    effects: tuple[Effect, Effect, Effect]
    """What it changes on each lane, in the order of `LANES`."""
    why: str
    """Half a sentence."""

    def effect(self, lane: str) -> Effect:
        """Return what it changes on a lane."""
        return self.effects[LANES.index(lane)]


def _rows(table: tuple[tuple[str, str, str], ...], prefix: str = "") -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{prefix}{path}",
            (_EFFECTS[codes[0]], _EFFECTS[codes[1]], _EFFECTS[codes[2]]),
            why,
        )
        for path, codes, why in table
    )


_BUCKETS = "each bucket is a graph of its own"
_PARALLEL = "how the graph is cut over the cores"
_SAMPLING = "sampling on the device is part of the graph"
_KERNEL = "which kernels the graph is made of"
_FORMAT = "number format inside the graph"
_KV = "the KV cache's shape is compiled in"

TARGET: tuple[Row, ...] = (
    *_rows(
        (
            ("name", "nnn", "a name"),
            ("lane", "KKK", "another compiler"),
            ("instance", "-RR", "a size of the same kind of chip runs the same code, and is "
             "measured by itself"),
            ("required", "nnn", "what happens when the target fails"),
            ("tensor_parallel_size", "-KK", _PARALLEL),
            ("dtype", "KKK", _FORMAT),
            ("max_model_len", "RKK", "on a CPU shapes are symbolic, on Neuron fixed"),
            ("max_num_batched_tokens", "RKK", "on a CPU shapes are symbolic, on Neuron fixed"),
            ("max_num_seqs", "RKK", "on a CPU shapes are symbolic, on Neuron fixed"),
            ("block_size", "RKK", _KV),
            ("kv_cache_gib", "R--", "size of the KV cache of lane cpu"),
            ("enable_prefix_caching", "RKK", "on Neuron the attention is compiled for it"),
        )
    ),
    *_rows(
        (
            ("sdk", "-KK", "another compiler"),
            ("image", "-RR", "recorded; the packages in it are in the key, and a new image is "
             "measured again"),
            ("lnc", "-KK", "physical cores of one logical core"),
            ("data_parallel_size", "-K-", _PARALLEL),
            ("num_gpu_blocks", "-KK", _KV),
            ("speculation.method", "-KK", "the draft is compiled too"),
            ("speculation.num_speculative_tokens", "-KK", "tokens that are checked at once"),
            ("hf_overrides", "-KK", "changes the model's configuration"),
            ("compiler_flags", "-KK", "what the compiler is told"),
            ("compile_on", "-K-", "code made without a device is proven by itself"),
            ("parallel_compile_workers", "-nn", "how much memory compiling takes"),
        ),
        "neuron.",
    ),
    *_rows(
        (
            ("route", "-K-", "another lowering"),
            ("optimization_level", "-K-", "what the compiler is told"),
            ("kv_cache_dtype", "-K-", _FORMAT),
            ("gpu_memory_utilization", "-K-", _KV),
            ("kv_budget_cap_fraction", "-K-", _KV),
            ("enable_expert_parallel", "-K-", _PARALLEL),
            ("enable_prompt_embeds", "-K-", "another input of the graph"),
            ("async_scheduling", "-R-", "when steps are planned, not what they compute"),
            ("neuron_config.num_batched_tokens_buckets", "-K-", _BUCKETS),
            ("neuron_config.num_seqs_buckets", "-K-", _BUCKETS),
            ("neuron_config.kv_segment_size_buckets", "-K-", _BUCKETS),
            ("neuron_config.decode_context_length_buckets", "-K-", _BUCKETS),
            ("neuron_config.on_device_sampling_config.all_greedy", "-K-", _SAMPLING),
            ("neuron_config.on_device_sampling_config.temperature", "-K-", _SAMPLING),
            ("neuron_config.on_device_sampling_config.top_k", "-K-", _SAMPLING),
            ("neuron_config.on_device_sampling_config.top_p", "-K-", _SAMPLING),
            ("neuron_config.quantization", "-K-", _FORMAT),
            ("neuron_config.ep_degree", "-K-", _PARALLEL),
            ("neuron_config.fp8_packed_kv", "-K-", _FORMAT),
            ("vision_neuron_config.num_vision_tokens_buckets", "-K-", _BUCKETS),
            ("vision_neuron_config.vision_attention_block_size", "-K-", _BUCKETS),
            ("vision_neuron_config.max_vision_seq_len", "-K-", _BUCKETS),
            ("vision_neuron_config.tp_size", "-K-", _PARALLEL),
            ("vision_neuron_config.dp_size", "-K-", _PARALLEL),
            ("vision_neuron_config.encoder_cache_num_blocks", "-K-", _KV),
            ("vision_neuron_config.encoder_cache_min_hold_time_ms", "-K-",
             "goes with the encoder's settings"),
            ("mm_language_model_only", "-K-", "which parts of the model are compiled"),
            ("extra_neuron_config", "-K-", "unknown keys may change anything"),
        ),
        "native.",
    ),
    *_rows(
        (
            ("enable_bucketing", "--K", _BUCKETS),
            ("context_encoding_buckets", "--K", _BUCKETS),
            ("token_generation_buckets", "--K", _BUCKETS),
            ("prefix_buckets", "--K", _BUCKETS),
            ("is_continuous_batching", "--K", "another shape of a step"),
            ("ctx_batch_size", "--K", "another shape of a step"),
            ("tkg_batch_size", "--K", "another shape of a step"),
            ("kv_cache_batch_size", "--K", _KV),
            ("is_prefix_caching", "--K", _KV),
            ("is_block_kv_layout", "--K", _KV),
            ("pa_num_blocks", "--K", _KV),
            ("pa_block_size", "--K", _KV),
            ("async_mode", "--K", "another graph of a step"),
            ("skip_warmup", "--K", "is in the compiled folder's own configuration"),
            ("save_sharded_checkpoint", "---", "a bundle holds no weights"),
            ("on_device_sampling_config.do_sample", "--K", _SAMPLING),
            ("on_device_sampling_config.top_k", "--K", _SAMPLING),
            ("on_device_sampling_config.top_p", "--K", _SAMPLING),
            ("on_device_sampling_config.temperature", "--K", _SAMPLING),
            ("on_device_sampling_config.dynamic", "--K", _SAMPLING),
            ("on_device_sampling_config.deterministic", "--K", _SAMPLING),
            ("on_device_sampling_config.global_topk", "--K", _SAMPLING),
            ("fused_qkv", "--K", _KERNEL),
            ("sequence_parallel_enabled", "--K", _PARALLEL),
            ("flash_decoding_enabled", "--K", _PARALLEL),
            ("attn_kernel_enabled", "--K", _KERNEL),
            ("qkv_kernel_enabled", "--K", _KERNEL),
            ("mlp_kernel_enabled", "--K", _KERNEL),
            ("cast_type", "--K", _FORMAT),
            ("quantized", "--K", _FORMAT),
            ("quantization_type", "--K", _FORMAT),
            ("quantization_dtype", "--K", _FORMAT),
            ("kv_cache_quant", "--K", _FORMAT),
            ("modules_to_not_convert", "--K", _FORMAT),
            ("speculation_length", "--K", "tokens that are checked at once"),
            ("enable_fused_speculation", "--K", "the draft is compiled too"),
            ("enable_eagle_speculation", "--K", "the draft is compiled too"),
            ("is_eagle3", "--K", "the draft is compiled too"),
            ("cp_degree", "--K", _PARALLEL),
            ("attention_dp_degree", "--K", _PARALLEL),
            ("pp_degree", "--K", _PARALLEL),
            ("ep_degree", "--K", _PARALLEL),
            ("moe_tp_degree", "--K", _PARALLEL),
            ("moe_ep_degree", "--K", _PARALLEL),
            ("cc_pipeline_tiling_factor", "--K", _PARALLEL),
            ("scratchpad_page_size", "--K", "memory that the code lays out"),
        ),
        "nxdi.override_neuron_config.",
    ),
    *_rows((("extra_neuron_config", "--K", "unknown keys may change anything"),), "nxdi."),
)  # fmt: skip
"""Every key of a target."""

TOOLCHAIN: tuple[Row, ...] = _rows(
    (
        ("machine", "KKK", "processor of the host, whose code calls the compiled code"),
        ("python", "KKK", "traces hold Python's own code"),
        ("torch", "KKK", "traces the model"),
        ("vllm", "KKK", "the model's code"),
        ("c++", "K--", "the compiler of lane cpu"),
        ("processor", "K--", "what that compiler may use of this processor"),
        ("site-packages", "K--", "the folder of PyTorch's headers, by which kernels are found"),
        ("neuronx-cc", "-KK", "the compiler"),
        ("vllm-neuron", "-KK", "the plugin: the model's code"),
        ("torch-neuronx", "-KK", "lowers the graph"),
        ("libtorch-neuronx-lite", "-KK", "lowers the graph"),
        ("libneuronxla", "-KK", "lowers the graph"),
        ("torch-xla", "-KK", "lowers the graph"),
        ("nki", "-KK", "kernels"),
        ("neuronx-distributed", "--K", "layers that are cut over the cores"),
        ("neuronx-distributed-inference", "--K", "the model's code"),
        ("transformers", "-KK", "reads the model's configuration"),
    ),
    "toolchain.",
)
"""What the serving interpreter is asked for; `refused` here: the lane does not ask for it."""

OTHERS: tuple[Row, ...] = _rows(
    (
        ("architecture", "KKK", "config.json without names, and name, dtype and shape of every "
         "tensor"),
        ("kind of chip", "-KK", "inf2, trn1, trn2, trn3: the compiler's platform target"),
        ("architecture of the draft", "-KK", "speculative decoding compiles the draft too"),
        ("weights", "RRR", "no weights are compiled in: path, size and sha256 of every file"),
        ("served_model_name", "RRR", "what clients ask for"),
        ("model", "RRR", "a release id begins with it"),
        ("owner", "nnn", "a name"),
        ("description", "nnn", "words"),
        ("source", "nnn", "where the files came from; what counts is what they are"),
        ("prompts", "nnn", "for warming up"),
        ("gates", "nnn", "what is demanded; other tests are another measurement"),
        ("rollout", "nnn", "how a release gets its traffic"),
        ("refresh", "nnn", "when to look for new weights"),
        ("image of unknown packages", "-KK", "stands for its packages where nobody recorded them "
         "(`trainyard toolchain`)"),
        ("driver of the host", "nnn", "recorded with the measurement"),
        ("digest of the image", "nnn", "recorded; its packages are in the key"),
    )
)  # fmt: skip
"""What is no key of a target: the model itself, and the rest of the spec."""


def meaning(path: str) -> str:
    """Return why a field of the key inputs or serving settings matters; empty if unknown.

    Args:
        path: dotted, as in the key inputs: it may begin later than the row's. What has no row of
            its own goes by the rows below it, or by what it belongs to.
    """
    while path:
        for row in (*TARGET, *TOOLCHAIN):
            if f".{row.path}".endswith(f".{path}"):
                return row.why
        if path in _DERIVED:
            return _DERIVED[path]
        for row in TARGET:
            if f".{path}." in f".{row.path}":
                return row.why
        path = path.rpartition(".")[0]
    return ""


_DERIVED = {
    "architecture_digest": "the model's configuration or its tensors",
    "speculation.draft_architecture_digest": "speculative decoding compiles the draft too",
    "platform_target": "the kind of chip",
    "toolchain.image": "stands for its packages, which nobody recorded",
    "switches": "what TorchInductor is told",
    "override_neuron_config.logical_nc_config": "physical cores of one logical core",
    "served_model_name": "what clients ask for",
    "checkpoint_digest": "no weights are compiled in",
}


def markdown() -> str:
    """Return the tables as Markdown, as `docs/identity.md` has them."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    for title, rows in (
        ("Keys of a target", TARGET),
        ("The toolchain", TOOLCHAIN),
        ("The model and the rest of the spec", OTHERS),
    ):
        yield f"### {title}"
        yield ""
        yield f"| changed | {' | '.join(f'`{lane}`' for lane in LANES)} | why |"
        yield f"|---|{'---|' * len(LANES)}---|"
        for row in rows:
            cells = " | ".join("not there" if each == "refused" else each for each in row.effects)
            name = f"`{row.path}`" if rows is not OTHERS else row.path
            yield f"| {name} | {cells} | {row.why} |"
        yield ""


if __name__ == "__main__":
    print(markdown())
