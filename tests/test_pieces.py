"""A prompt fed in pieces, and later turns: what is cut when, against the oracle's loop."""

from __future__ import annotations

import eager
import pytest
import torch
from families import prompt, tiny
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig

pytestmark = pytest.mark.filterwarnings("error:ckv_compile. the recompile limit")

HALF = EvictionConfig(budget=0.5)


@torch.no_grad()
def feed(model, pieces, mask=None, cache=None, positions=None):
    """The cache after the pieces, and the last logits."""
    cache, seen = EvictedCache() if cache is None else cache, 0
    for piece in pieces:
        extra = {}
        if positions is not None:
            extra["position_ids"] = positions[:, seen : seen + piece.shape[1]]
        seen += piece.shape[1]
        if mask is not None:
            extra["attention_mask"] = mask[:, :seen]
        out = model(input_ids=piece, past_key_values=cache, **extra)
    return cache, out.logits[:, -1]


def assert_same(cache, expected):
    for layer, oracle in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, oracle.keys)
        torch.testing.assert_close(layer.values, oracle.values)


@pytest.mark.parametrize("size", [2, 7, 31, 32, 33, 45, 64, 89, 90])
def test_pieces_leave_what_the_oracle_leaves(half, size):
    """Shorter and longer than the window, and the whole in one: as one-shot prefill."""
    pieces = [piece for piece in prompt(90, batch=2).split(size, dim=1) if piece.shape[1] > 1]
    cache, logits = feed(half, pieces)
    expected_logits, expected = eager.prefill_in_pieces(tiny(), pieces, HALF)
    assert_same(cache, expected)
    torch.testing.assert_close(logits, expected_logits)
    seen = sum(piece.shape[1] for piece in pieces)
    assert cache.get_seq_length() == seen
    assert cache.layers[0].held == HALF.entries(seen) == EvictionConfig(budget=0.5).entries(seen)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_compiled_pieces_cost_three_graphs(lowering):
    """One for a first piece, one for a later one, one for a token; whatever their lengths."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering=lowering)
    for n, size in ((90, 40), (120, 31), (64, 20)):
        ids = prompt(n, batch=2, seed=n)
        cache, _ = feed(model, ids.split(size, dim=1))
        _, expected = eager.prefill_in_pieces(tiny(), list(ids.split(size, dim=1)), HALF)
        assert_same(cache, expected)
        feed(model, [prompt(1, batch=2)] * 3, cache=cache)
        assert cache.layers[0].held == HALF.entries(n) + 3
    report = ckv_compile.explain(model)
    assert report.graphs == 3 and report.evicted == 4 and not report.rejections


def test_generate_in_pieces(half):
    """transformers' own option; the tokens that follow are those of the pieces' cache."""
    ids = prompt(90)
    out = half.generate(
        ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=40, return_dict_in_generate=True
    )
    assert out.past_key_values.layers[0].held == 45 + 5
    cache, logits = feed(half, ids.split(40, dim=1))
    tokens = []
    for _ in range(6):
        tokens.append(logits.argmax(-1, keepdim=True))
        _, logits = feed(half, tokens[-1:], cache=cache)
    assert torch.equal(out.sequences[:, 90:], torch.cat(tokens, 1))


def test_full_budget_in_pieces_is_the_untouched_model(half):
    ckv_compile.optimize(half, 1.0, lowering="eager")
    ids, options = prompt(90, batch=2), {"max_new_tokens": 6, "do_sample": False}
    expected = tiny().generate(ids, **options)
    assert torch.equal(half.generate(ids, prefill_chunk_size=40, **options), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [0.5, 40, 1.0])
def test_a_padded_row_in_pieces_keeps_what_it_keeps_alone(half, side, budget):
    """Pieces that are pads for one row, in part or as a whole, must change nothing for it."""
    ckv_compile.optimize(half, budget, lowering="eager")
    config, lengths = EvictionConfig(budget=budget), (90, 72, 34, 25)
    ids, mask = prompt(90, batch=4), torch.zeros(4, 90).long()
    for row, length in enumerate(lengths):
        mask[row, slice(90 - length, None) if side == "left" else slice(length)] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, _ = feed(half, ids.split(30, dim=1), mask, positions=positions)
    fitted = cache.layers[0].valid
    for row, length in enumerate(lengths):
        parts = zip(ids[row].split(30), mask[row].split(30), strict=True)
        pieces = [piece[real.bool()][None] for piece, real in parts if real.any()]
        _, expected = eager.prefill_in_pieces(tiny(), pieces, config)
        for layer, alone in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(layer.valid, fitted)
            kept = layer.keys[row, :, layer.valid[row]]
            assert kept.shape[1] == config.entries(length)
            torch.testing.assert_close(kept, alone.keys[0])


def test_a_right_padded_batch_with_full_budget_goes_on_as_untouched(half):
    """Where nothing is cut nothing may move: the caller's mask goes on hiding the same slots."""
    ckv_compile.optimize(half, 1.0, lowering="eager")
    ids, mask = prompt(90, batch=2), torch.ones(2, 90).long()
    mask[0, 50:] = 0
    longer, at = torch.cat([mask, mask.new_ones(2, 1)], 1), mask.sum(-1, keepdim=True)
    logits = []
    for model in (half, tiny()):
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            step = {"attention_mask": longer, "position_ids": at, "past_key_values": cache}
            logits.append(model(input_ids=ids[:, :1], **step).logits)
    torch.testing.assert_close(*logits)


# --- later turns


def turns(model, later):
    ckv_compile.optimize(model, 0.5, lowering="eager", later_turns=later)
    cache = EvictedCache()
    first = model.generate(prompt(90), max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, prompt(40, seed=5)], 1)
    model.generate(longer, max_new_tokens=2, do_sample=False, past_key_values=cache)
    return cache


def test_later_turns_are_kept_or_cut_again():
    """A prompt ends with its first generated token; what follows is kept unless told otherwise."""
    assert turns(tiny(), "keep").layers[0].held == 45 + 3 + 41 + 1
    cut = turns(tiny(), "evict")
    assert cut.layers[0].held == HALF.entries(90 + 3 + 41) + 1
    assert cut.get_seq_length() == 90 + 3 + 41 + 1


def test_assisted_decoding_is_never_cut_again():
    """Verified candidates are several tokens at once, and taken back: no piece of a prompt."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager", later_turns="evict")
    ids = prompt(45).repeat(1, 2)
    out = model.generate(
        ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = out.past_key_values
    assert cache.get_seq_length() - cache.layers[0].held in range(45, 48)


def test_a_question_behind_a_compressed_context_is_kept_whole(half):
    ckv_compile.optimize(half, 0.5, lowering="eager")
    cache = ckv_compile.compress(half, prompt(90))
    feed(half, [prompt(50, seed=1)], cache=cache)
    assert cache.layers[0].held == 45 + 50 and cache.get_seq_length() == 140


@pytest.mark.slow
def test_a_model_with_other_heads_in_the_same_process_changes_nothing():
    """Dynamo learns from all models of a process which sizes vary: head counts must not."""
    for family in ("llama", "gpt_neox", "llama"):
        model = ckv_compile.optimize(tiny(family), 0.5, lowering="eager")
        cache, _ = feed(model, prompt(90).split(45, dim=1))
        feed(model, [prompt(1)] * 2, cache=cache)
        report = ckv_compile.explain(model)
        assert report.graphs == 3 and report.evicted == 4 and not report.rejections
