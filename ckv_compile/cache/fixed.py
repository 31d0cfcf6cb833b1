"""A layer whose tensors stay where they are while tokens are generated, as CUDA graphs need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sizes import sized
from .layers import EvictedLayer


class FixedLayer(EvictedLayer):
    """An ``EvictedLayer`` whose tensors keep address and shape while tokens are generated.

    Once the prompt is in, the buffer takes ``max_new_tokens`` more and attention reads all of it
    under a mask. How many entries are in use is a tensor, so that CUDA graphs can replay a step.
    Only an optimised model sees it so; to others it is an ``EvictedLayer``.
    """

    def __init__(self, max_new_tokens: int, **_: Any) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens
        # Entries in use and tokens evicted, int64 scalars on the device; None before the prompt.
        self.filled: Any = None
        self.shift: Any = None
        # What ``filled`` holds, known without waiting for the device.
        self.used = 0

    @property
    def is_fixed(self) -> bool:
        """Whether the running call sees all slots, the unused ones as well."""
        return self.filled is not None and self.call == "append"

    def _held(self) -> int:
        # Not a property: Dynamo does not follow super() of one.
        return super()._held() if self.filled is None else self.used

    def _in_use(self, buffer: Tensor | None) -> Tensor | None:
        if self.filled is None or buffer is None:
            return super()._in_use(buffer)
        return buffer[:, :, : self.held]

    def get_seq_length(self) -> Any:
        """Tokens seen, held or not; a tensor where a call is traced."""
        if self.is_fixed and torch.compiler.is_dynamo_compiling():
            return self.filled + self.shift
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole buffer, its slots counted from 0; see ``EvictedCache.get_query_offset``."""
        if self.is_fixed:
            return self._keys.shape[-2], 0
        return super().get_mask_sizes(query_length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_fixed:
            self._loosen()
            return super().update(key_states, value_states)
        q_len = key_states.shape[-2]
        slots = torch.arange(q_len, device=self.filled.device) + self.filled
        self.filled.add_(q_len)
        self._keys.index_copy_(2, slots, key_states)
        self._values.index_copy_(2, slots, value_states)
        self._mark_positions(self._keys)
        return self._keys, self._values

    def reserve(self, q_len: int) -> None:
        if self._keys is None:
            return
        if self.call == "cut":
            # The pass cuts at lengths, not at slots.
            self._loosen()
            return super().reserve(q_len)
        if self.filled is None:
            self._fix()
        room = self._keys.shape[-2] - self.used
        if q_len > room:
            raise ValueError(
                f"the cache is full: it has room for {room} more tokens and the call brings "
                f"{q_len}; give EvictedCache a larger max_new_tokens than {self.max_new_tokens}"
            )

    def settle(self, evicted: int, window_size: int, valid: Tensor | None) -> None:
        super().settle(evicted, window_size, valid)
        self._fix()

    def advance(self, q_len: int) -> None:
        """Count the tokens of a call that has succeeded."""
        self.used += q_len if self.filled is not None else 0

    def rewind(self) -> None:
        """Forget the tokens of a call that has failed."""
        if self.filled is not None:
            self.filled.fill_(self.used)

    def _fix(self) -> None:
        self.used = self.held
        self._grow(self.used + self.max_new_tokens)
        self.count = None
        self.filled = torch.tensor(self.used, device=self._keys.device)
        self.shift = torch.tensor(self.evicted, device=self._keys.device)
        # Unused slots are read under a mask, and zero times NaN is NaN.
        for tensor in self.tensors():
            tensor[:, :, self.used :] = 0
        for tensor in (*self.tensors(), self.filled, self.shift):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def _loosen(self) -> None:
        if self.filled is not None:
            self.count = sized(self.held, self._keys.device)
            self.filled = self.shift = None

    def _shorten(self, left: int) -> None:
        if self.filled is None:
            return super()._shorten(left)
        self.used = left
        self.filled.fill_(left)

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        before = tuple(self.tensors())
        super()._replace(change)
        if self.filled is None or not before or before[0].shape != self._keys.shape:
            return
        # The same rows in another order: the addresses stay.
        for old, new in zip(before, self.tensors(), strict=True):
            old.copy_(new)
        self._keys, self._values = before

    def reset(self) -> None:
        super().reset()
        self.filled = self.shift = None

    def _declare_length(self, tensor: Tensor, dim: int) -> None:
        if self.filled is None:
            super()._declare_length(tensor, dim)
