"""What code compiled for a Neuron device depends on besides the model: versions of packages.

Only metadata is read: importing a Neuron package can take the device, or a minute.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput, Transient
from trainyard.lanes.neuron_support import RELEASES, NeuronLaneName, same_version
from trainyard.neuron_packages import check_installed

_TIMEOUT_S = 60.0

_ASK_PYTHON = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
names = sys.argv[1:]
found = {}
for name in names:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps({
    "path": sys.path,
    "machine": platform.machine(),
    "python": ".".join(platform.python_version_tuple()[:2]),
    "packages": found,
}))
"""

FRAMEWORKS = ("libtorch-neuronx-lite", "torch-neuronx")
"""The lowering of the native plugin is in the first from SDK 2.32 on, before in the second."""

_ALWAYS = ("neuronx-cc", "torch", "vllm", "vllm-neuron")
_NEEDED: dict[NeuronLaneName, tuple[str, ...]] = {
    "neuron-native": _ALWAYS,
    "neuron-nxdi": (
        *_ALWAYS,
        "torch-neuronx",
        "neuronx-distributed",
        "neuronx-distributed-inference",
    ),
}
_ALSO = (*FRAMEWORKS, "libneuronxla", "nki", "torch-xla", "transformers")
"""Recorded where they are installed: each takes part in tracing or lowering."""

_HINT = (
    "Compile and serve in the target's image (`neuron.image`), or set TRAINYARD_SERVE_PYTHON to a "
    "Python that has AWS's packages."
)


def read_neuron_toolchain(python: Path, lane: NeuronLaneName) -> dict[str, str]:
    """Return the versions of everything that takes part in compiling, by package.

    Args:
        python: the serving interpreter.
        lane: says which packages must be there.

    Raises:
        BadInput: a package is missing or is a placeholder from the public registry.
        Transient: the interpreter did not answer in time.
    """
    needed = _NEEDED[lane]
    answer = _ask(python, sorted({*needed, *_ALSO}))
    packages: dict[str, str] = answer["packages"]
    missing = [name for name in needed if name not in packages]
    if not any(name in packages for name in FRAMEWORKS):
        missing.append(" or ".join(FRAMEWORKS))
    if missing:
        raise BadInput(
            f"Lane {lane} cannot run here: the serving environment ({python}) lacks "
            f"{', '.join(missing)}.",
            hint=_HINT,
        )
    placeholders = check_installed([folder for folder in answer["path"] if folder])
    if placeholders:
        raise BadInput(" ".join(str(problem) for problem in placeholders), hint=_HINT)
    return {"machine": answer["machine"], "python": answer["python"], **packages}


def mismatches(sdk: str, lane: NeuronLaneName, toolchain: Mapping[str, str]) -> Sequence[str]:
    """Return where a toolchain is not that of an SDK, each as sentences; none for unknown SDKs."""
    release = RELEASES.get(sdk)
    if release is None:
        return ()
    wanted = {"neuronx-cc": release.neuronx_cc, "nki": release.nki}
    if lane == "neuron-native":
        # `<vLLM>.<plugin>`: whether the plugin's own metadata has the long form is not published.
        wanted["vllm"] = ".".join(release.native_plugin.split(".")[:3])
    else:
        wanted["neuronx-distributed-inference"] = release.nxdi
        wanted["vllm"] = release.nxdi_vllm
    return tuple(
        f"SDK {sdk} has {name} {version}, the serving environment has {toolchain[name]}. "
        f"Correct neuron.sdk, or use the image of that SDK."
        for name, version in wanted.items()
        if version and name in toolchain and not same_version(version, toolchain[name])
    )


def toolchain_of_image(image: str, sdk: str, lane: NeuronLaneName) -> dict[str, str]:
    """Return what the table of SDK releases says of an image that nobody has asked yet.

    It names the image as well, which stands for the packages that the table leaves out: no other
    image has the same compile keys. Empty if the table knows too little.
    """
    release = RELEASES.get(sdk)
    if release is None or not release.neuronx_cc:
        return {}
    if lane == "neuron-native":
        lanes_own = {"vllm-neuron": release.native_plugin}
    else:
        lanes_own = {
            "neuronx-distributed-inference": release.nxdi,
            "vllm": release.nxdi_vllm,
        }
    known = {"neuronx-cc": release.neuronx_cc, "nki": release.nki, **lanes_own}
    return {"image": image, **{name: version for name, version in known.items() if version}}


def differences(planned: Mapping[str, str], now: Mapping[str, str], image: str) -> list[str]:
    """Return where a toolchain is not the planned one, each as `name planned -> now`.

    Args:
        planned: as recorded in the image, or of `toolchain_of_image`: then versions are compared as
            far as the table knows them.
        now: as read in the running image.
        image: that this process runs in; empty if nobody said.
    """
    if "image" not in planned:
        return [
            f"{name} {planned.get(name, 'absent')} -> {now.get(name, 'absent')}"
            for name in sorted(planned.keys() | now.keys())
            if planned.get(name) != now.get(name)
        ]
    found = {**now, "image": image}
    return [
        f"{name} {version} -> {found.get(name) or 'absent'}"
        for name, version in sorted(planned.items())
        if not (
            found.get(name) == version
            or (name != "image" and name in found and same_version(version, found[name]))
        )
    ]


def _ask(python: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _ASK_PYTHON, *names],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Transient(f"{python} did not answer within {_TIMEOUT_S:.0f} s.") from error
    except OSError as error:
        raise BadInput(
            f"The serving environment's Python ({python}) cannot be run: {error.strerror}.",
            hint=_HINT,
        ) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(
            f"The serving environment's Python ({python}) cannot be run: {said}", hint=_HINT
        ) from error
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
