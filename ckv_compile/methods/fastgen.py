"""FastGen (arXiv 2310.01801): each head keeps what the cheapest sufficient policy keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import exact_share
from ..kernels.attention_rows import attention_rows
from ..kernels.select import best, sort_keys
from ..policies import POLICIES, PUNCTUATION, SPECIAL
from ..sizes import TAIL
from .base import real_columns
from .pack import tail_of

# Of the tokens seen: as many stay for the attention they have had, and as many of the last ones.
FREQUENT = LOCAL = exact_share(0.3)

# K and V [T, *] and where the heads begin, as of ``PackKV``. Of each entry the attention it has had
# [T] float32, its token's kind [T] int8 and rank in its row [T] int32. The attention that the tail
# has had [B, Hkv, 2], the policies [B, Hkv] int8 and the tokens that the rows have seen [B] int64.
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FastGen(nn.Module):
    """``ckv_fastgen_i`` in the graph: choose the heads' policies on a prompt, or apply them again.

    The profile and the policies are the paper's: the mean over queries of the mass on the kept keys
    is, for a fixed set of keys, the sum of the columns of attention divided by the queries. Ours:
    heads of a group are averaged; columns are sums, not divided by how many queries see a key; the
    last two tokens stay under every policy; shares of n are rounded down.
    """

    from_config = False  # nothing is counted

    def __init__(self, recovery: float) -> None:
        super().__init__()
        self.recovery = recovery

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Any,
        padding: Tensor | None,
        gap: Tensor | None,
        kinds: Tensor,
        before: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The ``State`` that is left of ``[B, Hkv, K, *]``, and the last tokens of K and V apart.

        Args:
            query: ``[B, H, Q, D]``, of the last Q keys: those whose attention is not yet counted.
            padding, gap: as of ``PackKV``.
            kinds: of the tokens ``[B, K]``.
            before: the ``State`` of an earlier call, none for a prompt.
        """
        real = real_columns(padding, gap, key.shape[2])
        state = torch.ops.ckv_compile.fastgen(
            query, key, value, scale, real, kinds, list(before), self.recovery
        )
        return *state, tail_of(key, real), tail_of(value, real)

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"recovery={self.recovery}"


def kept_by(policy: int, mass: Tensor, kinds: Tensor, ranks: Tensor, seen: int) -> Tensor:
    """What of a head's entries stays, ``[N]`` bool.

    Args:
        policy: position in ``POLICIES``.
        mass: the attention that each entry has had, ``[N]``; of equals the later one is frequent.
        kinds, ranks: of the entries' tokens, in order.
        seen: tokens that the row has seen.
    """
    kept = kinds == SPECIAL
    if policy >= 1:
        kept = kept | (kinds == PUNCTUATION)
    if policy >= 2:
        nothing = torch.zeros_like(kept)
        keys = sort_keys(mass, nothing, ~nothing, torch.arange(len(mass), device=mass.device))
        count = min(seen * FREQUENT.numerator // FREQUENT.denominator, len(mass))
        kept = kept | best(keys, torch.tensor(count, device=mass.device))
    if policy >= 3:
        kept = kept | (ranks >= seen - seen * LOCAL.numerator // LOCAL.denominator)
    if policy >= 4:
        kept = torch.ones_like(kept)
    return kept | (ranks >= seen - TAIL)


def policy_for(
    mass: Tensor, kinds: Tensor, ranks: Tensor, seen: int, recovery: float
) -> tuple[int, Tensor]:
    """The first policy whose entries have had ``recovery`` of the attention, and those."""
    for policy in range(len(POLICIES) - 1):
        kept = kept_by(policy, mass, kinds, ranks, seen)
        if float(mass[kept].sum()) >= recovery * seen:
            return policy, kept
    return len(POLICIES) - 1, torch.ones_like(kinds, dtype=torch.bool)


# Opaque to the compiler: how much stays is known only when it runs. What is handed on is as long as
# if everything stayed; the cache cuts off what is not in use.
@torch.library.custom_op("ckv_compile::fastgen", mutates_args=())
def _fastgen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    real: Tensor | None,
    kinds: Tensor,
    before: list[Tensor],
    recovery: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, kv_heads, length, _ = key.shape
    groups, new = query.shape[1] // kv_heads, not before
    old = before or _nothing(key, value)
    policies, seen = old[7].clone(), old[8].clone()
    out = _room(key, value, len(old[0]) + batch * kv_heads * length)
    tail_mass = key.new_zeros((batch, kv_heads, TAIL), dtype=torch.float32)
    starts, ends = old[2].tolist(), [0]
    for b in range(batch):
        own = torch.arange(length, device=key.device)
        own = own if real is None else own[real[b]]
        seen[b] += len(own) if new else len(own) - TAIL
        n = int(seen[b])
        ranks = (torch.arange(len(own), device=key.device) + n - len(own)).int()
        for h in range(kv_heads):
            part = slice(*starts[b * kv_heads + h : b * kv_heads + h + 2])
            rows = attention_rows(
                query[b : b + 1, h * groups : (h + 1) * groups],
                torch.cat([old[0][part], key[b, h]])[None, None],
                None, scale, 0, None, "sum",
                real=None if real is None else _behind(part, real[b])[None],
            )[0].mean(0)  # fmt: skip
            packed = part.stop - part.start
            had = F.pad(old[6][b, h], (0, length - TAIL))[own]
            entries = (
                torch.cat([old[0][part], key[b, h, own]]),
                torch.cat([old[1][part], value[b, h, own]]),
                torch.cat([old[3][part], had]) + torch.cat([rows[:packed], rows[packed:][own]]),
                torch.cat([old[4][part], kinds[b, own]]),
                torch.cat([old[5][part], ranks]),
            )
            if new:
                policies[b, h], kept = policy_for(*entries[2:], n, recovery)
            else:
                kept = kept_by(int(policies[b, h]), *entries[2:], n)
            tail_mass[b, h] = entries[2][-TAIL:]
            places = kept[:-TAIL].nonzero()[:, 0]
            ends.append(ends[-1] + len(places))
            for room, entry in zip(out, entries, strict=True):
                room[ends[-2] : ends[-1]] = entry[places]
    cu_kv_lens = torch.tensor(ends, dtype=torch.int32, device=key.device)
    return out[0], out[1], cu_kv_lens, out[2], out[3], out[4], tail_mass, policies, seen


@_fastgen.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    real: Tensor | None,
    kinds: Tensor,
    before: list[Tensor],
    recovery: float,
) -> State:
    return fake_state(key, value, before[0].shape[0] if before else 0)


def fake_state(key: Tensor, value: Tensor, packed: Any) -> State:
    """A ``State`` as the op hands it on, its numbers unset."""
    batch, kv_heads, length, _ = key.shape
    room = _room(key, value, packed + batch * kv_heads * length)
    return (
        room[0],
        room[1],
        key.new_empty(batch * kv_heads + 1, dtype=torch.int32),
        *room[2:],
        key.new_empty((batch, kv_heads, TAIL), dtype=torch.float32),
        key.new_empty((batch, kv_heads), dtype=torch.int8),
        key.new_empty(batch, dtype=torch.int64),
    )


def _room(key: Tensor, value: Tensor, length: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        key.new_empty(length, key.shape[3]),
        value.new_empty(length, value.shape[3]),
        key.new_empty(length, dtype=torch.float32),
        key.new_empty(length, dtype=torch.int8),
        key.new_empty(length, dtype=torch.int32),
    )


def _nothing(key: Tensor, value: Tensor) -> State:
    """The state before a prompt."""
    room, (batch, kv_heads) = _room(key, value, 0), key.shape[:2]
    return (
        room[0],
        room[1],
        key.new_zeros(batch * kv_heads + 1, dtype=torch.int32),
        *room[2:],
        key.new_zeros((batch, kv_heads, TAIL), dtype=torch.float32),
        key.new_zeros((batch, kv_heads), dtype=torch.int8),
        key.new_zeros(batch, dtype=torch.int64),
    )


def _behind(part: slice, real: Tensor) -> Tensor:
    """The real ones of a head's packed entries, which all are, and of the tail ``[K]``."""
    return torch.cat([real.new_ones(part.stop - part.start), real])
