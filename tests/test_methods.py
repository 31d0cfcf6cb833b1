"""Every method against brute force: group sizes, padded batches, as it is and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from brute_methods import SCORES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ckv_compile.config import EvictionConfig
from ckv_compile.methods.evict import EvictKV
from ckv_compile.registry import METHODS, bases

WINDOW, WIDTH, EPSILON, RATIO = 4, 3, 1e-4, 0.5
BUDGET, LENGTHS = 11, (23, 30)
TABLE = [(method, "snapkv") for method in METHODS if method != "criticalkv"]
TABLE += [("criticalkv", base) for base in ("snapkv", "h2o")]
SLOW = [("criticalkv", base) for base in bases() if base not in ("snapkv", "h2o")]


def test_the_table_is_whole() -> None:
    """Prevents a method that nothing is compared with."""
    assert set(METHODS) == {*SCORES, "criticalkv"}


def site_of(kv_len: int, groups: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and weight of two KV heads, sharp enough to tell selections apart."""
    generator = torch.Generator().manual_seed(groups + kv_len)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key = 2 * randn(batch, 2 * groups, kv_len, 8), randn(batch, 2, kv_len, 8)
    return query, key, randn(batch, 2, kv_len, 8), randn(10, 16 * groups)


def expected_keep(
    site: tuple[Tensor, ...], method: str, base: str, budget: int, real: np.ndarray
) -> list[list[int]]:
    """Kept positions of one row, ``[Hkv][budget]``, in the batch's slots."""
    *tensors, weight = (tensor.double().numpy() for tensor in site)
    q, k, v = (tensor[:, real] for tensor in tensors)
    scores = SCORES[base if method == "criticalkv" else method](q, k, v, weight, WINDOW, WIDTH)
    norm = None
    if method == "criticalkv":
        norm = brute_force.projected_norm(v[None], weight, False, len(q), "l1")
    keep = brute_force.select(scores[None], norm, budget, WINDOW, RATIO, EPSILON)[0]
    return real.nonzero()[0][keep].tolist()


def node_of(method: str, base: str) -> EvictKV:
    config = EvictionConfig(
        method=method, base=base, window_size=WINDOW, kernel_size=WIDTH, epsilon=EPSILON,
        first_stage_ratio=RATIO,
    )  # fmt: skip
    return EvictKV(config, in_out=False, from_config=False)


def compiled(node: EvictKV, backend: CompileCounterWithBackend) -> Callable[..., Any]:
    """As in a graph of ours: one call that Dynamo does not look into and AOTAutograd does."""
    torch._dynamo.reset()
    whole = torch._dynamo.allow_in_graph(
        lambda *tensors: node(*tensors[:4], None, None, *tensors[4:])
    )
    return torch.compile(lambda *tensors: whole(*tensors), backend=backend, dynamic=True)


def padding_of(kv_len: int, padded: bool) -> tuple[np.ndarray, list[int]]:
    """Which slots are real, and what rows keep: one whole, one padded left, one right."""
    if not padded:
        return np.ones((1, kv_len), dtype=bool), [BUDGET]
    real = np.ones((3, kv_len), dtype=bool)
    real[1, :6], real[2, -7:] = False, False
    return real, [BUDGET, 9, 8]


def check(method: str, base: str, groups: int, padded: bool) -> None:
    """The node, as it is and compiled, against brute force at two lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    node = node_of(method, base)
    nodes = (lambda *t: node(*t[:4], None, None, *t[4:]), compiled(node, counter))
    for kv_len in LENGTHS:
        real, budgets = padding_of(kv_len, padded)
        query, key, value, weight = site_of(kv_len, groups, len(real))
        tensors = [query, key, value, weight, torch.empty(BUDGET)]
        if padded:
            tensors += [torch.from_numpy(real), torch.tensor(budgets)]
            # What pads hold is anything.
            for cache, hostile in ((key, 1e4), (value, -1e4)):
                cache.masked_fill_(~tensors[5][:, None, :, None], hostile)
        for evict in nodes:
            kept_key, kept_value, keep = evict(*tensors)
            for b, budget in enumerate(budgets):
                site = (query[b], key[b], value[b], weight)
                slots = keep[b, :, BUDGET - budget :]
                assert slots.tolist() == expected_keep(site, method, base, budget, real[b])
                for cache, kept in ((key, kept_key), (value, kept_value)):
                    rows = cache[b].gather(1, slots[..., None].expand(-1, -1, 8))
                    assert torch.equal(kept[b, :, BUDGET - budget :], rows)
    assert counter.frame_count == 1


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("method", "base"), TABLE, ids=map("-".join, TABLE))
def test_the_entries_that_stay(method: str, base: str, groups: int, padded: bool) -> None:
    """Prevents a method that computes something else than its formula, that sees pads, that
    specialises the length, or that the compiler changes."""
    check(method, base, groups, padded)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("method", "base"), SLOW, ids=map("-".join, SLOW))
def test_criticalkv_over_the_other_bases(method: str, base: str, padded: bool) -> None:
    check(method, base, 3, padded)
