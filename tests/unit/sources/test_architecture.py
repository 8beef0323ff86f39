from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.sources.architecture import (
    IDENTITY_FIELDS,
    Tensor,
    architecture_digest,
    parameters,
)

CONFIG: dict[str, Any] = {"hidden_size": 8, "text_config": {"layers": 2}, "eos_token_id": [1, 2]}
TENSORS = (Tensor("a", "BF16", (2, 3)), Tensor("b", "BF16", (4,)))


@given(st.permutations([Tensor(n, "F32", (i,)) for i, n in enumerate("abcd")]))
def test_the_order_of_tensors_does_not_matter(tensors: list[Tensor]) -> None:
    assert architecture_digest(CONFIG, tensors) == architecture_digest(CONFIG, sorted(tensors))


@pytest.mark.parametrize("field", sorted(IDENTITY_FIELDS))
def test_identity_fields_do_not_count_at_any_depth(field: str) -> None:
    named = {**CONFIG, field: "x", "text_config": {"layers": 2, field: "y"}}
    assert architecture_digest(named, TENSORS) == architecture_digest(CONFIG, TENSORS)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({**CONFIG, "hidden_size": 9}, TENSORS),
        ({**CONFIG, "text_config": {"layers": 3}}, TENSORS),
        ({**CONFIG, "eos_token_id": [2, 1]}, TENSORS),
        ({**CONFIG, "new": None}, TENSORS),
        (CONFIG, TENSORS[:1]),
        (CONFIG, (Tensor("a", "F16", (2, 3)), TENSORS[1])),
        (CONFIG, (Tensor("a", "BF16", (3, 2)), TENSORS[1])),
        (CONFIG, (Tensor("c", "BF16", (2, 3)), TENSORS[1])),
    ],
)
def test_everything_else_counts(config: dict[str, Any], tensors: tuple[Tensor, ...]) -> None:
    assert architecture_digest(config, tensors) != architecture_digest(CONFIG, TENSORS)


def test_the_old_and_the_new_name_of_the_dtype_are_one() -> None:
    old = architecture_digest({"torch_dtype": "bfloat16"}, TENSORS)
    assert old == architecture_digest({"dtype": "bfloat16"}, TENSORS)
    assert old == architecture_digest({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, TENSORS)
    assert old != architecture_digest({"dtype": "float32"}, TENSORS)


def test_parameters_counts_elements() -> None:
    assert parameters([*TENSORS, Tensor("scalar", "F32", ()), Tensor("none", "F32", (0, 5))]) == 11
