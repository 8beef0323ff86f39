#!/bin/bash
# qwen3-235b-a22b-nxdi, target trn2: serve on trn2.48xlarge in public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:0.13.0-neuronx-py312-sdk2.27.1-ubuntu24.04

export DO_NOT_TRACK=1  # vLLM, vllm/envs.py
export HF_HUB_OFFLINE=1  # Trainyard: a server loads its checkpoint and nothing else
export NEURON_COMPILED_ARTIFACTS=/var/lib/trainyard/cache  # AWS Neuron SDK 2.32, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst
export NEURON_LOGICAL_NC_CONFIG=2  # AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/feature-guide.rst
export NEURON_SKIP_EFA_AFFINITY=1  # AWS Neuron SDK 2.32, deploy/environments/quickstart-deploy-dlc.rst
export VLLM_ENGINE_READY_TIMEOUT_S=900  # vLLM, vllm/envs.py
export VLLM_LOGGING_COLOR=0  # vLLM, vllm/envs.py
export VLLM_LOG_STATS_INTERVAL=60  # vLLM, vllm/envs.py
export VLLM_NO_USAGE_STATS=1  # vLLM, vllm/envs.py

command=(
  /usr/local/bin/python3  # Trainyard: the serving interpreter of the image
  -P  # Trainyard: the working folder holds no modules
  -m  # vLLM, docs/cli/serve
  trainyard.lanes.without_compiler  # Trainyard: the plugin has no switch that forbids compiling, so it finds no compiler
  serve  # vLLM, docs/cli/serve
  /var/lib/trainyard/model  # Trainyard: the restored checkpoint
  --served-model-name=qwen3-235b-a22b-nxdi  # vLLM, docs/cli/serve
  --host=127.0.0.1  # Trainyard: servers listen on loopback
  --port=8000  # vLLM, docs/cli/serve
  --dtype=float16  # vLLM, docs/cli/serve
  --tensor-parallel-size=64  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --max-model-len=16384  # AWS Neuron SDK 2.32, vllm-neuron/docs/getting-started/quickstart-online-serving.md
  --max-num-batched-tokens=16384  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --max-num-seqs=16  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --num-gpu-blocks-override=16  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md (Sizing the KV cache); AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst
  --no-enable-prefix-caching  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --disable-uvicorn-access-log  # vLLM, docs/cli/serve
  # override_neuron_config.async_mode: NxD Inference 0.10, models/config.py
  # override_neuron_config.attention_dp_degree: NxD Inference 0.10, models/config.py
  # override_neuron_config.attn_kernel_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.blockwise_matmul_config: NxD Inference 0.10, models/config.py
  # override_neuron_config.cc_pipeline_tiling_factor: NxD Inference 0.10, models/config.py
  # override_neuron_config.context_encoding_buckets: NxD Inference 0.10, models/config.py
  # override_neuron_config.cp_degree: NxD Inference 0.10, models/config.py
  # override_neuron_config.ctx_batch_size: NxD Inference 0.10, models/config.py
  # override_neuron_config.enable_bucketing: NxD Inference 0.10, models/config.py
  # override_neuron_config.flash_decoding_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.fused_qkv: NxD Inference 0.10, models/config.py
  # override_neuron_config.is_continuous_batching: NxD Inference 0.10, models/config.py
  # override_neuron_config.logical_nc_config: NxD Inference 0.10, models/config.py
  # override_neuron_config.mode_mask_padded_tokens: NxD Inference 0.10, models/config.py
  # override_neuron_config.moe_ep_degree: NxD Inference 0.10, models/config.py
  # override_neuron_config.moe_tp_degree: NxD Inference 0.10, models/config.py
  # override_neuron_config.on_device_sampling_config: NxD Inference 0.10, models/config.py
  # override_neuron_config.qkv_cte_nki_kernel_fuse_rope: NxD Inference 0.10, models/config.py
  # override_neuron_config.qkv_kernel_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.qkv_nki_kernel_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.scratch_pad_size: NxD Inference 0.10, models/config.py
  # override_neuron_config.sequence_parallel_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.strided_context_parallel_kernel_enabled: NxD Inference 0.10, models/config.py
  # override_neuron_config.token_generation_buckets: NxD Inference 0.10, models/config.py
  # override_neuron_config.use_index_calc_kernel: NxD Inference 0.10, models/config.py
  '--additional-config={"override_neuron_config":{"async_mode":true,"attention_dp_degree":8,"attn_kernel_enabled":true,"blockwise_matmul_config":{"skip_dma_token":true,"use_shard_on_intermediate_dynamic_while":true},"cc_pipeline_tiling_factor":2,"context_encoding_buckets":[10240,16384],"cp_degree":16,"ctx_batch_size":1,"enable_bucketing":true,"flash_decoding_enabled":false,"fused_qkv":true,"is_continuous_batching":true,"logical_nc_config":2,"mode_mask_padded_tokens":true,"moe_ep_degree":32,"moe_tp_degree":2,"on_device_sampling_config":{"do_sample":true,"temperature":0.6,"top_k":20,"top_p":0.95},"qkv_cte_nki_kernel_fuse_rope":true,"qkv_kernel_enabled":true,"qkv_nki_kernel_enabled":true,"scratch_pad_size":1024,"sequence_parallel_enabled":true,"strided_context_parallel_kernel_enabled":true,"token_generation_buckets":[10240,16384],"use_index_calc_kernel":true}}'  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md; AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst
)
exec "${command[@]}"
