"""Logs and pods as they look in each known failure, written after the documented formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOGS: Mapping[str, str] = {
    "F137": (
        "2026-11-24T09:12:31Z INFO 6021 [root]: Command line: neuronx-cc compile graph.hlo "
        "--framework XLA --target trn2\n"
        "2026-11-24T09:40:02Z [F137] neuronx-cc was forcibly killed - This most commonly occurs "
        "due to insufficient system memory. Using a smaller data type, dimensions, batch size, or "
        "a larger instance type may help.\n"
        "RuntimeError: neuronx-cc compilation failed with 70. Check compiler logs.\n"
    ),
    "NCC_EVRF059": (
        "[ERROR] [NCC_EVRF059] Kernel file '/var/tmp/nki-intermediate-cache/71adab98b5b4ec7f/k' "
        "referenced by AwsNeuronCustomNativeKernel instruction does not exist on the host.\n"
    ),
    "NCC_EVRF065": (
        "[ERROR] [NCC_EVRF065] NKI kernel 'attention_cte' was traced with an unsupported NKI "
        "version.\n"
    ),
    "NCC_EVRF009": (
        "[ERROR] [NCC_EVRF009] The combined memory needed for the model's activation tensors "
        "exceeds the high-bandwidth memory limit.\n"
    ),
    "NCC_EARG001": ("[ERROR] [NCC_EARG001] Unsupported Logical Neuron Core (LNC) configuration.\n"),
    "NCC_EVRF007": (
        "[ERROR] [NCC_EVRF007] The number of instructions generated exceeds the limit.\n"
    ),
    "NCC_EVRF056": (
        "[ERROR] [NCC_EVRF056] Operation gather encountered out of bound indices. Operation iota "
        "produces index values in range [0, 8192), while the operand dimension only allows indices "
        "in [0, 4096).\n"
    ),
    "NCC_EBIR023": (
        "[ERROR] [NCC_EBIR023] MLP kernel intermediate size exceeds the maximum supported value of "
        "4096.\n"
    ),
    "NCC_EUOC002": "[ERROR] [NCC_EUOC002] An unsupported operator was used.\n",
    "NCC_ESPP047": (
        "[ERROR] [NCC_ESPP047] The compiler found usage of an unsupported 8-bit floating-point "
        "data type.\n"
    ),
    "NCC_EVRF036": (
        "[ERROR] [NCC_EVRF036] QuantizeMX custom call has invalid backend_config JSON.\n"
    ),
    "NCC_EVRF064": (
        "[ERROR] [NCC_EVRF064] HLO verification failed since the input HLO graph contains an "
        "illegal instruction that violates XLA shape constraints.\n"
    ),
    "NCC_E": "[ERROR] [NCC_EZZZ999] A code that came after this table.\n",
    "NCC_I": (
        "[INTERNAL_ERROR] [NCC_INLA001] Unhandled exception with message: === BIR verification "
        "failed ===\n"
    ),
    "F134": (
        "[F134] neuronx-cc terminated abnormally - Please open a support ticket at "
        "https://github.com/aws-neuron/aws-neuron-sdk/issues/new\n"
    ),
    "compiler-exit-70": (
        "(Worker_TP3 pid=811) ERROR RuntimeError: neuronx-cc compilation failed with 70. Check "
        "compiler logs.\n"
    ),
    "cache-miss": (
        "RuntimeError: VLLM_NEURON_DISABLE_WARMUP_COMPILE: local compile cache miss for key "
        "0f3c1b. All graphs must be pre-compiled when warmup compilation is disabled.\n"
    ),
    "driver-missing": (
        "2026-Nov-24 18:38:27.0917 13713:13713 ERROR   NRT:nrt_init      Unable to determine "
        "Neuron Driver version. Please check aws-neuron-dkms package is installed.\n"
    ),
    "driver-too-old": (
        "2026-Nov-24 19:18:21.0661 24616:24616 ERROR   NRT:nrt_init      This runtime requires "
        "Neuron Driver version 2.27 or greater. Please upgrade aws-neuron-dkms package.\n"
    ),
    "neff-other-chip": (
        "ERROR  NMGR:kmgr_load_nn  NEFF was compiled for an older architecture; set "
        "NEURON_RT_ALLOW_LEGACY_NEFF=1 to run it.\n"
    ),
    "neff-too-new": (
        "2026-Nov-24 10:01:12.000001 901:901 ERROR  NEFF:neff_parse  NEFF version: 2.0, features: "
        "0x100 are not supported. Currently supporting: 0x1f\n"
    ),
    "device-fault": (
        "2026-Nov-24 11:20:01.100000 77:90 ERROR  NRT:nrt_infodump  Failure: "
        "NRT_EXEC_HW_ERR_HBM_UE in nrt_execute()\n"
    ),
    "device-hang": (
        "2026-Nov-24 11:20:01.100000 77:90 ERROR  TDRV:exec_consume_infer_status_notifications  "
        "(FATAL-RT-UNDEFINED-STATE) execution timeout (30000 ms) on Neuron Device 0 NC 0, model "
        "graph.neff, waiting for execution completion notification\n"
    ),
    "device-out-of-memory": (
        "2026-Nov-24 20:58:33.897479 224822:224822 ERROR  TDRV:log_dev_mem   Failed to allocate "
        "4.000GB (alignment: none, usage: tensors) on ND 0:NC 4\n"
    ),
    "devices-busy": (
        "2026-Nov-24 23:22:12.0323 28078:28078 ERROR   NRT:nrt_allocate_neuron_cores   "
        "NeuronCore(s) not available - Requested:nc1-nc1 Available:0\n"
    ),
    "host-out-of-memory": (
        "2026-Nov-24 23:22:12.0323 28078:28078 ERROR   NRT:nrt_infodump  Failure: "
        "NRT_FAIL_HOST_MEM_ALLOC in nrt_load()\n"
    ),
    "not-a-number": (
        "RuntimeError: nrt_execute failed: NRT_EXEC_COMPLETED_WITH_NUM_ERR (status 1003)\n"
    ),
    "bad-neff-input": "RuntimeError: nrt_execute failed: NRT_EXEC_BAD_INPUT (status 1002)\n",
    "network-fault": "RuntimeError: nrt_execute failed: NRT_NETWORK_PROXY_FAILURE\n",
    "no-device": (
        "2026-Nov-24 04:59:22.0768 117717:117717 ERROR   NRT:nrt_init           Failed to "
        "initialize devices, error:5\n"
    ),
}
"""By the code of the row."""


def pod(
    *,
    phase: str = "Failed",
    reason: str = "",
    message: str = "",
    terminated: Mapping[str, Any] | None = None,
    waiting: Mapping[str, Any] | None = None,
    conditions: tuple[Mapping[str, Any], ...] = (),
) -> dict[str, Any]:
    """Return a pod as the API shows it."""
    state: dict[str, Any] = {}
    if terminated is not None:
        state["terminated"] = dict(terminated)
    if waiting is not None:
        state["waiting"] = dict(waiting)
    status: dict[str, Any] = {
        "phase": phase,
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            *(dict(each) for each in conditions),
        ],
    }
    if state:
        status["containerStatuses"] = [{"name": "base", "state": state, "restartCount": 0}]
    if reason:
        status["reason"] = reason
    if message:
        status["message"] = message
    return {"metadata": {"name": "compile-x"}, "spec": {"nodeName": "ip-10"}, "status": status}


def disrupted(reason: str, message: str) -> dict[str, Any]:
    """Return the condition of a pod that was ended from outside."""
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}


def node(*, health: str = "NeuronHasNoError", taints: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a node as the API shows it."""
    return {
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "KubeletReady"},
                {"type": "NeuronHealth", "status": "False", "reason": health},
            ]
        },
    }


KILLED = {"exitCode": 137, "reason": "Error"}

PODS: Mapping[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "device-fault": (
        pod(terminated=KILLED),
        node(health="NeuronHasError_HBM_UNCORRECTABLE_ERROR"),
    ),
    "spot-interruption": (
        pod(terminated=KILLED),
        node(taints=("aws-node-termination-handler/spot-itn",)),
    ),
    "host-out-of-memory": (
        pod(terminated={"exitCode": 137, "reason": "OOMKilled"}),
        node(),
    ),
    "disk-full": (
        pod(
            reason="Evicted",
            message="Pod ephemeral local storage usage exceeds the total limit of containers "
            "107374182400.",
        ),
        node(),
    ),
    "preempted": (
        pod(
            conditions=(
                disrupted(
                    "PreemptionByScheduler",
                    "default-scheduler: preempting to accommodate a higher priority pod",
                ),
            )
        ),
        node(),
    ),
    "node-gone": (
        pod(
            reason="Terminated",
            message="Pod was terminated in response to imminent node shutdown.",
            terminated={"exitCode": 143, "reason": "Error"},
        ),
        None,
    ),
    "evicted": (
        pod(
            conditions=(
                disrupted(
                    "EvictionByEvictionAPI", "Eviction API: evicting due to node drain by Karpenter"
                ),
            ),
            terminated={"exitCode": 143, "reason": "Error"},
        ),
        node(),
    ),
    "deadline": (
        pod(
            reason="DeadlineExceeded",
            message="Pod was active on the node longer than the specified deadline",
        ),
        node(),
    ),
    "admission": (
        pod(
            reason="UnexpectedAdmissionError",
            message="Allocate failed due to requested number of devices unavailable for "
            "aws.amazon.com/neuron. Requested: 1, Available: 0, which is unexpected",
        ),
        node(),
    ),
    "container-config": (
        pod(
            phase="Pending",
            waiting={
                "reason": "CreateContainerConfigError",
                "message": 'secret "hub-token" not found',
            },
        ),
        node(),
    ),
    "image-pull-later": (
        pod(
            phase="Pending",
            waiting={
                "reason": "ErrImagePull",
                "message": "toomanyrequests: Rate exceeded",
            },
        ),
        node(),
    ),
    "image-pull": (
        pod(
            phase="Pending",
            waiting={
                "reason": "ImagePullBackOff",
                "message": 'Back-off pulling image "registry.example/vllm:typo"',
            },
        ),
        node(),
    ),
    "unschedulable": (
        pod(
            phase="Pending",
            conditions=(
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/5 nodes are available: 5 Insufficient aws.amazon.com/neuron.",
                },
            ),
        ),
        None,
    ),
    "start-timeout": (pod(phase="Pending", waiting={"reason": "ContainerCreating"}), node()),
    "pod-gone": (None, None),
}
"""By the code of the row: a pod, and its node if anybody knows it."""
