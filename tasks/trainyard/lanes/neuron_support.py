"""What is known of AWS Neuron: SDK releases, serving images, drivers, instances, model families.

Data, as of `AS_OF`, each row with its source. Nothing here is in a compile key (a key holds what
the spec says and what the serving interpreter has), so a new row changes no key.

A pair that is known not to work is refused. Everything else is unproven until it was proven on a
device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

AS_OF = "2026-11-22"

Family = Literal["inf2", "trn1", "trn2", "trn3"]
"""The compiler's platform targets."""
NeuronLaneName = Literal["neuron-native", "neuron-nxdi"]
Version = tuple[int, ...]

_SDK_DOCS = "AWS Neuron SDK 2.32 documentation"
_MANIFEST = f"{_SDK_DOCS}: src/helperscripts/n2-manifest.json; deep-learning-containers README"
_ARCH = f"{_SDK_DOCS}: about-neuron/arch/neuron-hardware"


@dataclass(frozen=True)
class Instance:
    """One EC2 instance type with Neuron devices."""

    name: str
    family: Family
    chips: int
    """What Kubernetes counts as `aws.amazon.com/neuron`."""
    cores_per_chip: int
    """Physical."""
    default_lnc: Literal[1, 2]
    hbm_gib_per_chip: int
    host_memory_gib: int | None
    """None: not published."""
    chip_counts: tuple[int, ...]
    """Numbers of chips that one server may take; empty: any."""
    source: str

    def logical_cores(self, lnc: int) -> int:
        """Return how many cores the whole instance has for tensor parallelism."""
        return self.chips * self.cores_per_chip // lnc


def _instances() -> Iterator[Instance]:
    v2, trn2 = f"{_ARCH}/inf2-arch, trn1-arch", f"{_ARCH}/trn2-arch"
    yield Instance("inf2.xlarge", "inf2", 1, 2, 1, 32, 16, (), v2)
    yield Instance("inf2.8xlarge", "inf2", 1, 2, 1, 32, 128, (), v2)
    yield Instance("inf2.24xlarge", "inf2", 6, 2, 1, 32, 384, (), v2)
    yield Instance("inf2.48xlarge", "inf2", 12, 2, 1, 32, 768, (), v2)
    # deploy/infrastructure/scheduler.rst: a pod on trn1.32xlarge takes 1, 4, 8 or 16 devices.
    yield Instance("trn1.2xlarge", "trn1", 1, 2, 1, 32, 32, (), v2)
    yield Instance("trn1.32xlarge", "trn1", 16, 2, 1, 32, 512, (1, 4, 8, 16), v2)
    yield Instance("trn1n.32xlarge", "trn1", 16, 2, 1, 32, 512, (1, 4, 8, 16), v2)
    yield Instance("trn2.3xlarge", "trn2", 1, 8, 2, 96, 128, (), trn2)
    yield Instance("trn2.48xlarge", "trn2", 16, 8, 2, 96, 2048, (), trn2)
    yield Instance("trn2u.48xlarge", "trn2", 16, 8, 2, 96, 2048, (), trn2)
    yield Instance(
        "trn3.48xlarge", "trn3", 16, 8, 2, 144, None, (),
        f"{_ARCH}/trn3-arch (16 Trainium3 in each server of a Gen1 UltraServer), trainium3; the "
        "size's name is the Neuron driver's and was seen in no price list",
    )  # fmt: skip


INSTANCES: Mapping[str, Instance] = MappingProxyType({each.name: each for each in _instances()})


@dataclass(frozen=True)
class SdkRelease:
    """One release of the AWS Neuron SDK."""

    version: str
    released: str
    """ISO date; empty: not noted."""
    neuronx_cc: str
    """The compiler, as far as its version is published."""
    driver: str
    """Kernel module on the host; empty: not noted."""
    runtime: str
    nki: str
    native_plugin: str
    """vLLM Neuron plugin of lane `neuron-native` in the image; empty: none."""
    nxdi: str
    """NxD Inference in the image of lane `neuron-nxdi`; empty: none."""
    nxdi_vllm: str
    """vLLM in that image."""
    source: str = _MANIFEST


_RELEASES = (
    SdkRelease("2.33.0", "2026-10-19", "2.28.7631.0", "2.31.7.0", "2.35.30.0", "0.7.0",
               "0.29.0.1.2.0", "", "",
               "AWS Neuron SDK 2.33.0 release notes (releasecontent, update-dlc), excerpts"),
    SdkRelease("2.32.0", "2026-08-17", "2.27.5334", "2.30.2", "2.34.10", "0.6.0",
               "0.24.0.1.1.0", "", ""),
    SdkRelease("2.31.1", "2026-08-12", "2.26.6360", "2.29.0", "2.33.10", "0.5.0",
               "0.21.0.1.0.0", "0.10.18399", "0.16.0"),
    SdkRelease("2.31.0", "2026-07-07", "2.26.6360", "2.29.0", "2.33.10", "0.5.0",
               "0.21.0.1.0.0", "0.10.18399", "0.16.0"),
    SdkRelease("2.30.0", "2026-05-21", "2.25.3371", "2.28.0", "2.32.31", "0.4.0",
               "", "0.10.17970", "0.16.0"),
    SdkRelease("2.29.1", "", "2.24.8799", "2.27.4", "2.31.24", "0.3.0",
               "", "0.9.17334", "0.16.0"),
    SdkRelease("2.29.0", "2026-04-09", "2.24.8799", "2.27.4", "2.31.24", "0.3.0",
               "", "0.9.17334", "0.16.0"),
    SdkRelease("2.28.1", "", "2.23.6484", "2.26.10", "2.30.51", "", "", "0.8.16251", "0.13.0"),
    SdkRelease("2.28.0", "2026-02-26", "", "", "2.30.50.0", "", "", "", "0.13.0",
               "Neuron Runtime release notes; deep-learning-containers README"),
    SdkRelease("2.27.1", "", "2.22.12471", "2.25.4", "2.29.40", "", "", "0.7.15063", "0.13.0",
               f"{_MANIFEST}; its release notes say NxDI 0.7.15603"),
    SdkRelease("2.26.1", "", "2.21.33363", "2.24.7", "2.28.23", "", "", "0.6.10598", "0.9.1"),
    SdkRelease("2.25.0", "", "2.20.9961", "", "", "", "", "0.5.9230", "0.9.1"),
)  # fmt: skip

RELEASES: Mapping[str, SdkRelease] = MappingProxyType({each.version: each for each in _RELEASES})


REPOSITORY = "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx"
_IMAGE_TAGS = (
    "0.29.0.1.2.0-neuronx-py314-sdk2.33.0-ubuntu26.04",
    "0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04",
    "0.21.0.1.0.0-neuronx-py313-sdk2.31.1-ubuntu24.04",
    "0.21.0.1.0.0-neuronx-py313-sdk2.31.0-ubuntu24.04",
    "0.16.0-neuronx-py312-sdk2.31.1-ubuntu24.04",
    "0.16.0-neuronx-py312-sdk2.31.0-ubuntu24.04",
    "0.16.0-neuronx-py312-sdk2.30.0-ubuntu24.04",
    "0.16.0-neuronx-py312-sdk2.29.1-ubuntu24.04",
    "0.16.0-neuronx-py312-sdk2.29.0-ubuntu24.04",
    "0.13.0-neuronx-py312-sdk2.28.0-ubuntu24.04",
    "0.13.0-neuronx-py312-sdk2.27.1-ubuntu24.04",
    "0.11.0-neuronx-py312-sdk2.27.1-ubuntu24.04",
    "0.9.1-neuronx-py311-sdk2.26.1-ubuntu22.04",
    "0.9.1-neuronx-py310-sdk2.25.0-ubuntu22.04",
)
IMAGES: tuple[str, ...] = tuple(f"{REPOSITORY}:{tag}" for tag in _IMAGE_TAGS)
"""AWS's serving images, the newest first. Source: deep-learning-containers README (2026-08-17);
that of 2.33 from its release notes, excerpts."""


@dataclass(frozen=True)
class Preflight:
    """What is known of a lane on a kind of chip with an SDK."""

    state: Literal["refused", "unproven"]
    reason: str
    """One sentence."""
    remedy: str
    source: str


@dataclass(frozen=True)
class ModelFamily:
    """Models that a lane is documented to serve."""

    lane: NeuronLaneName
    model_type: str
    """As in config.json."""
    sizes: str
    source: str


FAMILIES = (
    ModelFamily("neuron-native", "llama", "Llama 3 (3.1, 3.2, 3.3): 1B, 8B, 70B",
                f"{_SDK_DOCS}: vllm-neuron/docs/model-recipes"),
    ModelFamily("neuron-native", "gpt_oss", "gpt-oss: 20B, 120B",
                f"{_SDK_DOCS}: vllm-neuron/docs/model-recipes"),
    ModelFamily("neuron-native", "qwen3_vl", "Qwen3-VL-32B",
                f"{_SDK_DOCS}: vllm-neuron/docs/model-recipes"),
    ModelFamily("neuron-native", "qwen3", "Qwen3-Embedding-8B",
                f"{_SDK_DOCS}: vllm-neuron/docs/model-recipes"),
    *(
        ModelFamily("neuron-nxdi", model_type, "", "NxD Inference 0.10: inference_demo.py")
        for model_type in ("llama", "mistral", "mixtral", "dbrx", "qwen2", "qwen3", "qwen3_moe",
                           "gemma3")
    ),
)  # fmt: skip


def family_of(instance: str) -> Family | None:
    """Return the platform target of an instance type, also of a size that is not in the table."""
    match = re.match(r"(inf2|trn1|trn2|trn3)[a-z]*\.", instance)
    if match is None:
        return None
    families: dict[str, Family] = {
        "inf2": "inf2", "trn1": "trn1", "trn2": "trn2", "trn3": "trn3",
    }  # fmt: skip
    return families[match[1]]


def preflight(sdk: str, lane: NeuronLaneName, family: Family) -> Preflight:
    """Return whether an SDK, a lane and a kind of chip are known not to go together."""
    for known in _refusals(sdk, lane, family):
        return known
    if sdk not in RELEASES:
        return Preflight(
            "unproven",
            f"SDK {sdk} is not in Trainyard's table of {AS_OF}.",
            f"Releases it knows: {', '.join(RELEASES)}.",
            "",
        )
    if lane == "neuron-nxdi" and family in ("inf2", "trn1") and as_version(sdk) >= (2, 29):
        return Preflight(
            "unproven",
            f"AWS contradicts itself on {family} with SDK {sdk}: the notes of 2.29 end NxD "
            "Inference's models there, the images of 2.29 to 2.31 list it.",
            "SDK 2.28.1 with vLLM 0.13 is the safe choice.",
            "SDK 2.29.1 release notes (nxd-inference); deep-learning-containers README",
        )
    return Preflight(
        "unproven", f"{lane} on {family} with SDK {sdk} is documented.", "", RELEASES[sdk].source
    )


def _refusals(sdk: str, lane: NeuronLaneName, family: Family) -> Iterator[Preflight]:
    version, release = as_version(sdk), RELEASES.get(sdk)
    if lane == "neuron-native":
        if family not in ("trn2", "trn3"):
            yield Preflight(
                "refused",
                f"Lane neuron-native runs on Trn2 and Trn3 only, not on {family}.",
                "Use lane neuron-nxdi there.",
                f"{_SDK_DOCS}: vllm-neuron/docs (migration-nxdi-to-vllm-neuron)",
            )
        if version < (2, 31):
            yield Preflight(
                "refused",
                f"SDK {sdk} has no native vLLM plugin; it begins with 2.31.0.",
                "Use a newer SDK, or lane neuron-nxdi.",
                f"{_SDK_DOCS}: vllm-neuron/docs/getting-started/setup-guide.md",
            )
        return
    if version < (2, 27):
        yield Preflight(
            "refused",
            f"SDK {sdk} serves through a fork of vLLM; its plugin begins with SDK 2.27.",
            "Use SDK 2.28.1 or newer.",
            "aws-neuron/upstreaming-to-vllm (ended with SDK 2.26.1); vllm-neuron README",
        )
    if family in ("trn2", "trn3") and version >= (2, 34):
        yield Preflight(
            "refused",
            f"NxD Inference has no support on {family} from SDK 2.34 on.",
            "Use lane neuron-native.",
            "SDK 2.33 documentation: announce-eos-nxdi-nxd-core-inference",
        )
    if version >= (2, 32) or (release is not None and not release.nxdi and not release.nxdi_vllm):
        yield Preflight(
            "refused",
            f"The images of SDK {sdk} have no NxD Inference; 2.31.1 is the last that has it.",
            "Use SDK 2.31.1 or older, or lane neuron-native on Trn2 and Trn3.",
            f"{_SDK_DOCS}: announce-maintenance-nxdi-nxd-core-inference",
        )


DRIVER_SOURCE = (
    "Neuron containers' compatibility notes (2.30), release notes of the driver; aws-neuron-sdk "
    "issues 820, 823, 1061"
)


def known_drivers() -> tuple[str, ...]:
    """Return the host drivers of the releases in the table, the oldest first."""
    return tuple(sorted({each.driver for each in _RELEASES if each.driver}, key=as_version))


def driver_problem(sdk: str, driver: str) -> str:
    """Return why a host's driver cannot run an SDK's images; empty if nothing is known."""
    if as_version(sdk) >= (2, 30) and as_version(driver) < (2, 27):
        return (
            f"Images of SDK {sdk} do not run on driver {driver}: runtimes from 2.32 on need a "
            "driver above 2.26. Update the node's AMI."
        )
    return ""


@dataclass(frozen=True)
class ImageTag:
    """What the tag of an AWS serving image says."""

    vllm: str
    """vLLM's version, or `<vLLM>.<plugin>` of the native plugin."""
    python: str
    sdk: str
    lane: NeuronLaneName


_TAG = re.compile(
    r":(?P<vllm>\d+(?:\.\d+)+)-neuronx-py(?P<python>\d+)-sdk(?P<sdk>\d+\.\d+\.\d+)-ubuntu[\d.]+"
    r"(?:@sha256:[0-9a-f]{64})?$"
)


def parse_image(reference: str) -> ImageTag | None:
    """Return what the tag of an image says, None if it is not one of AWS's serving images.

    The grammar is that of `pytorch-inference-vllm-neuronx` in AWS's public registry.
    """
    match = _TAG.search(reference)
    if match is None:
        return None
    native = match["vllm"].count(".") >= 4
    return ImageTag(
        vllm=match["vllm"],
        python=match["python"],
        sdk=match["sdk"],
        lane="neuron-native" if native else "neuron-nxdi",
    )


def as_version(text: str) -> Version:
    """Return the leading numbers of a version, to compare it."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def same_version(wanted: str, found: str) -> bool:
    """Tell whether `found` is `wanted` or a build of it, such as 2.27.5334.0+ab12 of 2.27.5334."""
    numbers = as_version(wanted)
    return as_version(found)[: len(numbers)] == numbers
