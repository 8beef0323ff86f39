"""What a target asks of compiled code, as far as the code itself tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainyard.errors import CorruptFile
from trainyard.lanes import neff
from trainyard.lanes.neuron_common import lnc_of, platform_target, settings_of, world_size
from trainyard.spec.model import Target
from trainyard.spec.neuron import NxdiSettings


@dataclass(frozen=True)
class Expected:
    """What compiled code must be made for; what is None or empty is not compared."""

    platform_target: str = ""
    """The compiler's `--target`, such as `trn2`."""
    lnc: int | None = None
    """Physical cores in one logical core."""
    cores: int | None = None
    """Logical cores that one replica spans."""
    neuron_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of NxD Inference's `neuron_config.json` that were asked for."""


ANYTHING = Expected()
"""Nothing is compared."""


def neff_defect(path: Path, expected: Expected) -> str:
    """Return why a NEFF cannot be used, without a final stop; empty if it can.

    The whole file is read: it is damaged, or made for something else than expected.
    """
    return _defect(path, expected, neff.read_neff)


def header_defect(path: Path, expected: Expected) -> str:
    """As `neff_defect`, but only the header is read."""
    return _defect(path, expected, neff.read_header)


def _defect(path: Path, expected: Expected, read: Callable[..., neff.NeffHeader]) -> str:
    try:
        header = read(path, name=path.name)
    except CorruptFile as error:
        return error.message.rstrip(".")
    problems = neff.check_against(header, lnc=expected.lnc, cores=expected.cores)
    return " ".join(problems).rstrip(".")


def expected_of(target: Target | None) -> Expected:
    """Return what `target`, one of a Neuron lane, asks of compiled code; `ANYTHING` for no target.

    Raises BadInput: it has no Neuron device, or no `neuron` settings.
    """
    if target is None:
        return ANYTHING
    return Expected(
        platform_target=platform_target(target),
        lnc=lnc_of(target),
        cores=world_size(target),
        neuron_config=MappingProxyType(_neuron_config(target)),
    )


def _neuron_config(target: Target) -> dict[str, Any]:
    """Return the fields that vLLM's plugin for NxD Inference makes of a target."""
    asked: dict[str, Any] = {
        "tp_degree": target.tensor_parallel_size,
        "batch_size": target.max_num_seqs,
        "seq_len": target.max_model_len,
        "torch_dtype": target.dtype,
        "is_prefix_caching": target.enable_prefix_caching,
        "is_block_kv_layout": target.enable_prefix_caching,
        "logical_nc_config": lnc_of(target),
        **_overrides(target.nxdi or NxdiSettings()),
    }
    if asked["is_block_kv_layout"]:
        # With prefix caching or without: the shape of the KV cache is compiled in.
        asked.setdefault("pa_block_size", target.block_size)
        asked.setdefault("pa_num_blocks", settings_of(target).num_gpu_blocks)
    return {name: value for name, value in asked.items() if value is not None}


def _overrides(nxdi: NxdiSettings) -> dict[str, Any]:
    """Return what a target sets in NxD Inference's configuration by name."""
    typed = nxdi.override_neuron_config.model_dump(mode="json", exclude_none=True)
    return {**nxdi.extra_neuron_config, **typed}
