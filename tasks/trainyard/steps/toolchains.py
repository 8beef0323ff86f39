"""Which toolchain will compile a target: that of this machine, or that of the image of its pods.

A plan is made where Airflow runs. If the heavy steps are pods, the toolchain is in an image that
cannot be asked from there; it is taken from what was recorded in the image, or else from the table
of SDK releases. The steps in the pod compare it with what they see, so that no key ever names
another toolchain than the one that compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainyard.documents.base import Provenance
from trainyard.documents.toolchain import ToolchainRecord
from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.step_pod import StepWork, image_of
from trainyard.lanes.neuron_support import AS_OF, RELEASES
from trainyard.lanes.neuron_toolchain import toolchain_of_image
from trainyard.lanes.protocol import Lane
from trainyard.lanes.registry import get_lane
from trainyard.settings import Settings
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.model import Target
from trainyard.store.documents import read_document
from trainyard.store.layout import toolchain_key
from trainyard.store.protocol import Store


@dataclass(frozen=True)
class KnownToolchain:
    """A toolchain and what people should know of it."""

    versions: dict[str, str]
    warning: str = ""


def toolchain_for(
    target: Target,
    lane: Lane,
    *,
    model: str,
    place: KubernetesSteps | None,
    settings: Settings,
    store: Store,
) -> KnownToolchain:
    """Return the toolchain that will compile a target.

    Raises:
        BadInput: it cannot be known: the serving environment lacks it, or the image of the pods was
            never asked and the table does not have it.
        Transient: the interpreter did not answer in time.
    """
    if place is None:
        return KnownToolchain(lane.toolchain(settings.serving_interpreter))
    image = image_of(StepWork("compile", "", model, target), place)
    try:
        record = read_document(store, toolchain_key(image, target.lane), ToolchainRecord)
    except NotFound:
        return _by_table(target, image)
    return KnownToolchain(record.toolchain)


def record_toolchain(settings: Settings, store: Store, *, lane: str, image: str) -> ToolchainRecord:
    """Read the toolchain of the image that this runs in, store it, and return it.

    Raises:
        BadInput: the lane does not exist, or the serving environment lacks its packages.
        Transient: the interpreter or the store did not answer.
    """
    if not image:
        raise BadInput(
            "Nobody said in which image this runs.",
            hint="Give --image as the environments file or the target names it, or set "
            "TRAINYARD_IMAGE.",
        )
    record = ToolchainRecord(
        image=image,
        lane=lane,
        toolchain=get_lane(lane).toolchain(settings.serving_interpreter),
        provenance=Provenance.of(settings),
    )
    store.put(toolchain_key(image, lane), record.to_bytes())
    return record


def _by_table(target: Target, image: str) -> KnownToolchain:
    sdk = target.neuron.sdk if target.neuron is not None else ""
    versions: dict[str, str] = {}
    match target.lane:
        case "neuron-native" | "neuron-nxdi":
            versions = toolchain_of_image(image, sdk, target.lane)
    if not versions:
        known = f" Trainyard's table of {AS_OF} does not have SDK {sdk}." if sdk else ""
        raise BadInput(
            f"The toolchain of image {image} is not known.{known}",
            hint=f"Run `trainyard toolchain --lane {target.lane} --image {image}` once in the "
            "image (docs/steps-on-kubernetes.md has the command).",
        )
    return KnownToolchain(
        versions,
        f"Nobody recorded the toolchain of image {image}: its compile key names the image and what "
        f"the table of {AS_OF} says of SDK {sdk} (neuronx-cc {RELEASES[sdk].neuronx_cc}), and the "
        "steps refuse the image if it has something else. Record it with `trainyard toolchain` to "
        "let bundles outlive the image's name.",
    )
