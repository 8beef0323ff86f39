"""What a target asks of compiled code, as far as the code itself tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainyard.errors import CorruptFile
from trainyard.lanes import neff
from trainyard.spec.model import Target

_NEURON_FAMILIES = ("inf2", "trn1", "trn2", "trn3")

_DEFAULT_LNC = {"inf2": 1, "trn1": 1, "trn2": 2, "trn3": 2}
"""Physical cores in one logical core, where nobody says otherwise."""


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
    try:
        header = neff.read_neff(path, name=path.name)
    except CorruptFile as error:
        return error.message.rstrip(".")
    problems = neff.check_against(header, lnc=expected.lnc, cores=expected.cores)
    return " ".join(problems).rstrip(".")


def expected_of(target: Target | None) -> Expected:
    """Return what `target` asks of compiled code; `ANYTHING` for no target.

    Settings that only Neuron targets have (`neuron`, `nxdi`) are taken where a target has them.
    """
    if target is None:
        return ANYTHING
    family = next((name for name in _NEURON_FAMILIES if target.instance.startswith(name)), "")
    neuron, nxdi = getattr(target, "neuron", None), getattr(target, "nxdi", None)
    lnc = getattr(neuron, "lnc", None) or _DEFAULT_LNC.get(family)
    overrides = _overrides(nxdi)
    return Expected(
        platform_target=family,
        lnc=lnc,
        cores=target.tensor_parallel_size
        * int(getattr(neuron, "data_parallel_size", 1))
        * int(overrides.get("pp_degree", 1)),
        neuron_config=MappingProxyType(_neuron_config(target, neuron, lnc) | overrides),
    )


def _overrides(nxdi: Any) -> dict[str, Any]:
    """Return what a target sets in NxD Inference's configuration by name."""
    if nxdi is None:
        return {}
    typed: dict[str, Any] = nxdi.override_neuron_config.model_dump(mode="json", exclude_none=True)
    return {**nxdi.extra_neuron_config, **typed}


def _neuron_config(target: Target, neuron: Any, lnc: int | None) -> dict[str, Any]:
    """Return the fields that vLLM's plugin for NxD Inference makes of a target by itself."""
    asked: dict[str, Any] = {
        "tp_degree": target.tensor_parallel_size,
        "batch_size": target.max_num_seqs,
        "seq_len": target.max_model_len,
        "torch_dtype": target.dtype,
        "is_prefix_caching": target.enable_prefix_caching,
        "is_block_kv_layout": target.enable_prefix_caching,
    }
    if target.enable_prefix_caching:
        asked["pa_block_size"] = target.block_size
        asked["pa_num_blocks"] = getattr(neuron, "num_gpu_blocks", None)
    asked["logical_nc_config"] = lnc
    return {name: value for name, value in asked.items() if value is not None}
