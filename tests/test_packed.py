"""Allocations by head and layer: real memory, real positions, the oracle's entries and tokens."""

from __future__ import annotations

import copy

import eager
import pytest
import torch
from families import generated, prompt, tiny
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig

TABLE = [[1.0, 3.0], [0.5, 2.5]]
HEAD_SCORES = {"head_scores": TABLE}
ALLOCATIONS = ("adakv", "global", "cake", "pyramid", "headkv")
OPTIONS = {"window_size": 8, "lowering": "eager"}


def options_of(allocation: str, **more: object) -> dict:
    scores = HEAD_SCORES if allocation == "headkv" else {}
    return {**OPTIONS, "allocation": allocation, **scores, **more}


def whole(layer) -> list[tuple[Tensor, Tensor]]:
    """Of each head all keys and values that the layer holds of its prompt, in order."""
    heads = layer.keys.shape[1]
    found = []
    for slot in range(layer.packed.lengths.numel()):
        start, end = layer.packed.cu_kv_lens[slot : slot + 2].tolist()
        b, h = divmod(slot, heads)
        found.append(
            tuple(
                torch.cat([packed[start:end], tail[b, h, :2]])
                for packed, tail in (
                    (layer.packed.keys, layer.keys),
                    (layer.packed.values, layer.values),
                )
            )
        )
    return found


def over(*allocations: object):
    return pytest.mark.parametrize("packed", allocations, indirect=True, scope="module")


# Those that look at no scores differ from the others in numbers alone.
ALL = ["adakv", "global", *(pytest.param(name, marks=pytest.mark.slow) for name in ALLOCATIONS[2:])]
# The allocation that weighs layers is fast in test_ragged_evidence.
CAKE = pytest.param("cake", marks=pytest.mark.slow)
WEIGHED = ["adakv", pytest.param("global", marks=pytest.mark.slow), CAKE]


@pytest.fixture(scope="module")
def packed(request):
    """One compiled model for all tests of an allocation."""
    model = tiny()
    return request.param, ckv_compile.optimize(model, 0.4, **options_of(request.param))


def at(packed, budget: float):
    allocation, model = packed
    return ckv_compile.optimize(model, budget, **options_of(allocation))


@over(*ALL[:2], CAKE, *ALL[3:])
@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_entries_and_tokens_are_the_oracles(packed, budget):
    """Shapes alone prove nothing: entries by head, and the tokens that they lead to."""
    model, plain, ids = at(packed, budget), tiny(), prompt(70, batch=2)
    config = EvictionConfig(budget=budget, **options_of(packed[0]))
    flat = [score for row in TABLE for score in row]
    kept = eager.packed_prefill(plain, ids, config, flat)
    cache = EvictedCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    entry = 2 * 16 * 4
    assert (
        cache.nbytes == config.entries(70) * 2 * 2 * 2 * entry
    )  # to the byte: rows, heads, layers
    for layer, (key, value, cu) in zip(cache.layers, kept, strict=True):
        assert layer.get_seq_length() == 70
        for slot, (keys, values) in enumerate(whole(layer)):
            torch.testing.assert_close(keys, key[cu[slot] : cu[slot + 1]], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, value[cu[slot] : cu[slot + 1]], rtol=1e-4, atol=1e-5)
    tokens = eager.generate_packed(plain, ids, kept, 8)
    assert torch.equal(generated(model, ids, 8).sequences[:, 70:], tokens)


@over(*ALL)
def test_heads_really_differ(packed):
    """A cache that is uniform after all would pass every other test."""
    cache = generated(at(packed, 0.4), prompt(70), 2).past_key_values
    lengths = torch.cat([layer.packed.lengths for layer in cache.layers])
    assert len(set(lengths.tolist())) > 1 and int(lengths.sum()) == 4 * (28 - 2)


@over(*WEIGHED)
def test_full_budget_gives_the_untouched_models_tokens(packed):
    model, plain = at(packed, 1.0), tiny()
    for n in (70, 33):
        ids = prompt(n, batch=2, seed=n)
        assert torch.equal(generated(model, ids, 10).sequences, generated(plain, ids, 10).sequences)


@over(*WEIGHED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(packed, side):
    """Each row keeps what it would keep alone; what stands in for pads is never read."""
    model = at(packed, 0.5)
    ids, lengths = prompt(64, batch=3), (64, 41, 30)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    alone = []
    for b, n in enumerate(lengths):
        place = slice(64 - n, 64) if side == "left" else slice(0, n)
        padded[b, place], mask[b, place] = ids[b, :n], 1
        alone.append(generated(model, ids[b : b + 1, :n], 6).past_key_values)
    cache = EvictedCache()
    with torch.no_grad():
        model(
            input_ids=padded,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
    rows = zip(*(one.layers for one in alone), strict=True)
    for layer, others in zip(cache.layers, rows, strict=True):
        expected = [entries for other in others for entries in whole(other)]
        for (keys, values), (own_keys, own_values) in zip(whole(layer), expected, strict=True):
            torch.testing.assert_close(keys, own_keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, own_values, rtol=1e-4, atol=1e-5)
    if side == "left":
        sequences = generated(model, padded, 6, attention_mask=mask).sequences
        for b, n in enumerate(lengths):
            own = generated(model, ids[b : b + 1, :n], 6).sequences
            assert torch.equal(sequences[b, 64:], own[0, n:])


@over("adakv")
def test_a_second_turn_sees_prompt_and_answer(packed):
    """Later tokens stand where they would without eviction, and see the whole tail."""
    model, plain = at(packed, 1.0), tiny()
    first, second = prompt(50, batch=2), prompt(9, batch=2, seed=1)
    answers = {}
    for name, one in (("cut", model), ("plain", plain)):
        cache = EvictedCache() if name == "cut" else DynamicCache()
        ids = generated(one, first, 5, past_key_values=cache).sequences
        ids = torch.cat([ids, second], dim=1)
        answers[name] = generated(one, ids, 5, past_key_values=cache).sequences
    assert torch.equal(answers["cut"], answers["plain"])


@over(*WEIGHED[:2])
def test_questions_on_one_context_crop_save_and_load(packed, tmp_path):
    """A context is read once, answered on, cropped, saved and loaded: always the same answer."""
    model = at(packed, 0.5)
    context, question = prompt(60, batch=2), prompt(6, batch=2, seed=3)
    cache = ckv_compile.compress(model, context)
    ids = torch.cat([context, question], dim=1)
    expected = generated(model, ids, 5, past_key_values=copy.deepcopy(cache)).sequences
    cache.save(tmp_path / "context")
    loaded = EvictedCache.load(tmp_path / "context", model)
    assert loaded.nbytes == cache.nbytes or packed[0] != "adakv"
    assert torch.equal(generated(model, ids, 5, past_key_values=loaded).sequences, expected)
    answered = generated(model, ids, 5, past_key_values=cache).past_key_values
    answered.crop(60 - answered.get_seq_length())
    assert answered.get_seq_length() == 60
    assert torch.equal(generated(model, ids, 5, past_key_values=answered).sequences, expected)
    with pytest.raises(ValueError, match="reaches into the evicted prompt"):
        answered.crop(-40)


@over("adakv")
def test_beams_follow_their_rows(packed):
    """A beam takes its row's heads along, however long they are."""
    model, plain = at(packed, 1.0), tiny()
    ids = prompt(40, batch=2)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        generated(model, ids, 6, **options).sequences, generated(plain, ids, 6, **options).sequences
    )


@over("adakv")
def test_the_unoptimised_model_cannot_read_it(packed):
    """Without the pass the prompt would be missing, silently."""
    cache = generated(at(packed, 0.5), prompt(60), 3).past_key_values
    with pytest.raises(RuntimeError, match="only the optimised model can read"):
        tiny()(input_ids=prompt(1), past_key_values=cache)


def test_two_graphs_for_all_lengths_and_budgets_and_no_break():
    """A prefill and a decode graph, whatever the heads keep."""
    counters.clear()
    model = ckv_compile.optimize(tiny(), 0.5, **options_of("global"))
    for budget in (0.5, 0.3, 60):
        ckv_compile.optimize(model, budget, **options_of("global"))
        for n in (77, 50, 90):
            generated(model, prompt(n, batch=2), 4)
    report = ckv_compile.explain(model)
    assert report.graphs == 2 and report.evicted == 2 and not report.rejections
    assert not counters["graph_break"]


def test_what_cannot_be_packed_is_left_whole_with_its_reason():
    """A plain cache shows what it holds as it is: it would lose the prompt."""
    model = tiny()
    call = torch.compile(
        model, backend="criticalkv", options={"budget": 0.5, **options_of("adakv")}
    )
    ids = prompt(50)
    with torch.no_grad():
        cache = call(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [50, 50]
    report = ckv_compile.explain(
        tiny("gemma2"), input_ids=ids, config=EvictionConfig(0.5, **options_of("adakv"))
    )
    assert report.evicted == 0
    assert "NOT_PACKED" in {row.reason for row in report.rejections}


def test_a_fixed_cache_is_refused():
    model = ckv_compile.optimize(tiny(), 0.5, **options_of("adakv"))
    with pytest.raises(ValueError, match="allocation='adakv'"):
        generated(model, prompt(40), 3, past_key_values=EvictedCache(max_new_tokens=4))


def test_options_are_checked():
    with pytest.raises(ValueError, match="'uniform', 'adakv'"):
        EvictionConfig(allocation="ada")
    with pytest.raises(ValueError, match="takes head_scores"):
        EvictionConfig(allocation="headkv")
    with pytest.raises(ValueError, match="not all of them 0"):
        EvictionConfig(allocation="headkv", head_scores=[[0.0], [0.0]])
    with pytest.raises(TypeError, match="head_scores"):
        EvictionConfig(allocation="headkv", head_scores=[1.0, 2.0])
    with pytest.raises(ValueError, match="no shares of a layer's"):
        EvictionConfig(allocation="global", method="knorm")
    with pytest.raises(ValueError, match="safeguard"):
        EvictionConfig(safeguard=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.parametrize("allocation", ["adakv", "global", "cake"])
def test_lowered_graphs_agree(allocation, lowering):
    ids = prompt(70, batch=2)
    tokens = [
        generated(
            ckv_compile.optimize(tiny(), 0.5, **options_of(allocation, lowering=one)), ids, 8
        ).sequences
        for one in ("eager", lowering)
    ]
    assert torch.equal(*tokens)
