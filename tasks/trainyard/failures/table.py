"""The known failures, each with what it looks like, what to do about it and where that is from.

Order counts: the first row that recognises something wins, so that a cause comes before its
consequences (a compiler that was killed also exits with 70).

    python -m trainyard.failures.table

prints the table as Markdown, as docs/failures.md has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Action(StrEnum):
    """What helps."""

    CHANGE = "retry with other settings"
    ELSEWHERE = "retry elsewhere or later"
    STOP = "stop"


Change = Literal["", "halve workers", "one worker"]
"""What the next try changes: how many compiler processes run at a time."""

ExitCode = Literal[10, 20, 30, 40]


@dataclass(frozen=True)
class Row:
    """One kind of failure."""

    code: str
    """Its name in status documents; the vendor's own code where there is one."""
    pattern: str
    """Regular expression over the log, or over the lines that `pod_evidence` makes."""
    reason: str
    """What went wrong, one sentence."""
    hint: str
    """What to do about it."""
    action: Action
    exit_code: ExitCode
    """As in `trainyard.errors`: 10 and 20 are not tried again, 30 soon, 40 later."""
    source: str
    change: Change = ""


_CODES = "AWS Neuron SDK 2.32 documentation: compiler/error-codes"
_STATUS = "AWS Neuron SDK 2.32: src/libnrt/include/nrt/nrt_status.h"
_TROUBLE = "AWS Neuron SDK 2.32 documentation: neuron-runtime/nrt-troubleshoot.rst"
_PODS = "Kubernetes documentation: concepts/workloads/pods/disruptions (pod disruption conditions)"
_LIFE = "Kubernetes documentation: concepts/workloads/pods/pod-lifecycle"
_KUBELET = "Kubernetes: pkg/kubelet (eviction, lifecycle, images)"

_SMALLER = (
    "Lower max_num_seqs, max_model_len or neuron.num_gpu_blocks (native: also "
    "gpu_memory_utilization), or raise tensor_parallel_size."
)
_ANOTHER_MODEL = (
    "This lane and SDK cannot compile the model: try a newer SDK, the other lane, or a model that "
    "AWS documents."
)
_OUT_OF_MEMORY = (
    "The next try runs fewer compiler processes at a time (neuron.parallel_compile_workers), and a "
    "pod asks for more memory. If it fails again: a larger instance."
)


def _stop(
    code: str, pattern: str, reason: str, hint: str, source: str, exit_code: ExitCode = 20
) -> Row:
    return Row(code, pattern, reason, hint, Action.STOP, exit_code, source)


def _elsewhere(
    code: str, pattern: str, reason: str, hint: str, source: str, exit_code: ExitCode = 30
) -> Row:
    return Row(code, pattern, reason, hint, Action.ELSEWHERE, exit_code, source)


COMPILER: tuple[Row, ...] = (
    Row(
        "F137", r"\[F137\]",
        "The compiler was killed for lack of the machine's memory.", _OUT_OF_MEMORY,
        Action.CHANGE, 40,
        "Text of neuronx-cc; aws-neuron-sdk #706, nki-samples #87", "halve workers",
    ),
    Row(
        "NCC_EVRF059", r"\bNCC_EVRF059\b",
        "An intermediate file of an NKI kernel was gone when the compiler looked for it: parallel "
        "compiler processes share that folder.",
        "The next try runs one compiler process. If it fails again, empty "
        "/var/tmp/nki-intermediate-cache.",
        Action.CHANGE, 40, f"{_CODES}/EVRF059.rst; aws-neuron-sdk #1369", "one worker",
    ),
    _stop(
        "NCC_EVRF065", r"\bNCC_EVRF065\b",
        "An NKI kernel was traced by another version of NKI than the compiler's.",
        "Use an image whose packages are all of one SDK.", f"{_CODES}/EVRF065.rst",
    ),
    _stop(
        "NCC_EVRF009", r"\bNCC_(EVRF009|EXSP001|EOOM00[12])\b",
        "The model with its KV cache and activations needs more memory than a device has.",
        _SMALLER, f"{_CODES}/EVRF009.rst, EXSP001.rst, EOOM001.rst, EOOM002.rst",
    ),
    _stop(
        "NCC_EARG001", r"\bNCC_(EARG001|EVRF066)\b",
        "The number of physical cores in a logical one does not fit the chip or a kernel.",
        "Leave neuron.lnc out, or set what the chip has: 2 on Trn2 and Trn3, else 1.",
        f"{_CODES}/EARG001.rst, EVRF066.rst",
    ),
    _stop(
        "NCC_EVRF007", r"\bNCC_(EVRF007|EBVF030|EXTP004)\b",
        "A graph has more instructions than the compiler takes.",
        "Raise tensor_parallel_size, or lower the largest bucket.",
        f"{_CODES}/EVRF007.rst, EBVF030.rst, EXTP004.rst",
    ),
    _stop(
        "NCC_EVRF056", r"\bNCC_(EVRF056|EVRF031)\b",
        "The graph reads beyond the end of a table, most likely that of the positions.",
        "Give a max_model_len of at most the model's max_position_embeddings.",
        f"{_CODES}/EVRF056.rst, EVRF031.rst", 10,
    ),
    _stop(
        "NCC_EBIR023", r"\bNCC_EBIR023\b",
        "The MLP kernel takes an intermediate size of 4096 at most.",
        "Raise tensor_parallel_size, or turn mlp_kernel_enabled off.", f"{_CODES}/EBIR023.rst",
    ),
    _stop(
        "NCC_EUOC002",
        r"\bNCC_(EUOC002|EVRF001|EVRF006|EVRF01[0135-9]|EVRF022|EVRF024|EHCA005|EMOD025)\b",
        "The model has an operation that the compiler does not support.", _ANOTHER_MODEL,
        f"{_CODES}/EUOC002.rst, EVRF001.rst, EVRF006.rst to EVRF024.rst, EHCA005.rst, EMOD025.rst",
    ),
    _stop(
        "NCC_ESPP047",
        r"\bNCC_(ESPP004|ESPP047|ESFH002|EVRF004|EVRF005|EVRF035|EVRF05[12]|EVRF06[0123])\b",
        "The model has a number format that the chip does not compute with.",
        "Use weights in bfloat16, or in the FP8 format of the chip.",
        f"{_CODES}/ESPP004.rst, ESPP047.rst, ESFH002.rst, EVRF004.rst to EVRF063.rst",
    ),
    _stop(
        "NCC_EVRF036", r"\bNCC_EVRF0(3[6-9]|4\d|50|53|54|55|57|58)\b",
        "A matrix in an MX number format is laid out as the compiler does not take it.",
        "Remove neuron_config.quantization, or use the SDK that the checkpoint was made for.",
        f"{_CODES}/EVRF036.rst to EVRF058.rst",
    ),
    _stop(
        "NCC_EVRF064", r"\bNCC_EVRF064\b",
        "The framework gave the compiler a graph that breaks XLA's rules.",
        "Use an image whose packages are all of one SDK; if it is, report it to AWS.",
        f"{_CODES}/EVRF064.rst",
    ),
    _stop(
        "NCC_E", r"\bNCC_E[A-Z]+\d+\b",
        "The compiler refused the model.",
        "Look the code up in AWS's list of compiler error codes.", f"{_CODES}/index.rst",
    ),
    _stop(
        "NCC_I", r"\bNCC_(?!E)[A-Z]+\d+\b",
        "The compiler failed with an internal error.",
        "Try another SDK (on Inf2 and Trn1: 2.28.1), a lower optimization level, or report it to "
        "AWS with the compiler's log.",
        "vllm-neuron #11, #16 (NCC_INLA001); kubernetes-sigs/wg-serving #70 (NCC_ITEN404)",
    ),
    _stop(
        "F134", r"\[F1(34|39)\]",
        "The compiler crashed.",
        "Try another SDK, or report it to AWS with the compiler's log.",
        "Text of neuronx-cc; aws-neuron-sdk #1000",
    ),
    Row(
        "compiler-exit-70",
        r"neuronx-cc\b.*(exit(ed)?( status| code)?|failed|error code|status)( with)?:? ?70\b",
        "The compiler ended with exit code 70 and no code of its own.",
        "It happens now and then when many processes compile at once: the next try runs one. If it "
        "fails again, read the compiler's log.",
        Action.CHANGE, 40, "aws-neuron-sdk #1369", "one worker",
    ),
)  # fmt: skip
"""What the compiler says."""

RUNTIME: tuple[Row, ...] = (
    _stop(
        "cache-miss", r"VLLM_NEURON_DISABLE_WARMUP_COMPILE: local compile cache miss",
        "The server needed code that is not in its bundle, and may not compile.",
        "Compile with this image and these settings; the compile key leaves out something.",
        "AWS Neuron SDK 2.32 documentation: vllm-neuron/docs/guides/reference-configuration.md",
    ),
    _stop(
        "driver-missing", r"Unable to determine Neuron Driver version",
        "The node has no Neuron driver, or the container does not see it.",
        "Use a Neuron AMI, and ask for `aws.amazon.com/neuron` devices.", _TROUBLE,
    ),
    _stop(
        "driver-too-old",
        r"This runtime requires Neuron Driver version"
        r"|is not compatible with the installed aws-neuron"
        r"|aws_hal_tpb_pooling_write_profile\s+failed programming the engine",
        "The node's Neuron driver does not fit the runtime in the image.",
        "Update the node's AMI, or use an image of an older SDK: runtimes from 2.32 on (SDK 2.30) "
        "need a driver above 2.26.",
        f"{_TROUBLE}; SDK 2.30 release notes of containers",
    ),
    _stop(
        "neff-other-chip", r"NEURON_RT_ALLOW_LEGACY_NEFF",
        "The code was compiled for an older kind of chip.",
        "Compile for this kind: a bundle of Trn1 does not count on Trn2.",
        "AWS Neuron SDK 2.32 documentation: neuron-runtime/guides/configuration-guide.rst; "
        "aws-neuron-sdk #1259",
    ),
    _stop(
        "neff-too-new",
        r"NEFF version: ?[\d.]+, features: ?0x[0-9a-fA-F]+ (are|is) not supported"
        r"|NEFF version mismatch supported|NRT_UNSUPPORTED_NEFF_VERSION"
        r"|Unsupported hardware operator code \d+ found in neff",
        "The code is newer than the runtime or the driver that should run it.",
        "Serve with the image that compiled it, and update the node's AMI.",
        f"{_TROUBLE}; aws-neuron-sdk #820, #823, #1061",
    ),
    _elsewhere(
        "device-fault",
        r"NRT_EXEC_HW_ERR_(HBM_UE|NC_UE|DMA_ABORT|REPAIRABLE_HBM_UE)|NRT_HW_ERROR"
        r"|NRT_EXEC_UNIT_UNRECOVERABLE|NRT_EXEC_COMPLETED_WITH_ERR\b|NEURON_HW_ERR="
        r"|DMA [RT]X engine \d+ is in an abort state",
        "A device of the node is broken.",
        "Another node is tried; terminate this one (the problem detector's node recovery does).",
        f"{_STATUS}; {_TROUBLE}",
    ),
    _elsewhere(
        "device-hang",
        r"NRT_EXEC_HW_ERR_COLLECTIVES|suspected hang in collectives"
        r"|\(FATAL-RT-UNDEFINED-STATE\) execution timeout|NRT_TIMEOUT",
        "A device did not answer in time.",
        "Another node is tried. With long contexts, NEURON_RT_EXEC_TIMEOUT may be too short.",
        f"{_STATUS}; {_TROUBLE}",
    ),
    _stop(
        "device-out-of-memory",
        r"Failed to allocate [\d.]+ ?[KMG]?B \(alignment: [^)]*usage: [^)]*\) on ND"
        r"|\bnrt_(tensor_allocate|load\w*) status=4\b|Failure: NRT_RESOURCE in nrt_"
        r"|\[?TDRV:dmem_alloc\]?\s+Failed to alloc DEVICE memory",
        "The devices' memory is too small for the model with its KV cache.", _SMALLER,
        "AWS Neuron SDK 2.32 documentation: neuron-runtime/explore/device-memory.rst; "
        "vllm #12443",
    ),
    Row(
        "devices-busy",
        r"NeuronCore\(s\) not available|NRT_LOAD_NOT_ENOUGH_NC|NRT_EXEC_NC_BUSY",
        "Another process holds the devices.",
        "Ask for whole devices (`aws.amazon.com/neuron`), and stop what runs beside this.",
        Action.ELSEWHERE, 40, f"{_STATUS}; {_TROUBLE}",
    ),
    Row(
        "host-out-of-memory", r"NRT_FAIL_HOST_MEM_ALLOC",
        "The machine's memory was too small.", _OUT_OF_MEMORY,
        Action.CHANGE, 40, _STATUS, "halve workers",
    ),
    _stop(
        "not-a-number", r"NRT_EXEC_COMPLETED_WITH_NUM_ERR",
        "The compiled model computes values that are no numbers (NaN).",
        "Compare with the unquantized weights, or try another SDK.", _STATUS,
    ),
    _stop(
        "bad-neff-input", r"NRT_EXEC_(BAD_INPUT|OOB)\b",
        "The compiled code was given inputs that it was not compiled for.",
        "Compile and serve with the same image and the same settings.", _STATUS,
    ),
    _elsewhere(
        "network-fault", r"NRT_NETWORK_PROXY_FAILURE",
        "The network between devices failed.", "Another node is tried.", _STATUS,
    ),
    _elsewhere(
        "no-device", r"NRT:nrt_init\s+Failed to initialize devices, error:\d+",
        "The runtime could not take the node's devices.",
        "Another node is tried; look at `neuron-ls` and the driver's messages on this one.",
        _TROUBLE,
    ),
)  # fmt: skip
"""What the Neuron runtime and vLLM's plugins say."""

POD: tuple[Row, ...] = (
    _elsewhere(
        "device-fault", r"^node condition NeuronHealth: NeuronHasError_",
        "A device of the node is broken, says the node's problem detector.",
        "Another node is tried; terminate this one (node recovery does).",
        "AWS Neuron SDK 2.32: src/k8/neuron-problem-detector; "
        "deploy/infrastructure/problem-detector.rst",
    ),
    _elsewhere(
        "spot-interruption",
        r"^node taint aws-node-termination-handler/(spot-itn|rebalance-recommendation"
        r"|scheduled-maintenance|asg-lifecycle-termination)",
        "AWS takes the node away: a spot interruption, or a retirement.",
        "Another node is tried; what was half done does not count. Long compiles: no spot nodes.",
        "aws-node-termination-handler: README, taints",
    ),
    Row(
        "host-out-of-memory",
        r"^container \S+ terminated: OOMKilled|^pod message: .*low on resource: memory",
        "The pod ran out of memory.", _OUT_OF_MEMORY, Action.CHANGE, 40, _LIFE, "halve workers",
    ),
    _stop(
        "disk-full",
        r"^pod message: .*(low on resource: ephemeral-storage|ephemeral local storage usage exceeds"
        r"|exceed(s|ed) (the total limit of containers|its local ephemeral storage limit)"
        r"|Usage of EmptyDir volume)",
        "The pod needed more disk than it asked for or the node has.",
        "Raise steps.work_gib, or give the nodes a larger volume.", _KUBELET, 10,
    ),
    Row(
        "preempted", r"^condition DisruptionTarget: PreemptionByScheduler|^pod reason: Preempting",
        "The pod gave way to one of a higher priority.",
        "It is tried again later: servers come before steps.",
        Action.ELSEWHERE, 40, _PODS,
    ),
    _elsewhere(
        "node-gone",
        r"^condition DisruptionTarget: "
        r"(DeletionByTaintManager|DeletionByPodGC|TerminationByKubelet)"
        r"|^pod reason: (NodeLost|NodeShutdown|Shutdown|Terminated)\b"
        r"|^node taint (node\.kubernetes\.io/(unreachable|out-of-service)"
        r"|karpenter\.sh/disrupt\w+)",
        "The node went away, or was shut down: an interruption of a spot instance does that.",
        "Another node is tried; what was half done does not count.", _PODS,
    ),
    _elsewhere(
        "evicted", r"^condition DisruptionTarget: EvictionByEvictionAPI|^pod reason: Evicted",
        "The pod was evicted: somebody or something drained its node.",
        "Another node is tried. Karpenter leaves pods with karpenter.sh/do-not-disrupt alone, but "
        "not when a node must go.",
        _PODS,
    ),
    _stop(
        "deadline", r"^pod reason: DeadlineExceeded",
        "The pod took longer than it may (activeDeadlineSeconds).",
        "Raise the task's execution_timeout, or take more time from the reservation.", _LIFE,
    ),
    _elsewhere(
        "admission",
        r"^pod reason: (UnexpectedAdmissionError|NodeAffinity|OutOf\S+|TopologyAffinityError)",
        "The node could not take the pod after all; its devices were gone meanwhile.",
        "Another node is tried.", _KUBELET, 40,
    ),
    _stop(
        "container-config",
        r"^container \S+ waiting: "
        r"(CreateContainerConfigError|CreateContainerError|RunContainerError)"
        r"|^container \S+ terminated: (StartError|ContainerCannotRun)",
        "The container cannot be started: a secret is missing, or the image lacks the program.",
        "The message names it: correct steps.env_from_secrets, steps.python or the image.",
        _KUBELET, 10,
    ),
    _elsewhere(
        "image-pull-later",
        r"^container \S+ waiting: (ErrImagePull|ImagePullBackOff): .*"
        r"(pull QPS exceeded|rate limit|[Tt]oo [Mm]any [Rr]equests|toomanyrequests|timeout"
        r"|[Tt]emporarily unavailable|[Bb]ad [Gg]ateway|[Ss]ervice [Uu]navailable|EOF"
        r"|no space left)",
        "The image could not be pulled for now.", "It is tried again.", _KUBELET,
    ),
    _stop(
        "image-pull",
        r"^container \S+ waiting: "
        r"(ErrImagePull|ImagePullBackOff|InvalidImageName|ErrImageNeverPull|ImageInspectError)",
        "The image cannot be pulled.",
        "Check its name, its tag, that the nodes may read the registry (image_pull_secrets, or the "
        "node's role for ECR) and, with image_pull_policy Never, that it was imported.",
        _KUBELET, 10,
    ),
    Row(
        "unschedulable",
        r"^condition PodScheduled: (Unschedulable|SchedulerError)|^event FailedScheduling",
        "No node could take the pod in the time it may wait (steps.schedule_timeout_s).",
        "It is tried again later. Look at the NodePool's limits, at the capacity of the instance "
        "type in its zones, and at taints.",
        Action.ELSEWHERE, 40, f"{_LIFE} (PodScheduled)",
    ),
    _elsewhere(
        "start-timeout", r"^phase Pending",
        "The container did not start in the time it may take (steps.startup_timeout_s).",
        "It is tried again: the image may be there by then. Large images: raise startup_timeout_s.",
        _LIFE,
    ),
    _elsewhere(
        "pod-gone", r"^pod gone",
        "The pod is gone: it was deleted, or its node was.", "It is tried again.", _PODS,
    ),
)  # fmt: skip
"""What Kubernetes says of a pod and its node."""

EXIT_CODES: tuple[Row, ...] = (
    Row(
        "host-out-of-memory", r"^exit code (137|-9)$",
        "The process was killed (SIGKILL), most likely for lack of memory.", _OUT_OF_MEMORY,
        Action.CHANGE, 40, _LIFE, "halve workers",
    ),
)  # fmt: skip
"""What an exit code alone says."""

LOG = (*COMPILER, *RUNTIME)
ALL = (*LOG, *POD, *EXIT_CODES)


def row_of(code: str) -> Row | None:
    """Return the row of a code, also of a compiler code that has no row of its own."""
    for row in ALL:
        if row.code == code:
            return row
    return None


def markdown() -> str:
    """Return the table as Markdown, as `docs/failures.md` has it."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    for title, rows in (
        ("The compiler", COMPILER),
        ("Runtime and server", RUNTIME),
        ("Pod and node", POD),
        ("Exit code alone", EXIT_CODES),
    ):
        yield f"### {title}"
        yield ""
        yield "| code | what happened | what Trainyard does | exit | what you can do | source |"
        yield "|---|---|---|---|---|---|"
        for row in rows:
            action = f"{row.action}{f' ({row.change})' if row.change else ''}"
            yield (
                f"| `{row.code}` | {row.reason} | {action} | {row.exit_code} | {row.hint} | "
                f"{row.source} |"
            )
        yield ""


if __name__ == "__main__":
    print(markdown())
