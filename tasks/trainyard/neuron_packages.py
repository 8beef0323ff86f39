"""Tells AWS's real Neuron packages from the empty placeholders that the public registry has.

AWS holds the names of its packages on the public registry with packages that contain nothing but an
`ImportError`. An image build that asks the wrong index gets those, succeeds, and fails at the first
compile hours later; `neuronx-cc` does not even do that, since its placeholder has no module of the
real one's name. Nothing here imports a Neuron package: that can take the device or a minute.

Run `python -m trainyard.neuron_packages` as a step of an image build. It exits with 0 if Neuron
packages are there and real, else with the exit code of `trainyard.errors.Refused`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import MappingProxyType

from trainyard.errors import Refused

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "libneuronxla": "libneuronxla",
        "libtorch-neuronx-lite": "libtorch_neuronx_lite",
        "neuronx-cc": "neuronxcc",
        "neuronx-distributed": "neuronx_distributed",
        "neuronx-distributed-inference": "neuronx_distributed_inference",
        "nki": "nki",
        "torch-neuronx": "torch_neuronx",
        "vllm-neuron": "vllm_neuron",
    }
)
"""Distribution name of every Neuron package that a lane may need, and the module it must bring."""

SMALLEST_REAL_PACKAGE_BYTES = 4096
"""The placeholders hold about 120 bytes of code; the smallest real package is far above this."""

_PLACEHOLDER_SAYS = "WRONG PACKAGE"
_WHERE_FROM = (
    "The real packages come with AWS's Neuron Deep Learning Containers, or from the AWS Neuron pip "
    "repository, which has to be named as the index. Uninstall the placeholder first."
)


@dataclass(frozen=True)
class Problem:
    """One Neuron package that is installed in name only."""

    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.distribution} {self.version} is an empty placeholder from the public registry, "
            f"not AWS's package: {self.reason}."
        )


def check_installed(path: Sequence[str] | None = None) -> list[Problem]:
    """Return the Neuron packages that are placeholders, sorted by name.

    Args:
        path: folders to look in; by default those that Python imports from.
    """
    where = list(sys.path if path is None else path)
    problems = []
    for name, distribution in sorted(_installed(where).items()):
        reason = _why_placeholder(distribution, MODULES[name], where)
        if reason is not None:
            problems.append(Problem(name, distribution.version, reason))
    return problems


def require_real(path: Sequence[str] | None = None) -> list[str]:
    """Return the installed Neuron packages as `name version`, if all of them are real.

    Raises:
        Refused: one of them is a placeholder, or none is installed at all.
    """
    problems = check_installed(path)
    if problems:
        raise Refused(" ".join(str(problem) for problem in problems), hint=_WHERE_FROM)
    found = _installed(list(sys.path if path is None else path))
    if not found:
        raise Refused("No AWS Neuron package is installed in this environment.", hint=_WHERE_FROM)
    return [f"{name} {distribution.version}" for name, distribution in sorted(found.items())]


def _installed(where: list[str]) -> dict[str, Distribution]:
    """Return the Neuron packages by normal name; the first on the path counts, as for an import."""
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=where):
        if "Name" not in distribution.metadata:
            continue  # What a broken installation left behind.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name in MODULES:
            found.setdefault(name, distribution)
    return found


def _why_placeholder(distribution: Distribution, module: str, where: list[str]) -> str | None:
    if _PLACEHOLDER_SAYS in (distribution.read_text("METADATA") or ""):
        return f"its description says {_PLACEHOLDER_SAYS!r}"
    if _is_editable(distribution):
        return None  # Its files are those of a checkout, which no list here names.
    spec = PathFinder.find_spec(module, where)
    if spec is None:
        return f"it has no module {module!r}"
    if spec.has_location and _PLACEHOLDER_SAYS in _start_of(Path(spec.origin or "")):
        return f"importing {module!r} only raises an error that says {_PLACEHOLDER_SAYS!r}"
    size_bytes = _payload_bytes(distribution)
    if size_bytes is not None and size_bytes < SMALLEST_REAL_PACKAGE_BYTES:
        return f"all its files together have {size_bytes} bytes"
    return None


def _is_editable(distribution: Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _start_of(source: Path) -> str:
    if source.suffix != ".py" or not source.is_file():
        return ""
    with source.open(encoding="utf-8", errors="replace") as file:
        return file.read(SMALLEST_REAL_PACKAGE_BYTES)


def _payload_bytes(distribution: Distribution) -> int | None:
    """Return the size of the files outside the metadata; None where no list of files is kept."""
    files = distribution.files
    if files is None:
        return None
    return sum(file.size or 0 for file in files if not file.parts[0].endswith(".dist-info"))


def main() -> int:
    """Report on this environment's Neuron packages and return the exit code."""
    try:
        packages = require_real()
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.exit_code
    print("\n".join(packages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
