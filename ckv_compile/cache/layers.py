"""One layer of a cache: what it holds, where, and how many tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..sizes import number_of, sized, varies
from .packed import PackedKV

# A buffer grows by this many tokens at least: what it holds is copied once in so many steps.
_BLOCK = 128


class EvictedLayer(DynamicLayer):
    """A dense cache layer ``[B, Hkv, K, D]`` that remembers its logical length.

    After an eviction it holds fewer entries than it has seen tokens: ``get_seq_length`` and all
    positions count the tokens, ``get_mask_sizes`` gives what is held and where it stands, as
    transformers' sliding-window layers do. Kept entries stay in temporal order.

    New tokens are written in place behind those held: the tensors are longer than that, by blocks,
    and ``reserve`` lengthens them between two calls. ``keys`` and ``values`` are the part in use.
    """

    def __init__(self, **_: Any) -> None:
        # Any for Tensor or None: None before the first call alone.
        self._keys: Any = None
        self._values: Any = None
        # Entries in use of a longer buffer, see ``sized``; None where all of it is.
        self.count: Tensor | None = None
        super().__init__()
        # Tokens seen and not held, see ``sized``.
        self.gap: Tensor | None = None
        # [B, kept] bool, False where a shorter row of a padded batch keeps fewer entries.
        self.valid: Tensor | None = None
        # [B, Hkv, kept] int64, where the kept entries of the prompt stood; None where no bias asks.
        self.positions: Tensor | None = None
        # What is kept of the prompt, if its heads keep different numbers of entries; then ``keys``
        # and ``values`` are its last two tokens and those since, and ``gap`` counts the others.
        self.packed: PackedKV | None = None
        # Entries of it per head, on average over all layers, in the fullest row.
        self.spread = 0
        # The same as the call leaves it, see ``settle_packed``.
        self.packing: tuple[Tensor, ...] | None = None
        # Of heads with policies: the attention that the tail's first tokens have had, [B, Hkv, 2],
        # the policies [B, Hkv] and the tokens that each row has seen [B]; and, where policies are
        # to be applied, the kinds of the tail's tokens, [B, t] int8.
        self.profile: tuple[Tensor, ...] = ()
        self.kinds: Tensor | None = None
        # Whether the last queries are to be kept, and those, ``[B, H, W, D]``: they score the
        # entries when a long generation is cut.
        self.watched = False
        self.recent: Tensor | None = None
        # Entries before the observation window: here tokens are missing in between.
        self.thinned = 0
        self.prompt_len = 0
        # Whether the prompt is over: no later tokens are a piece of it; see ``in_prompt``.
        self.complete = False
        # Whether tokens may be taken back, as in assisted decoding: they are no piece of a prompt.
        self.record_past = False
        # What an optimised model's running call does: "append", or "cut", for which the pass needs
        # new tensors. "" outside of one: whoever calls then knows nothing of slots and gaps.
        self.call = ""
        # What that call is to keep, if it cuts; see ``update``.
        self.plan: Any = None

    @property
    def keys(self) -> Any:
        """Keys held, ``[B, Hkv, K, D]``, a view of the buffer; None before the first call."""
        return self._in_use(self._keys)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys, self.count = tensor, None

    @property
    def values(self) -> Any:
        """Values held, as ``keys``."""
        return self._in_use(self._values)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values = tensor

    def _in_use(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None or self.count is None:
            return buffer
        return buffer[:, :, : number_of(self.count)]

    @property
    def held(self) -> int:
        """Entries held."""
        return self._held()

    def _held(self) -> int:
        if self._keys is None:
            return 0
        return self._keys.shape[-2] if self.count is None else number_of(self.count)

    @property
    def evicted(self) -> int:
        """Tokens seen and no longer held."""
        return 0 if self.gap is None else number_of(self.gap)

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.held + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call attends to, and the position of the first of them."""
        return self.held + query_length, self.evicted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, Hkv, Q, D]``; returns all that attention is to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # In this order: a compiled call must not guard on how many slots there are.
        if not self.call and (self.valid is not None or self.packed is not None):
            raise RuntimeError(
                "this cache holds the cut rows of a padded batch, or heads of different lengths, "
                "which only the optimised model can read; call it after "
                "ckv_compile.optimize(model), in eval mode and under torch.no_grad()"
            )
        # Here, beside the attention, and not only at the model's entrance: a graph that begins
        # behind a graph break of the model's own must know the budget too.
        plan = self.plan
        if plan is not None and plan.tokens.shape[1] != key_states.shape[-2]:
            plan = None
        if self._keys is None:
            # Copied: they may be views of a projection of Q, K and V in one.
            self._keys = key_states.clone(memory_format=torch.contiguous_format)
            self._values = value_states.clone(memory_format=torch.contiguous_format)
            if plan is not None:
                self.positions = plan.mark(self._keys)
                self._ask_for_packing(plan, self._keys, self._values)
            self._watch(self._keys)
            return self._keys, self._values
        if plan is not None:
            plan.mark()
        keys, values = self._append(key_states, value_states)
        if plan is not None:
            self._ask_for_packing(plan, keys, values)
        self._mark_positions(keys)
        self._watch(keys)
        if self.packed is not None:
            packed = self.packed
            torch.ops.ckv_compile.prefix(keys, packed.keys, packed.values, packed.cu_kv_lens)
        return keys, values

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.count is not None and self.call != "cut":
            start = number_of(self.count)
            end = start + key_states.shape[-2]
            if end <= self._keys.shape[-2]:
                self._keys[:, :, start:end] = key_states
                self._values[:, :, start:end] = value_states
                self.count = sized(end, self.count.device)
                return self.keys, self.values
        keys, values = self.keys, self.values
        self.count = None
        self._keys = torch.cat([keys, key_states], dim=-2)
        self._values = torch.cat([values, value_states], dim=-2)
        return self._keys, self._values

    def _ask_for_packing(self, plan: Any, keys: Tensor, values: Tensor) -> None:
        """Ask the pass for what is left of these, in packed form, if heads are to differ."""
        if plan.total is None:
            return
        if plan.kinds is None:
            self.packing = torch.ops.ckv_compile.packed(keys, values, plan.total)
            return
        before: list[Tensor] = []
        if self.packed is not None:
            packed = self.packed
            before = [packed.keys, packed.values, packed.cu_kv_lens, *packed.beside, *self.profile]
        self.packing = torch.ops.ckv_compile.profiled(keys, values, plan.kinds, before)

    def _watch(self, keys: Tensor) -> None:
        """Ask the pass for the last queries."""
        if self.watched and self.call:
            self.recent = torch.ops.ckv_compile.recent(keys, self.recent)

    def _mark_positions(self, keys: Tensor) -> None:
        """Tell the pass where the entries stand, if a bias asks for it."""
        if self.positions is None:
            return
        batch, heads, kept = self.positions.shape
        tail = torch.arange(kept, keys.shape[-2], device=keys.device) + self.evicted
        tail = tail.expand(batch, heads, -1)
        torch.ops.ckv_compile.positions(
            keys, torch.cat([self.positions, tail], dim=-1), keys.shape[-2] + self.evicted
        )

    def reserve(self, q_len: int) -> None:
        """Make room for ``q_len`` more tokens: inside a graph that would copy at every step."""
        if self._keys is None:
            return
        # One slot more: the part in use of a full buffer is contiguous, and a graph that was traced
        # where it was not would be compiled anew.
        needed = self.held + q_len + 1
        if self.count is None or needed > self._keys.shape[-2]:
            self._grow(-(-needed // _BLOCK) * _BLOCK)

    def _grow(self, length: int) -> None:
        held = self.held
        self._keys, self._values = (
            _lengthened(buffer, held, length) for buffer in (self._keys, self._values)
        )
        self.count = sized(held, self._keys.device)

    def settle(self, evicted: int, window_size: int, valid: Tensor | None) -> None:
        """Note how many tokens are gone after a prompt, and which slots its rows fill."""
        self.gap = sized(evicted, self._keys.device)
        self.valid = None if valid is None or bool(valid.all()) else valid
        if self.positions is not None and not self.positions.numel():
            self.positions = None
        self.prompt_len, self.thinned = self.held + evicted, max(self.held - window_size, 0)

    def settle_packed(self, seen: int, spread: int) -> None:
        """Note what the call has left of ``seen`` tokens, if it was packed; see ``spread``."""
        assert self.packing is not None
        keys, values, cu_kv_lens, *more = self.packing
        store, self.profile = PackedKV(keys, values, cu_kv_lens, tuple(more[:3])), tuple(more[3:])
        self.packed, self.packing = store.in_use() if self.profile else store, None
        self.gap, self.spread = sized(seen - self.held, self._keys.device), spread
        self.positions = self.valid = None
        self.prompt_len, self.thinned = seen, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: those of the observation window and those since.

        Raises:
            ValueError: it would reach further back, where tokens are missing in between; or
                ``tokens_to_remove`` is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) takes the tokens to remove as a negative number"
            )
        whole = self.held - self.thinned
        if self.evicted and -tokens_to_remove > whole:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the evicted prompt: only the last {whole} "
                f"tokens, its observation window and what came since, can be removed"
            )
        self.record_past = True
        left = max(self.held + tokens_to_remove, 0)
        if not left and self.packed is None:
            return self.reset()
        self._shorten(left)
        if self.valid is not None:
            self.valid = self.valid[:, :left]
        if self.kinds is not None:
            self.kinds = self.kinds[:, :left]
        if self.positions is not None:
            self.positions = self.positions[:, :, :left]
        self.prompt_len = min(self.prompt_len, self.get_seq_length())

    def _shorten(self, left: int) -> None:
        if self.count is None and left < self.held:
            self._keys, self._values = self._keys[:, :, :left], self._values[:, :, :left]
        elif self.count is not None:
            self.count = sized(left, self.count.device)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = self.complete = self.record_past = False
        self.gap = self.valid = self.positions = self.packed = self.packing = self.recent = None
        self.profile, self.kinds = (), None
        self.thinned = self.prompt_len = self.spread = 0

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self._keys is not None and self._keys.device != self.device:
            self._move(self.device)

    def _move(self, device: Any) -> None:
        self._replace(lambda buffer: buffer.to(device, non_blocking=True))
        if self.packed is not None:
            self.packed = self.packed.to(device)
        self.profile = tuple(part.to(device) for part in self.profile)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._on_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._on_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._on_rows(lambda rows: rows[indices])

    def _on_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.packed = self.packed.rows(change, self._keys.shape[0])
        self._replace(change)
        self.profile = tuple(change(part) for part in self.profile)
        if self.kinds is not None:
            self.kinds = change(self.kinds)
        if self.valid is not None:
            self.valid = change(self.valid)
        if self.positions is not None:
            self.positions = change(self.positions)
        if self.recent is not None and self.recent.dim() == 4:
            self.recent = change(self.recent)

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._keys is not None:
            self._keys, self._values = change(self._keys), change(self._values)

    def tensors(self) -> Iterator[Tensor]:
        """The buffers of keys and values, the packed ones behind the others."""
        if self._keys is not None:
            yield from (self._keys, self._values)
        if self.packed is not None:
            yield from (self.packed.keys, self.packed.values)

    def declare_sizes(self) -> None:
        """Tell Dynamo which sizes vary from call to call, and which never do."""
        for tensor in self.tensors():
            # Another model in the same process, with other heads, would make ours symbolic.
            dense = tensor.dim() == 4
            _mark_static(tensor, (1, 3) if dense else (1,))
            self._declare_length(tensor, 2 if dense else 0)
        for entries in () if self.packed is None else self.packed.beside:
            self._declare_length(entries, 0)
        if self.positions is not None:
            _mark_static(self.positions, (1,))
            self._declare_length(self.positions, 2)
        for size in (self.gap, self.count):
            if size is not None:
                self._declare_length(size, 0)

    def _declare_length(self, tensor: Tensor, dim: int) -> None:
        varies(tensor, dim)


def _mark_static(tensor: Any, dims: tuple[int, ...]) -> None:
    """What ``torch._dynamo.mark_static`` does, which fails while another thread compiles."""
    tensor._dynamo_static_indices = set(dims)
    tensor._has_dynamo_dim_marking = True


def _lengthened(buffer: Tensor, held: int, length: int) -> Tensor:
    longer = buffer.new_empty(*buffer.shape[:2], length, buffer.shape[3])
    longer[:, :, :held] = buffer[:, :, :held]
    return longer
