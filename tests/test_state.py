"""No state outside the cache and the compiled code: threads, accidents, copies, other dtypes."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import eager
import pytest
import torch
from families import generated, prompt, tiny
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig
from ckv_compile.methods.evict import EvictKV

FIXED, ACCIDENTS = {"max_new_tokens": 60}, []  # a custom op calls and takes what is in ACCIDENTS
optimized = partial(ckv_compile.optimize, budget=0.5, lowering="eager")


@torch.no_grad()
def fed(model, cache, ids, **inputs):
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


def held_and_seen(out):
    return out.past_key_values.layers[0].keys.shape[2], out.past_key_values.get_seq_length()


@torch.library.custom_op("ckv_tests::trip", mutates_args=(), schema="(Tensor x) -> Tensor")
def trip(x):
    if ACCIDENTS:
        ACCIDENTS.pop()()
    return x.clone()


trip.register_fake(torch.empty_like)


class Trip(torch.nn.Module):
    forward = staticmethod(trip)


def armed(family="llama", **options):
    """A model that can fail in its second layer, when the first has updated the cache."""
    model = tiny(family, **options)
    second = model.model.layers[1]
    second.input_layernorm = torch.nn.Sequential(second.input_layernorm, Trip())
    return model


@pytest.fixture(scope="module")
def fragile():
    with mock.patch("ckv_compile.region.RECOMPILE_LIMIT", 200):
        return optimized(armed())


def answers(model, texts):
    outs = [generated(model, ids, 3) for ids in texts]
    return [(out.sequences.tolist(), held_and_seen(out)) for out in outs]


@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param((0.3, 0.6), marks=pytest.mark.slow, id="two models"),
        pytest.param((0.5, 0.5), id="one model"),
    ],
)
@pytest.mark.parametrize("warm", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.filterwarnings("error:ckv_compile. the recompile limit")
def test_two_threads_get_what_each_gets_alone(budgets, warm):
    """Budgets of the process or the model would mix; code of one model would serve the other."""
    texts = [[prompt(n, seed=n + i) for n in range(40, 120, 4)] for i in (0, 1)]
    alone, models = tiny(), {budget: optimized(tiny(), budget=budget) for budget in budgets}
    expected = [answers(optimized(alone, budget=b), t) for b, t in zip(budgets, texts, strict=True)]
    for model in models.values() if warm else ():
        generated(model, prompt(77), 2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answers, [models[b] for b in budgets], texts)) == expected
    assert all(ckv_compile.explain(model).graphs <= 4 for model in models.values())


@pytest.mark.parametrize("busy", ["compiling", "calling"])
def test_a_call_beside_a_busy_thread(fragile, busy):
    """Taken for a call in a traced region one would run plain; and two calls may share no plan."""
    short, long, inside, go = [prompt(60)], [prompt(90)], threading.Event(), threading.Event()
    expected = answers(fragile, short), answers(fragile, long)

    def wait(*_):
        inside.set()
        go.wait(20)
        return lambda x: (-x,)

    job = partial(torch.compile(torch.neg, backend=wait), prompt(3))
    if busy == "calling":
        job = partial(answers, fragile, long)
        ACCIDENTS.append(wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(job)
        assert inside.wait(20)
        found = answers(fragile, short)
        go.set()
    assert found == expected[0] and (busy == "compiling" or future.result() == expected[1])


def alike(cache, other):
    """Whether the layers know the same; of a buffer the part in use."""
    parts = []
    for layer in (*cache.layers, *other.layers):
        facts = {**vars(layer), "_keys": layer.keys, "_values": layer.values}
        parts.append({k: v.tolist() if torch.is_tensor(v) else v for k, v in facts.items()})
    return parts[: len(cache.layers)] == parts[len(cache.layers) :]


def check_accident(model, cache, ids, accident, **inputs):
    """A call that fails leaves the cache as it was; the call made again is as if at first."""
    before, twin = copy.deepcopy(cache), copy.deepcopy(cache)
    ACCIDENTS.append(mock.Mock(side_effect=accident("on demand")))
    with pytest.raises(accident, match="on demand"):
        fed(model, cache, ids, **inputs)
    assert alike(cache, before)
    logits = [fed(model, one, ids, **inputs) for one in (cache, twin)]
    assert torch.equal(*logits) and alike(cache, twin) and not alike(cache, before)


@pytest.mark.parametrize("accident", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="growing"), pytest.param(FIXED, id="fixed", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("seen, n, pads", [(0, 90, 0), (90, 91, 10), (40, 90, 0)])
def test_an_accident_leaves_no_trace(fragile, accident, options, seen, n, pads, monkeypatch):
    """The first layer would hold tokens that the second has not seen: all that follows is wrong."""
    cache, ids, mask = EvictedCache(**options), prompt(n, batch=2), torch.ones(2, n).long()
    mask[0, :pads] = 0
    if seen:
        fed(fragile, cache, ids[:, :seen], attention_mask=mask[:, :seen])
    if accident is KeyboardInterrupt:  # in a call that runs uncompiled
        limit = mock.Mock(side_effect=torch._dynamo.exc.FailOnRecompileLimitHit)
        monkeypatch.setattr(fragile._compiled_call_impl.region, "call", limit)
    check_accident(fragile, cache, ids[:, seen:], accident, attention_mask=mask)


def test_an_accident_leaves_no_trace_in_a_sliding_layer():
    """A bounded layer that has seen tokens which the others have not shifts its mask."""
    model, mask = optimized(armed("gemma2")), torch.ones(2, 90).long()
    mask[:, 30:40] = 0  # holes: the call runs uncompiled
    cache, ids = EvictedCache(config=model.config), prompt(90, batch=2)
    check_accident(model, cache, ids, KeyboardInterrupt, attention_mask=mask)


def test_an_accident_swallows_no_warning():
    """Whoever calls again after an error must still hear that nothing is evicted."""
    model = optimized(armed("mistral", sliding_window=16))
    ACCIDENTS.append(mock.Mock(side_effect=RuntimeError("on demand")))
    with pytest.warns(UserWarning, match="no attention was matched"):
        with pytest.raises(RuntimeError, match="on demand"):
            fed(model, None, prompt(60))
        fed(model, None, prompt(60))


WAYS = {
    "pickle": lambda thing, _: pickle.loads(pickle.dumps(thing)),
    "save": lambda thing, path: torch.save(thing, path) or torch.load(path, weights_only=False),
    "deepcopy": lambda thing, _: copy.deepcopy(thing),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_model_is_plain_and_its_own(fragile, way, tmp_path):
    """Compiled code that travels along would run on the weights and the budget of the original."""
    ids = prompt(90, batch=2)
    expected = generated(fragile, ids).sequences
    other = WAYS[way](fragile, tmp_path / "model")
    plain = generated(other, ids)
    assert held_and_seen(plain) == (95, 95) and torch.equal(
        plain.sequences, generated(tiny(), ids).sequences
    )
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    cut = generated(optimized(other, budget=0.4), ids, 1)
    assert held_and_seen(cut) == (36, 90) and torch.equal(
        cut.sequences[:, 90], 95 - expected[:, 90]
    )
    again = generated(fragile, ids)
    assert held_and_seen(again) == (45 + 5, 95) and torch.equal(again.sequences, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, FIXED], ids=["growing", "fixed"])
def test_copies_of_a_cache_go_on_apart(fragile, way, options, tmp_path):
    """Buffers are written in place: shared, one conversation would overwrite the other."""
    cache, tokens = EvictedCache(**options), prompt(5, batch=2, seed=1).split(1, dim=1)
    for piece in prompt(93, batch=2).split([90, 1, 1, 1], dim=1):
        fed(fragile, cache, piece)
    alone, copied, other = (WAYS[way](cache, tmp_path / "cache") for _ in range(3))
    expected = [fed(fragile, alone, token) for token in tokens]
    for token, logits in zip(tokens, expected, strict=True):
        assert torch.equal(fed(fragile, cache, token), logits)
        assert torch.equal(fed(fragile, copied, token), logits)
        fed(fragile, other, 95 - token)
    assert alike(cache, alone) and alike(copied, alone)


@pytest.mark.slow
def test_a_model_moved_to_another_dtype_is_compiled_anew():
    """Code or buffers of the old dtype would compute in it, or refuse the new one."""
    model, ids = optimized(tiny()), prompt(90, batch=2)
    generated(model, ids)
    for dtype in (torch.bfloat16, torch.float32):  # the weights stay rounded
        fresh = optimized(copy.deepcopy(model.to(dtype)))
        outs = [generated(one, ids, output_logits=True) for one in (model, fresh)]
        assert torch.equal(*[torch.stack(out.logits) for out in outs])
        assert held_and_seen(outs[0]) == (45 + 5, 95)
        assert outs[0].past_key_values.layers[1].values.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm, heads", [("l1", 8), ("l1", 2), ("l2", 8)])
def test_low_precision_keeps_what_float32_keeps(dtype, norm, heads):
    """Scores in half precision tie or overflow: other entries would be kept than the oracle's."""
    config = EvictionConfig(budget=40, norm=norm, window_size=8)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        shapes = (2, heads, 120, 16), (2, 2, 120, 16), (2, 2, 120, 16), (64, heads * 16)
        q, k, v, w = (torch.randn(*shape, generator=generator) for shape in shapes)
        q, k, v, w = (x.to(dtype) for x in (q, 2 * k, 3000 * v, w))  # norms beyond float16
        kept, *_ = EvictKV(config, in_out=False, from_config=True)(q, k, v, w)
        same = (kept[:, :, :, None] == k[:, :, None]).all(-1)
        assert kept.dtype == dtype and bool((same.sum(-1) == 1).all())
        projection = torch.nn.Linear(heads * 16, 64, bias=False)
        projection.weight = torch.nn.Parameter(w.float())
        module = mock.Mock(o_proj=projection)
        oracle = eager.Recorded(module, q.float(), k.float(), v.float(), None)
        assert torch.equal(same.int().argmax(-1), oracle.keep(config, 120))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_keeps_what_the_oracle_keeps(dtype):
    """The model's own inputs, not made-up ones; the oracle reads them in float32."""
    model, config = optimized(tiny().to(dtype)), EvictionConfig(budget=0.5)
    for seed in range(3):
        ids, cache = prompt(90, batch=2, seed=seed), DynamicCache()
        _, expected = eager.prefill(tiny().to(dtype), ids, config)
        fed(model, cache, ids)
        for layer, oracle in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(layer.keys, oracle.keys)
            assert torch.equal(layer.values, oracle.values)
