"""What compiles and serves the targets of a preset, as scripts that people can read and run."""

from __future__ import annotations

from pathlib import Path

from trainyard.lanes.command_text import script
from trainyard.lanes.registry import get_lane
from trainyard.presets.known import Preset

PYTHON = Path("/usr/local/bin/python3")
MODEL = Path("/var/lib/trainyard/model")
CACHE = Path("/var/lib/trainyard/cache")
PORT = 8000


def scripts(preset: Preset) -> dict[str, str]:
    """Return a bash script for each target's compile and start, by `<target>.<compile|serve>`.

    Paths stand for what the step or the pod has there.
    """
    spec = preset.spec
    found = {}
    for target in spec.targets:
        for name, cache_only in (("compile", False), ("serve", True)):
            command = get_lane(target.lane).command(
                target,
                python=PYTHON,
                model_dir=MODEL,
                cache_dir=CACHE,
                served_model_name=spec.client_model_name,
                port=PORT,
                cache_only=cache_only,
            )
            image = target.neuron.image if target.neuron else ""
            title = f"{spec.model}, target {target.name}: {name} on {target.instance} in {image}"
            found[f"{target.name}.{name}"] = script(command, title=title)
    return found
