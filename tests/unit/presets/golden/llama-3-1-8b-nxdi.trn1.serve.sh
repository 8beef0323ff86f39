#!/bin/bash
# llama-3-1-8b-nxdi, target trn1: serve on trn1.32xlarge in public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:0.13.0-neuronx-py312-sdk2.28.0-ubuntu24.04

export DO_NOT_TRACK=1  # vLLM, vllm/envs.py
export HF_HUB_OFFLINE=1  # Trainyard: a server loads its checkpoint and nothing else
export NEURON_COMPILED_ARTIFACTS=/var/lib/trainyard/cache  # AWS Neuron SDK 2.32, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst
export NEURON_LOGICAL_NC_CONFIG=1  # AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/feature-guide.rst
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
  --served-model-name=llama-3-1-8b-nxdi  # vLLM, docs/cli/serve
  --host=127.0.0.1  # Trainyard: servers listen on loopback
  --port=8000  # vLLM, docs/cli/serve
  --dtype=bfloat16  # vLLM, docs/cli/serve
  --tensor-parallel-size=32  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --max-model-len=1024  # AWS Neuron SDK 2.32, vllm-neuron/docs/getting-started/quickstart-online-serving.md
  --max-num-batched-tokens=1024  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --max-num-seqs=1  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md
  --num-gpu-blocks-override=1  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md (Sizing the KV cache); AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst
  --no-enable-prefix-caching  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/features-guide.md
  --disable-uvicorn-access-log  # vLLM, docs/cli/serve
  # override_neuron_config.context_encoding_buckets: NxD Inference 0.10, models/config.py
  # override_neuron_config.ctx_batch_size: NxD Inference 0.10, models/config.py
  # override_neuron_config.enable_bucketing: NxD Inference 0.10, models/config.py
  # override_neuron_config.is_continuous_batching: NxD Inference 0.10, models/config.py
  # override_neuron_config.logical_nc_config: NxD Inference 0.10, models/config.py
  # override_neuron_config.tkg_batch_size: NxD Inference 0.10, models/config.py
  # override_neuron_config.token_generation_buckets: NxD Inference 0.10, models/config.py
  '--additional-config={"override_neuron_config":{"context_encoding_buckets":[256,512,1024],"ctx_batch_size":1,"enable_bucketing":true,"is_continuous_batching":true,"logical_nc_config":1,"tkg_batch_size":1,"token_generation_buckets":[32,64,128,256,512,768,1024]}}'  # AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md; AWS Neuron SDK 2.32, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst
)
exec "${command[@]}"
