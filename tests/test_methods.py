"""Every method against brute force: group sizes, padded batches, as it is and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import eager
import numpy as np
import pytest
import torch
from brute_methods import SCORES, kept_positions
from families import generated, prompt, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ckv_compile
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
    cut = [tensor[:, real] for tensor in tensors]
    keep = kept_positions(method, base, *cut, weight, WINDOW, WIDTH, budget, RATIO, EPSILON)
    return real.nonzero()[0][keep].tolist()


def node_of(method: str, base: str) -> EvictKV:
    config = EvictionConfig(
        method=method, base=base, window_size=WINDOW, kernel_size=WIDTH, epsilon=EPSILON,
        first_stage_ratio=RATIO,
    )  # fmt: skip
    return EvictKV(config, in_out=False, from_config=False)


def evicted(node: EvictKV, *tensors: Tensor) -> Any:
    """What the node makes of query, key, value, weight and what counts them."""
    more = {"expected": tensors[0].flip(-1)} if node.config.reads_rotation else {}
    return node(*tensors[:4], None, None, *tensors[4:], **more)


def compiled(node: EvictKV, backend: CompileCounterWithBackend) -> Callable[..., Any]:
    """As in a graph of ours: one call that Dynamo does not look into and AOTAutograd does."""
    torch._dynamo.reset()
    whole = torch._dynamo.allow_in_graph(lambda *tensors: evicted(node, *tensors))
    return torch.compile(lambda *tensors: whole(*tensors), backend=backend, dynamic=True)


def padding_of(kv_len: int, padded: bool) -> tuple[np.ndarray, list[int]]:
    """Which slots are real, and what rows keep: one whole, one padded left, one right."""
    if not padded:
        return np.ones((1, kv_len), dtype=bool), [BUDGET]
    real = np.ones((3, kv_len), dtype=bool)
    real[1, :6], real[2, -7:] = False, False
    return real, [BUDGET, 9, 8]


def check(method: str, base: str, groups: int, padded: bool, *, compiles: bool) -> None:
    """The node, as it is and compiled, against brute force at two lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    node = node_of(method, base)
    nodes: list[Callable[..., Any]] = [lambda *t: evicted(node, *t)]
    if compiles:
        nodes.append(compiled(node, counter))
    for kv_len in LENGTHS:
        real, budgets = padding_of(kv_len, padded)
        query, key, value, weight = site_of(kv_len, groups, len(real))
        tensors = [query, key, value, weight, torch.empty(BUDGET)]
        if padded:
            tensors += [torch.from_numpy(real), torch.tensor(budgets)]
            # What pads hold is anything.
            for cache, hostile in ((key, 1e4), (value, -1e4)):
                cache.masked_fill_(~tensors[5][:, None, :, None], hostile)
        expected = [
            expected_keep((query[b], key[b], value[b], weight), method, base, budget, real[b])
            for b, budget in enumerate(budgets)
        ]
        for evict in nodes:
            kept_key, kept_value, keep = evict(*tensors)
            for b, budget in enumerate(budgets):
                slots = keep[b, :, BUDGET - budget :]
                assert slots.tolist() == expected[b]
                for cache, kept in ((key, kept_key), (value, kept_value)):
                    rows = cache[b].gather(1, slots[..., None].expand(-1, -1, 8))
                    assert torch.equal(kept[b, :, BUDGET - budget :], rows)
    assert counter.frame_count == compiles


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("method", "base"), TABLE, ids=map("-".join, TABLE))
def test_the_entries_that_stay(method: str, base: str, groups: int, padded: bool) -> None:
    """Prevents a method that computes something else than its formula, that sees pads, that
    specialises the length, or that the compiler changes."""
    check(method, base, groups, padded, compiles=groups == 3)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("method", "base"), TABLE, ids=map("-".join, TABLE))
def test_without_groups_and_compiled(method: str, base: str, padded: bool) -> None:
    """Prevents the compiler from changing what has no groups to be averaged."""
    check(method, base, 1, padded, compiles=True)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("method", "base"), SLOW, ids=map("-".join, SLOW))
def test_criticalkv_over_the_other_bases(method: str, base: str, padded: bool) -> None:
    """Prevents stages that read the scores of another base than the one that was asked for."""
    check(method, base, 3, padded, compiles=True)


PROMPT = 26


@pytest.fixture(scope="module")
def recorded() -> tuple[Any, list[eager.Recorded]]:
    """A model, and what attention of the unmodified one reads of the prompt in each layer."""
    model = tiny(num_hidden_layers=1)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("recording")
    eager._calls.clear()
    with torch.no_grad():
        plain(input_ids=prompt(PROMPT), use_cache=True)
    return model, list(eager._calls)


# Those that read how a model rotates are in test_expected.py.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "expected_attention"])
def test_generate_leaves_these_entries(method: str, recorded: Any) -> None:
    """Prevents a method that the whole path, from the option to the cache, does not reach."""
    model, calls = recorded
    options = {"window_size": WINDOW, "kernel_size": WIDTH, "lowering": "eager"}
    ckv_compile.optimize(model, BUDGET, method=method, **options)
    cache = generated(model, prompt(PROMPT), steps=1).past_key_values
    for layer, call in zip(cache.layers, calls, strict=True):
        tensors = (call.query[0], call.key[0], call.value[0], call.module.o_proj.weight.detach())
        real = np.ones(PROMPT, dtype=bool)
        keep = torch.tensor(expected_keep(tensors, method, "snapkv", BUDGET, real))
        for kept, cached in ((layer.keys, call.key), (layer.values, call.value)):
            rows = cached[0].gather(1, keep[..., None].expand(-1, -1, cached.shape[3]))
            torch.testing.assert_close(kept[0, :, :BUDGET], rows)
