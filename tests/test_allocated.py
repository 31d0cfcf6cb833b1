"""Every method under every allocation against brute force: what each head of two layers keeps."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import projected_norm
from brute_methods import SCORES
from test_methods import EPSILON, RATIO, SLOW, TABLE, WIDTH, WINDOW, padding_of, site_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference_packed
from ckv_compile.methods.evict import ScoreKV
from ckv_compile.methods.pack import PackKV
from ckv_compile.registry import bases
from ckv_compile.sizes import TAIL, sized

LENGTHS, LAYERS, HEADS = (23, 30), 2, 2
HEAD_SCORES = [[1.0, 3.0], [0.5, 2.5]]


def rows_of(method: str, base: str) -> list[Any]:
    """The allocations that take a method; those that look at no scores are in the slow tests."""
    fair = method == "criticalkv" or method in bases()
    names = ["adakv", "cake", *(["global"] if fair else [])]
    slow = [
        pytest.param(method, base, name, marks=pytest.mark.slow) for name in ("pyramid", "headkv")
    ]
    return [*((method, base, name) for name in names), *slow]


@functools.cache
def layers_of(kv_len: int, groups: int, batch: int) -> list[tuple[Tensor, ...]]:
    """Two layers, of which the second one's attention is much flatter."""
    layers = []
    for layer in range(LAYERS):
        query, key, value, weight = site_of(kv_len + layer, groups, batch)
        parts = (part[:, :, layer:] for part in (query * 0.3**layer, key, value))
        layers.append((*parts, weight))
    return layers


@functools.cache
def scored(name: str, layer: int, kv_len: int, groups: int, padded: bool) -> Tensor:
    """``[B, Hkv, K]`` by brute force, or the norms; each row without its pads."""
    real, _ = padding_of(kv_len, padded)
    site = layers_of(kv_len, groups, len(real))[layer]
    scores = torch.zeros(len(real), HEADS, kv_len)
    for b, row in enumerate(real):
        q, k, v = (part[b].double().numpy()[:, row] for part in site[:3])
        w = site[3].double().numpy()
        if name == "norm":
            found = projected_norm(v[None], w, False, len(q), "l1")[0]
        else:
            found = SCORES[name](q, k, v, w, WINDOW, WIDTH)
        scores[b][:, torch.from_numpy(row)] = torch.from_numpy(found).float()
    return scores


def expected(config: EvictionConfig, kv_len: int, groups: int, padded: bool) -> list[Tensor]:
    """The keys that each head of each layer and row keeps, in that order."""
    real, budgets = padding_of(kv_len, padded)
    mask = torch.from_numpy(real)
    critical = config.method == "criticalkv"
    where = [(i, kv_len, groups, padded) for i in range(LAYERS)]
    scores = [scored(config.base if critical else config.method, *one) for one in where]
    norms = [scored("norm", *one) for one in where] if critical else []
    layers = layers_of(kv_len, groups, len(real))
    asked = [
        reference_packed.layer_preference(query, key, None, WINDOW, mask)
        for query, key, _, _ in layers
    ]
    shared = reference_packed.head_budgets(
        scores, torch.tensor(budgets), WINDOW, mask, config.allocation, config.safeguard,
        [score for row in HEAD_SCORES for score in row], torch.stack(asked, 1),
    )  # fmt: skip
    assert int(sum(layer.sum() for layer in shared)) == LAYERS * HEADS * sum(budgets)
    keys, values = ([layer[part] for layer in layers] for part in (1, 2))
    kept, _, starts = reference_packed.pack(
        keys, values, scores, norms, shared, WINDOW, RATIO, EPSILON, mask
    )
    return [kept[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def kept_by(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same of what the node returns: the packed keys of each head, and its tail."""
    packed, _, *rest = outputs
    found = []
    for i in range(LAYERS):
        starts, tail = rest[3 * i], rest[3 * i + 1].flatten(0, 1)
        for slot in range(len(starts) - 1):
            found.append(torch.cat([packed[starts[slot] : starts[slot + 1]], tail[slot]]))
    return found


def check(method: str, base: str, allocation: str, groups: int, *, compiles: bool) -> None:
    """Whole batches and padded ones, as they are or compiled, at two lengths."""
    scores = {"head_scores": HEAD_SCORES} if allocation == "headkv" else {}
    config = EvictionConfig(
        method=method, base=base, window_size=WINDOW, kernel_size=WIDTH, epsilon=EPSILON,
        first_stage_ratio=RATIO, allocation=allocation, **scores,
    )  # fmt: skip
    score, pack = ScoreKV(config, in_out=False), PackKV(config)

    def cut(layers: Any, capacity: Tensor, total: Tensor, real: Any, budgets: Any) -> Any:
        parts = []
        for layer in layers:
            own = {"expected": layer[0].flip(-1)} if config.reads_rotation else {}
            parts.append(score(*layer, None, real, **own))
        more = {"preferences": tuple(p[-1] for p in parts)} if config.weighs_layers else {}
        norms = tuple(p[1] for p in parts) if method == "criticalkv" else ()
        keys, values = (tuple(layer[at] for layer in layers) for at in (1, 2))
        given = (keys, values, tuple(p[0] for p in parts), norms, capacity, total)
        return pack(*given, real, budgets, **more)

    for padded in (False, True):
        counter = CompileCounterWithBackend("aot_eager")
        run = cut
        if compiles:
            torch._dynamo.reset()
            whole = torch._dynamo.allow_in_graph(cut)
            run = torch.compile(lambda *given: whole(*given), backend=counter, dynamic=True)  # noqa: B023
        for kv_len in LENGTHS:
            real, budgets = padding_of(kv_len, padded)
            mask = torch.from_numpy(real) if padded else None
            rows = torch.tensor(budgets) if padded else None
            layers = [
                tuple(part.clone() for part in one) for one in layers_of(kv_len, groups, len(real))
            ]
            for _, key, value, _ in layers if padded else ():
                # What pads hold is anything.
                key.masked_fill_(~mask[:, None, :, None], 1e4)
                value.masked_fill_(~mask[:, None, :, None], -1e4)
            total = sized(sum(budgets) - TAIL * len(budgets), torch.device("cpu"))
            got = kept_by(run(tuple(layers), torch.empty(max(budgets)), total, mask, rows))
            for own, other in zip(got, expected(config, kv_len, groups, padded), strict=True):
                assert torch.equal(own, other)
        assert counter.frame_count == compiles


@pytest.mark.parametrize(
    ("method", "base", "allocation"), [row for one in TABLE for row in rows_of(*one)]
)
def test_the_entries_that_heads_keep(method: str, base: str, allocation: str) -> None:
    """Prevents a method whose scores an allocation cannot read, or shares out unlike its formula;
    stages that are not run inside it; and pads in either."""
    check(method, base, allocation, 3, compiles=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "base", "allocation"), [row for one in (*TABLE, *SLOW) for row in rows_of(*one)]
)
def test_the_same_compiled(method: str, base: str, allocation: str) -> None:
    """Prevents a compiler that changes it, and one graph for each length."""
    check(method, base, allocation, 3, compiles=True)


def test_what_cake_gives_differs_from_layer_to_layer() -> None:
    """Prevents a table of uniform shares, which would pass all of the above."""
    config = EvictionConfig(method="snapkv", window_size=WINDOW, allocation="cake")
    lengths = [len(one) for one in expected(config, 30, 3, True)]
    per_layer = np.array(lengths).reshape(LAYERS, 3, HEADS)
    assert (per_layer[:, :, 0] == per_layer[:, :, 1]).all()  # heads of a layer alike
    assert (per_layer[0] != per_layer[1]).all()
