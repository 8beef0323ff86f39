"""vLLM's command line with the Neuron compiler out of reach.

    python -m trainyard.lanes.without_compiler serve [arguments of vLLM]

NxD Inference compiles again whenever it cannot load its folder, and says nothing. Here it finds
programs of the compiler's names that fail and say why, so that a start that should have used its
bundle ends instead of taking an hour.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

SHADOWED = ("neuronx-cc", "neuron-cc")
MESSAGE = "trainyard: this start may not compile, and its bundle was not used"
EXIT_CODE = 70
"""What the compiler itself ends with when it fails."""


def shadow_compiler(folder: Path) -> None:
    """Put programs of the compiler's names into `folder`, and the folder in front of the path."""
    for name in SHADOWED:
        program = folder / name
        program.write_text(
            f"#!/bin/sh\necho '{MESSAGE}: neuronx-cc was called' >&2\nexit {EXIT_CODE}\n",
            encoding="ascii",
        )
        program.chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])


def main() -> None:
    """Run vLLM's command line with the arguments of this process."""
    # In the server's own temporary folder, which goes with it.
    shadow_compiler(Path(tempfile.mkdtemp(prefix="no-compiler-")))
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
