"""Sizes of tiles, and what a product in a tile is computed in."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def padded(size: int) -> int:
    """The power of two that a tile of ``size`` takes; a product needs 16."""
    return max(triton.next_power_of_2(size), 16)


def in_halves(*operands: Tensor) -> bool:
    """Whether tensor cores can multiply the operands as they are, adding up in float32.

    All others are multiplied as float32, in full precision: TF32 would reorder scores.
    """
    return operands[0].dtype in _HALVES and len({operand.dtype for operand in operands}) == 1
