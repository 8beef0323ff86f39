"""The parts of a target that only the Neuron lanes have.

`NeuronSettings` is for both lanes. `NativeSettings` and `NxdiSettings` mirror what the plugin of
each lane takes in vLLM's `--additional-config`: the plugins ignore keys that they do not know (one
with a warning, one without), so the keys are spelled out here and others are refused. A key that is
newer than this list goes into `extra_neuron_config`.

Sources: AWS Neuron SDK 2.32, `vllm-neuron/docs/guides/reference-configuration.md` (2026-08-13) and
`features-guide.md`; NxD Inference 0.10, `models/config.py` (2026-07-28).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from trainyard.spec.part import SpecPart

SDK_PATTERN = r"^[0-9]+\.[0-9]+\.[0-9]+$"
IMAGE_PATTERN = r"^([a-z0-9][A-Za-z0-9._:/@-]{0,499})?$"
FLAG_PATTERN = r"^-{1,2}[A-Za-z0-9][^\s]*$"

Bucket = Annotated[int, Field(ge=1)]
Buckets = tuple[Bucket, ...]
CompilerFlag = Annotated[str, StringConstraints(pattern=FLAG_PATTERN)]


class Speculation(SpecPart):
    """Speculative decoding: a small model proposes tokens, the model checks them."""

    method: Literal["eagle3", "eagle", "draft_model"] = "eagle3"
    """How tokens are proposed. Lane `neuron-native` knows `eagle3` only."""
    num_speculative_tokens: int = Field(ge=1, le=32)
    """Tokens that the draft proposes in each step."""


class NeuronSettings(SpecPart):
    """What both Neuron lanes need to know."""

    sdk: str = Field(pattern=SDK_PATTERN)
    """AWS Neuron SDK of the serving image, such as `2.32.0`."""
    image: str = Field(default="", pattern=IMAGE_PATTERN)
    """Container image that compiles and serves. Recorded with the release; a bundle outlives it."""
    lnc: Literal[1, 2] | None = None
    """Physical cores of one logical core. Empty: the instance's default."""
    data_parallel_size: int = Field(default=1, ge=1, le=64)
    """Copies of the model inside one server, each with its own cores."""
    num_gpu_blocks: int | None = Field(default=None, ge=1)
    """Blocks of the KV cache. Compiled into the code, so a number of its own makes starts
    repeatable."""
    speculation: Speculation | None = None
    """Speculative decoding; empty: none."""
    hf_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the model's config.json that vLLM replaces (`--hf-overrides`)."""
    compiler_flags: tuple[CompilerFlag, ...] = ()
    """Flags for neuronx-cc (`NEURON_CC_FLAGS`). They replace those of the framework."""
    compile_on: Literal["device", "cpu"] = "device"
    """`device`: the bundle is compiled where it will run. `cpu`: on a machine without a device."""
    parallel_compile_workers: int | None = Field(default=None, ge=1, le=64)
    """Compiler processes at a time; fewer need less memory. Empty: the framework's number."""


class OnDeviceSampling(SpecPart):
    """`on_device_sampling_config` of the native plugin."""

    all_greedy: bool | None = None
    """Compile for the most likely token only."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature that the code is compiled for."""
    top_k: int | None = Field(default=None, ge=-1)
    """Choose among so many tokens; -1 is the device's most (256)."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Choose among the tokens that make up this share."""


class NativeConfig(SpecPart):
    """`neuron_config` of the native plugin."""

    num_batched_tokens_buckets: Buckets | None = None
    """Token counts that prefill is compiled for; the largest is `max_num_batched_tokens`.
    Empty: powers of 2 from 128."""
    num_seqs_buckets: Buckets | None = None
    """Batch sizes that decoding is compiled for; the largest is `max_num_seqs`.
    Empty: powers of 2 from 1."""
    kv_segment_size_buckets: Buckets | None = None
    """Segment size of segmented prefill; the same as `num_batched_tokens_buckets`."""
    decode_context_length_buckets: Buckets | None = None
    """Context lengths below `max_model_len` that decoding is compiled for as well."""
    on_device_sampling_config: OnDeviceSampling | None = None
    """Sampling on the device; empty: on the CPU."""
    quantization: Literal["bf16", "mxfp4", "mxfp8"] | None = None
    """Number format of weights that the plugin makes; `bf16` leaves them as they are. FP8 comes
    with the checkpoint instead."""
    ep_degree: int | None = Field(default=None, ge=1)
    """Ranks that share the experts; needs `enable_expert_parallel`."""
    fp8_packed_kv: bool | None = None
    """Pack pairs of FP8 values in the KV cache."""


class VisionConfig(SpecPart):
    """`vision_neuron_config` of the native plugin."""

    num_vision_tokens_buckets: Buckets | None = None
    """Numbers of image patches that the encoder is compiled for."""
    vision_attention_block_size: int | None = Field(default=None, ge=1)
    """Block size of the encoder's attention; holds the largest single image."""
    max_vision_seq_len: int | None = Field(default=None, ge=1)
    """Largest bucket that the plugin makes by itself."""
    tp_size: int | None = Field(default=None, ge=1)
    """Tensor parallel degree of the encoder."""
    dp_size: int | None = Field(default=None, ge=1)
    """Data parallel degree of the encoder."""
    encoder_cache_num_blocks: int | None = Field(default=None, ge=1)
    """Blocks of the encoder's cache, at least."""
    encoder_cache_min_hold_time_ms: float | None = Field(default=None, ge=0)
    """Milliseconds that a written block stays in the encoder's cache."""


class NativeSettings(SpecPart):
    """What lane `neuron-native` passes to vLLM and its plugin."""

    route: Literal["native", "xla"] | None = None
    """How graphs are lowered. Empty: `native` from SDK 2.33 on, `xla` before."""
    optimization_level: Literal[0, 1, 2, 3] | None = None
    """vLLM's `--optimization-level`; empty: vLLM's default."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Number format of the KV cache. `fp8` needs scales in the checkpoint."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the device's memory that the server may use."""
    kv_budget_cap_fraction: float = Field(default=0.3, gt=0, le=1)
    """Share of that which the KV cache may take."""
    enable_expert_parallel: bool = False
    """Distribute the experts of a mixture-of-experts model."""
    enable_prompt_embeds: bool = False
    """Take prompts as embeddings too."""
    async_scheduling: bool | None = None
    """Plan the next step while the device computes; needs sampling on the device. Empty: vLLM's
    own choice."""
    neuron_config: NativeConfig = NativeConfig()
    """Keys of `neuron_config`."""
    vision_neuron_config: VisionConfig | None = None
    """Keys of `vision_neuron_config`, for models that see."""
    mm_language_model_only: bool = False
    """Leave the vision part of a model out."""
    extra_neuron_config: dict[str, Any] = Field(default_factory=dict)
    """More keys of `neuron_config`, newer than Trainyard. In the compile key, and warned about."""


class NxdiSampling(SpecPart):
    """`on_device_sampling_config` of NxD Inference."""

    do_sample: bool | None = None
    """Sample instead of taking the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """Choose among so many tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Choose among the tokens that make up this share."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature."""
    dynamic: bool | None = None
    """Take the parameters from each request."""
    deterministic: bool | None = None
    """The same random numbers for each request."""
    global_topk: int | None = Field(default=None, ge=1)
    """Tokens that remain before top-k and top-p of a request."""


class NxdiConfig(SpecPart):
    """`override_neuron_config` of the NxD Inference plugin."""

    enable_bucketing: bool | None = None
    """Compile for several lengths."""
    context_encoding_buckets: Buckets | None = None
    """Prompt lengths that are compiled for, up to `max_model_len`."""
    token_generation_buckets: Buckets | None = None
    """Context lengths that decoding is compiled for, up to `max_model_len`."""
    prefix_buckets: Buckets | None = None
    """Lengths of cached prefixes that are compiled for."""
    is_continuous_batching: bool | None = None
    """Let requests join a running batch."""
    ctx_batch_size: int | None = Field(default=None, ge=1)
    """Prompts in one prefill."""
    tkg_batch_size: int | None = Field(default=None, ge=1)
    """Requests in one decoding step."""
    kv_cache_batch_size: int | None = Field(default=None, ge=1)
    """Requests that the KV cache has room for."""
    is_prefix_caching: bool | None = None
    """Compile for prefix caching; set with `enable_prefix_caching`."""
    is_block_kv_layout: bool | None = None
    """Keep the KV cache in blocks."""
    pa_num_blocks: int | None = Field(default=None, ge=1)
    """Blocks of the KV cache; the same as `num_gpu_blocks`."""
    pa_block_size: int | None = Field(default=None, ge=1)
    """Tokens in one block; the same as `block_size`."""
    async_mode: bool | None = None
    """Prepare the next step while the device computes."""
    skip_warmup: bool | None = None
    """Do not run the compiled code once at the start."""
    save_sharded_checkpoint: bool | None = None
    """Write weights beside the code. Refused: a bundle holds no weights."""
    on_device_sampling_config: NxdiSampling | None = None
    """Sampling on the device; empty: on the CPU."""
    fused_qkv: bool | None = None
    """One matrix for queries, keys and values."""
    sequence_parallel_enabled: bool | None = None
    """Split long prompts over the cores."""
    flash_decoding_enabled: bool | None = None
    """Split the KV cache of long contexts over the cores."""
    attn_kernel_enabled: bool | None = None
    """Use the attention kernel for prefill."""
    qkv_kernel_enabled: bool | None = None
    """Use the kernel for queries, keys and values."""
    mlp_kernel_enabled: bool | None = None
    """Use the kernel for the feed-forward layers."""
    cast_type: Literal["config", "as-declared"] | None = None
    """Number format of weights: the target's, or the checkpoint's own."""
    quantized: bool | None = None
    """The checkpoint is quantized for NxD Inference."""
    quantization_type: Literal["per_tensor_symmetric", "per_channel_symmetric"] | None = None
    """How scales are laid out."""
    quantization_dtype: Literal["int8", "f8e4m3"] | None = None
    """Number format of quantized weights."""
    kv_cache_quant: bool | None = None
    """Keep the KV cache in FP8."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Modules that stay as they are when the rest is quantized."""
    speculation_length: int | None = Field(default=None, ge=1)
    """Tokens of one speculative step."""
    enable_fused_speculation: bool | None = None
    """Compile draft and model into one graph."""
    enable_eagle_speculation: bool | None = None
    """The draft is an EAGLE head."""
    is_eagle3: bool | None = None
    """The draft is an EAGLE3 head."""
    cp_degree: int | None = Field(default=None, ge=1)
    """Context parallel degree."""
    attention_dp_degree: int | None = Field(default=None, ge=1)
    """Data parallel degree of the attention."""
    pp_degree: int | None = Field(default=None, ge=1)
    """Pipeline parallel degree."""
    ep_degree: int | None = Field(default=None, ge=1)
    """Expert parallel degree."""
    moe_tp_degree: int | None = Field(default=None, ge=1)
    """Tensor parallel degree of the experts."""
    moe_ep_degree: int | None = Field(default=None, ge=1)
    """Expert parallel degree of the experts."""
    cc_pipeline_tiling_factor: int | None = Field(default=None, ge=1)
    """Pieces in which collectives overlap with computing."""
    scratchpad_page_size: int | None = Field(default=None, ge=1)
    """Page size of the runtime's scratchpad, in MiB."""


class NxdiSettings(SpecPart):
    """What lane `neuron-nxdi` passes to vLLM and its plugin."""

    override_neuron_config: NxdiConfig = NxdiConfig()
    """Keys of `override_neuron_config`."""
    extra_neuron_config: dict[str, Any] = Field(default_factory=dict)
    """More keys of `override_neuron_config`, newer than Trainyard. In the compile key, and warned
    about."""
