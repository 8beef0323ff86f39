"""What a target asks of compiled code, as far as the code itself tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

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


def expected_of(target: Target | None) -> Expected:
    """Return what `target` asks of compiled code; `ANYTHING` for no target.

    A target that names an LNC of its own (`logical_nc_config`) or settings for NxD Inference
    (`override_neuron_config`) is taken at its word.
    """
    if target is None:
        return ANYTHING
    family = next((name for name in _NEURON_FAMILIES if target.instance.startswith(name)), "")
    lnc = getattr(target, "logical_nc_config", None) or _DEFAULT_LNC.get(family)
    return Expected(
        platform_target=family,
        lnc=lnc,
        cores=target.tensor_parallel_size,
        neuron_config=MappingProxyType(
            {
                **_neuron_config(target, lnc),
                **(getattr(target, "override_neuron_config", None) or {}),
            }
        ),
    )


def _neuron_config(target: Target, lnc: int | None) -> dict[str, Any]:
    """Return the fields that vLLM's plugin for NxD Inference makes of a target by itself."""
    asked: dict[str, Any] = {
        "tp_degree": target.tensor_parallel_size,
        "batch_size": target.max_num_seqs,
        "seq_len": target.max_model_len,
        "torch_dtype": target.dtype,
        "is_prefix_caching": target.enable_prefix_caching,
        "is_block_kv_layout": target.enable_prefix_caching,
    }
    if target.enable_prefix_caching and target.block_size is not None:
        asked["pa_block_size"] = target.block_size
    if lnc is not None:
        asked["logical_nc_config"] = lnc
    return asked
