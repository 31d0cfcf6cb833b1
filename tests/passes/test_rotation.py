"""Rotations of queries: every form is the model's own steps, and what is no rotation is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import HEAD_DIM, Q_LEN, attention, captured, qkv, weight
from torch import Tensor

from ckv_compile.config import EvictionConfig
from ckv_compile.passes.match import match_sites
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.passes.rotation import rotation_of, turn_queries

Turn = Callable[[Tensor, Tensor], Tensor]  # query [B, H, Q, D], positions [Q]


def angles(positions: Tensor, size: int = HEAD_DIM // 2) -> Tensor:
    return positions[:, None].float() * 0.3 ** torch.arange(size).float()


def by_halves(q: Tensor, positions: Tensor) -> Tensor:
    both = torch.cat([angles(positions)] * 2, dim=-1)
    first, second = q[..., : HEAD_DIM // 2], q[..., HEAD_DIM // 2 :]
    return q * both.cos() + torch.cat((-second, first), dim=-1) * both.sin()


def by_pairs(q: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions).cos(), angles(positions).sin()
    first, second = q[..., ::2], q[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def in_part(q: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions, 4).cos(), angles(positions, 4).sin()
    turned, rest = q.split([8, HEAD_DIM - 8], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def scaled(q: Tensor, positions: Tensor) -> Tensor:
    """Cosines and sines whose squares do not add up to 1, and logits scaled beforehand."""
    both = angles(positions).repeat_interleave(2, dim=-1)
    cos, sin = (1.2 * both.cos()).to(q.dtype), (1.2 * both.sin()).to(q.dtype)
    across = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
    return (q * cos + across * sin) / 3.0


def captured_with(turn: Turn, dynamic: bool = True) -> Any:
    def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            turned = turn(q, torch.arange(q.shape[2]))
            return F.scaled_dot_product_attention(turned, k, v, is_causal=True)

        return attention(sdpa=sdpa)(q, k, v, w)

    return captured(forward, *qkv(), weight(), dynamic=dynamic)


@pytest.mark.parametrize(
    ("turn", "dynamic"),
    [(by_halves, True), (by_halves, False), (by_pairs, True), (in_part, True), (scaled, True)],
)
def test_the_mean_of_512_rotations(turn: Turn, dynamic: bool) -> None:
    """Prevents any other positions, and a form of rotation that is no mean of rotations."""
    gm = captured_with(turn, dynamic)
    sites, _ = match_sites(gm)
    (node,) = turn_queries(gm, sites, "prefill").values()
    (output,) = (one for one in gm.graph.nodes if one.op == "output")
    output.args = ((node,),)
    gm.graph.lint()
    gm.recompile()
    (actual,) = gm(*gm.meta["inputs"])
    query = qkv()[0]
    later = range(Q_LEN, Q_LEN + 512)
    expected = sum(turn(query, torch.full((Q_LEN,), position)) for position in later) / 512
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # Again inserts nothing.
    assert turn_queries(gm, sites, "prefill") == {}


def twice(q: Tensor, positions: Tensor) -> Tensor:
    return by_halves(by_halves(q, positions), positions)


def normed(q: Tensor, positions: Tensor) -> Tensor:
    return F.normalize(by_halves(q, positions), dim=-1)


def from_a_table(q: Tensor, positions: Tensor) -> Tensor:
    table = angles(torch.arange(64))
    both = torch.cat([table, table], dim=-1)
    first, second = q[..., : HEAD_DIM // 2], q[..., HEAD_DIM // 2 :]
    across = torch.cat((-second, first), dim=-1)
    return q * both.cos()[positions] + across * both.sin()[positions]


def every_second(q: Tensor, positions: Tensor) -> Tensor:
    return by_halves(q, positions // 2)


def of_two(q: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions).cos(), angles(positions).sin()
    first, second = q.relu()[..., ::2], q.tanh()[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def squared(q: Tensor, positions: Tensor) -> Tensor:
    both = torch.cat([angles(positions)] * 2, dim=-1)
    return q * (both.cos() * both.cos())


def by_row_and_column(q: Tensor, positions: Tensor) -> Tensor:
    both = torch.cat([angles(positions, 4), angles(positions * positions, 4)] * 2, dim=-1)
    return q * both.cos() + q.flip(-1) * both.sin()


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (lambda q, positions: q, "not seen to be made of"),
        (normed, "not seen to be made of"),
        (squared, "not seen to be made of"),
        (from_a_table, "not seen to be made of"),
        (twice, "rotated before"),
        (of_two, "made of 2 tensors"),
        (every_second, "not seen to count tokens"),
        (by_row_and_column, "tensors"),
    ],
)
def test_what_is_not_understood_is_refused(turn: Turn, reason: str) -> None:
    """Prevents a query that is turned in part, or to places that are no next positions."""
    gm = captured_with(turn)
    sites, _ = match_sites(gm)
    before = str(gm.graph)
    read = rotation_of(gm, sites[0])
    assert isinstance(read, str) and reason in read
    rewritten = rewrite(gm, EvictionConfig(0.5, "expected_attention", window_size=2))
    assert [row.reason.name for row in rewritten.rejections] == ["ROTATION"]
    assert str(gm.graph) == before and not rewritten.inserted
