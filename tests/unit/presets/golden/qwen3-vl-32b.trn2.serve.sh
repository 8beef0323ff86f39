#!/bin/bash
# qwen3-vl-32b, target trn2: serve on trn2.48xlarge in public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04

export DO_NOT_TRACK=1  # vLLM, vllm/envs.py
export HF_HUB_OFFLINE=1  # Trainyard: a server loads its checkpoint and nothing else
export NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND=1  # AWS Neuron SDK 2.32, vllm-neuron/docs/design/compilation/cpu_compilation.md
export NEURON_LOGICAL_NC_CONFIG=2  # AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/feature-guide.rst
export NEURON_SKIP_EFA_AFFINITY=1  # AWS Neuron SDK 2.32, deploy/environments/quickstart-deploy-dlc.rst
export VLLM_CACHE_ROOT=/var/lib/trainyard/cache  # AWS Neuron SDK 2.32, vllm-neuron/docs/design/compilation/compilation_cache.md
export VLLM_ENGINE_READY_TIMEOUT_S=900  # vLLM, vllm/envs.py
export VLLM_LOGGING_COLOR=0  # vLLM, vllm/envs.py
export VLLM_LOG_STATS_INTERVAL=60  # vLLM, vllm/envs.py
export VLLM_NEURON_DISABLE_WARMUP_COMPILE=1  # AWS Neuron SDK 2.32, vllm-neuron/docs/design/compilation/compilation_cache.md
export VLLM_NEURON_KV_GMU_BUDGET_CAP_FRACTION=0.3  # AWS Neuron SDK 2.32, vllm-neuron/docs/design/vllm/determine_available_memory_design.md
export VLLM_NO_USAGE_STATS=1  # vLLM, vllm/envs.py

command=(
  /usr/local/bin/python3  # Trainyard: the serving interpreter of the image
  -P  # Trainyard: the working folder holds no modules
  -m  # vLLM, docs/cli/serve
  vllm.entrypoints.cli.main  # vLLM, docs/cli/serve
  serve  # vLLM, docs/cli/serve
  /var/lib/trainyard/model  # Trainyard: the restored checkpoint
  --served-model-name=qwen3-vl-32b  # vLLM, docs/cli/serve
  --host=127.0.0.1  # Trainyard: servers listen on loopback
  --port=8000  # vLLM, docs/cli/serve
  --dtype=bfloat16  # vLLM, docs/cli/serve
  --tensor-parallel-size=4  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --max-model-len=8192  # AWS Neuron SDK 2.32, vllm-neuron/docs/getting-started/quickstart-online-serving.md
  --max-num-batched-tokens=8192  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --max-num-seqs=4  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --no-enable-prefix-caching  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --disable-uvicorn-access-log  # vLLM, docs/cli/serve
  --block-size=32  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --gpu-memory-utilization=0.9  # AWS Neuron SDK 2.32, vllm-neuron/docs/design/vllm/determine_available_memory_design.md
  # neuron_config.num_batched_tokens_buckets: AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  # neuron_config.num_seqs_buckets: AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  # neuron_config.on_device_sampling_config: AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  # neuron_config.quantization: AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md; AWS Neuron SDK 2.32, vllm-neuron/docs/tutorials/tutorial-qwen3-vl-32b.md
  # vision_neuron_config.num_vision_tokens_buckets: AWS Neuron SDK 2.32, vllm-neuron/docs/tutorials/tutorial-qwen3-vl-32b.md
  # vision_neuron_config.vision_attention_block_size: AWS Neuron SDK 2.32, vllm-neuron/docs/tutorials/tutorial-qwen3-vl-32b.md
  '--additional-config={"neuron_config":{"num_batched_tokens_buckets":[8192],"num_seqs_buckets":[4],"on_device_sampling_config":{"all_greedy":true},"quantization":"bf16"},"vision_neuron_config":{"num_vision_tokens_buckets":[2048],"vision_attention_block_size":2048}}'  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md; AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst
)
exec "${command[@]}"
