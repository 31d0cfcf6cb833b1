"""Numbers that change from call to call, as sizes: Dynamo compiles once for each plain int."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sized(number: int, device: Any = None) -> Tensor:
    """A number as the size of an empty tensor, plus 2, for Dynamo specialises the sizes 0 and 1."""
    return torch.empty(number + 2, 0, device=device)


def number_of(size: Tensor) -> Any:
    """What ``sized`` holds; a symbol where it is traced."""
    return size.shape[0] - 2


def varies(tensor: Tensor, dim: int) -> None:
    """Tell Dynamo that this size differs from call to call, so that the first does not fix it."""
    if tensor.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


# Behind packed entries the last real tokens of a prompt begin the dense tail, for a graph traced
# with a tail of 0 or 1 would be for that length alone.
TAIL = 2
