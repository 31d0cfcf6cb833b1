"""Heads of different lengths are cut again: pieces of a prompt, later turns, long generations."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from eager_packed import Kept
from families import generated, prompt, tiny
from torch._dynamo.utils import counters

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig

TABLE = [[1.0, 3.0], [0.5, 2.5]]
BOUND, INTERVAL = 60, 16
OPTIONS = {"window_size": 8, "lowering": "eager", "max_entries": BOUND, "interval": INTERVAL}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("global", "pyramid", "headkv")]


def options_of(allocation: str, **more: object) -> dict:
    scores = {"head_scores": TABLE} if allocation == "headkv" else {}
    return {**OPTIONS, "allocation": allocation, **scores, **more}


@pytest.fixture(scope="module")
def packed(request):
    """One compiled model for all tests of an allocation; one layer where it is cut alone."""
    counters.clear()
    layers = 1 if request.param == "adakv" else 2
    with mock.patch("ckv_compile.region.RECOMPILE_LIMIT", 64):
        model = ckv_compile.optimize(small(layers), 0.5, **options_of(request.param))
    return request.param, model


def small(layers: int = 1):
    return tiny(num_hidden_layers=layers)


def over(*allocations: object):
    return pytest.mark.parametrize("packed", allocations, indirect=True, scope="module")


def at(packed, budget: float, **more: object):
    allocation, model = packed
    ckv_compile.optimize(model, budget, **options_of(allocation, **more))
    config = EvictionConfig(budget=budget, **options_of(allocation, **more))
    plain = small(len(model.model.layers))
    return model, config, Kept(plain, config, [score for row in TABLE for score in row])


@torch.no_grad()
def fed(model, ids, cache, **more: object):
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
    return out.logits[:, -1]


@over("adakv", *SLOW)
def test_pieces_turns_and_long_generations_are_the_oracles(packed):
    """Entries by head and logits after every call: a prompt in three pieces of other lengths than
    the window, single tokens up to the bound and over it, and a later turn that is cut."""
    model, config, kept = at(packed, 0.5, later_turns="evict")
    ids, cache, start, cuts = prompt(190, batch=2), EvictedCache(), 0, 0
    for length in (40, 5, 31, *[1] * 44, 30, *[1] * 4):
        piece = ids[:, start : start + length]
        start += length
        torch.testing.assert_close(fed(model, piece, cache), kept.feed(piece), rtol=1e-4, atol=1e-4)
        if length > 1:
            kept.cut(config.entries(start), length)
        elif kept.entries > BOUND:
            kept.cut(BOUND - INTERVAL, config.window_size)
            cuts += 1
        kept.assert_held_by(cache)
        assert cache.get_seq_length() == start
    assert cuts == 2
    lengths = torch.cat([layer.packed.lengths for layer in cache.layers])
    assert len(set(lengths.tolist())) > 1
    report = ckv_compile.explain(model)
    # A first piece, a later one, a token, and a token at the bound; whatever the lengths.
    assert report.graphs == 4 and not report.rejections and not counters["graph_break"]
    assert all(row.budget <= row.kv_len for row in report.sites)
    entries = sum(layer.packed.keys.shape[0] for layer in cache.layers)
    if packed[0] == "adakv":  # in stores of their own
        assert entries == 2 * 2 * (config.entries(150) - 2)


@pytest.mark.slow
@over("adakv")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(packed, side):
    """Pieces that are partly pads for one row, and then single tokens over the bound."""
    model, config, _ = at(packed, 0.5)
    ids, lengths, mask = prompt(120, batch=3), (64, 41, 50), torch.zeros(3, 64).long()
    for row, n in enumerate(lengths):
        mask[row, slice(64 - n, None) if side == "left" else slice(n)] = 1
    alone = [Kept(small(), config) for _ in lengths]
    cache, places = EvictedCache(), (mask.cumsum(-1) - 1).clamp(min=0)
    for piece in (slice(0, 34), slice(34, 64)):
        seen = {"attention_mask": mask[:, : piece.stop], "position_ids": places[:, piece]}
        fed(model, ids[:, piece], cache, **seen)
        for row, one in enumerate(alone):
            own = mask[row, piece].bool()
            one.feed(ids[row : row + 1, piece][:, own])
            one.cut(config.entries(int(mask[row, : piece.stop].sum())), int(own.sum()))
            one.assert_held_by(cache, row)
    for step in range(64, 106):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        logits = fed(
            model,
            ids[:, step : step + 1],
            cache,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
        )
        full = max(one.entries for one in alone) + 1 > BOUND
        for row, one in enumerate(alone):
            own = one.feed(ids[row : row + 1, step : step + 1])
            torch.testing.assert_close(logits[row : row + 1], own, rtol=1e-4, atol=1e-4)
            if full and one.entries > BOUND - INTERVAL:
                one.cut(BOUND - INTERVAL, config.window_size)
            one.assert_held_by(cache, row)


@pytest.mark.slow
@over("adakv")
def test_full_budget_gives_the_untouched_models_tokens(packed):
    """In pieces, later turns included: nothing that is packed anew may be lost or moved."""
    options = options_of("adakv", max_entries=None, interval=128, later_turns="evict")
    model, plain = ckv_compile.optimize(small(), 1.0, **options), small()
    ids, more = prompt(75, batch=2), prompt(9, batch=2, seed=1)
    answers = []
    for one in (model, plain):
        first = generated(one, ids, 5, prefill_chunk_size=33)
        ids_then = torch.cat([first.sequences, more], dim=1)
        answers.append(generated(one, ids_then, 5, past_key_values=first.past_key_values).sequences)
    assert torch.equal(*answers)


@pytest.mark.slow
@over("adakv")
def test_a_loaded_cache_is_bounded(packed, tmp_path):
    """What rows hold is not in the file; it is counted anew."""
    model, _, _ = at(packed, 0.5)
    ids = prompt(110)
    tokens = []
    for loads in (False, True):
        cache = ckv_compile.compress(model, ids[:, :60])
        if loads:
            cache.save(tmp_path / "context")
            cache = EvictedCache.load(tmp_path / "context", model)
        tokens.append(generated(model, ids, 40, past_key_values=cache).sequences)
        assert max(layer.held + layer.spread for layer in cache.layers) <= BOUND
    assert torch.equal(*tokens)


@pytest.mark.slow
@over("adakv")
def test_beams_follow_their_rows_over_the_bound(packed):
    """A cut of rows that have changed places."""
    model, _, _ = at(packed, 1.0)
    ids = prompt(40, batch=2)
    both = generated(model, ids, 40, num_beams=2)
    alone = [generated(model, ids[b : b + 1], 40, num_beams=2).sequences for b in range(2)]
    assert torch.equal(both.sequences, torch.cat(alone))


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.parametrize("allocation", ["adakv", "global"])
def test_lowered_graphs_agree(allocation, lowering):
    tokens = []
    for one in ("eager", lowering):
        model = ckv_compile.optimize(small(2), 0.5, **options_of(allocation, lowering=one))
        tokens.append(generated(model, prompt(90, batch=2), 60, prefill_chunk_size=40).sequences)
        assert ckv_compile.explain(model).graphs == 4
    assert torch.equal(*tokens)


@pytest.mark.slow
def test_layers_with_sliding_windows_stay_whole_beside_them():
    """All layers read one mask, whatever is cut of some of them."""
    options = options_of("adakv", max_entries=None, interval=128, later_turns="evict")
    windows = {"num_hidden_layers": 2, "sliding_window": 16, "use_sliding_window": True}
    windows |= {"layer_types": ["full_attention", "sliding_attention"]}
    plain = tiny("qwen2", **windows)
    model, ids = ckv_compile.optimize(tiny("qwen2", **windows), 1.0, **options), prompt(90, batch=2)
    answers = [generated(one, ids, 8, prefill_chunk_size=40).sequences for one in (model, plain)]
    assert torch.equal(*answers)
    assert ckv_compile.explain(model).evicted > 1


@pytest.mark.slow
def test_scores_of_several_heads_leave_what_follows_whole():
    """TOVA's mean over heads has no meaning where they hold different entries."""
    options = {"window_size": 8, "lowering": "eager", "allocation": "adakv", "method": "tova"}
    model, cache = ckv_compile.optimize(small(), 0.5, **options), EvictedCache()
    ids = prompt(70)
    fed(model, ids[:, :40], cache)
    with pytest.warns(UserWarning, match="method='tova' looks at several heads"):
        fed(model, ids[:, 40:], cache)
    assert cache.layers[0].held == 2 + 30 and cache.layers[0].spread == 18
