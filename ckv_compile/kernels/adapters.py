"""What is added to a projection beside its weight: LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Each is the product of its matrices, [in, out] and first to last, times all its factors.
Adapters = Sequence[tuple[Sequence[Tensor], Sequence[Any]]]


def with_adapters(weight: Tensor, in_out: bool, adapters: Adapters) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.with_adapters`, traceable.

    Args:
        weight: ``[E, H*Dv]``, or ``[H*Dv, E]`` if ``in_out``.
        adapters: numbers may be SymFloats.

    Returns:
        The sum, laid out like ``weight``: float32, or the weight itself if there is none to add.
    """
    for matrices, factors in adapters:
        product = matrices[0].float()
        for matrix in matrices[1:]:
            product = product @ matrix.float()
        for factor in factors:
            product = product * factor
        weight = weight.float() + (product if in_out else product.t())
    return weight
