"""Models whose attention has a bias by position: after a cut each entry keeps its own position.

The oracle is the unmodified model over its full cache, its attention made not to see what is gone.
"""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
from families import generated
from transformers import DynamicCache, EncoderDecoderCache

import ckv_compile
from ckv_compile import EvictedCache
from ckv_compile.coverage import check
from ckv_compile.coverage.tiny import build

N = check.N


def prompt():
    return torch.randperm(80, generator=torch.Generator().manual_seed(1))[:N][None] + 3


@pytest.fixture(scope="module")
def plain():
    return build("causal", "bloom")


@pytest.fixture(scope="module")
def model(plain):
    return ckv_compile.optimize(copy.deepcopy(plain), 0.5, window_size=8, lowering="eager")


@torch.no_grad()
def cut(model, ids=None, cache=None):
    cache = EvictedCache() if cache is None else cache
    model(input_ids=prompt() if ids is None else ids, past_key_values=cache)
    return cache


@torch.no_grad()
def fed(model, cache, *texts):
    """Logits of each of several calls over a copy of the cache."""
    cache = copy.deepcopy(cache)
    return [model(input_ids=text, past_key_values=cache).logits for text in texts]


@torch.no_grad()
def expected(plain, cache, *texts):
    """What the unmodified model says where it does not see what ``cache`` has evicted."""
    full = check._generate(plain, prompt()).past_key_values
    kept = {i: layer.positions for i, layer in enumerate(cache.layers)}
    uncut = plain(input_ids=prompt(), use_cache=True).past_key_values
    with check._hiding(full, kept):
        return fed(plain, uncut, *texts)


def same(actual, wanted):
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(actual, wanted, strict=True)
    )


def test_entries_keep_the_positions_they_had(plain, model):
    """Prevents a bias that is computed for slot numbers: wrong by as much as was evicted."""
    cache, full = cut(model), plain(input_ids=prompt(), use_cache=True).past_key_values
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert layer.positions.shape == (1, 4, N // 2)
        index = layer.positions[..., None].expand(-1, -1, -1, 16)
        torch.testing.assert_close(layer.keys, whole.keys.gather(2, index))
    assert cache.nbytes > sum(2 * layer.keys.nbytes for layer in cache.layers)


def test_steps_and_a_second_turn_are_those_of_the_full_cache(plain, model):
    """Decode steps, then several tokens at once, then a step again."""
    texts = [torch.tensor([[5]]), torch.tensor([[9, 33]]), torch.tensor([[41]])]
    cache = cut(model)
    actual = fed(model, cache, *texts)
    assert same(actual, expected(plain, cache, *texts))
    # And the test can tell: without the positions it would be another model.
    moved = copy.deepcopy(cache)
    for layer in moved.layers:
        layer.positions = layer.positions.flip(-1)
    assert not same(fed(model, moved, *texts), actual)


def test_positions_follow_rows(model):
    """Beams reorder rows: the positions of another row's entries would be wrong."""
    texts = torch.cat([prompt(), prompt().flip(1)])
    step = torch.tensor([[5], [7]])
    cache = cut(model, texts)
    (straight,) = fed(model, cache, step)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(fed(model, swapped, step.flip(0))[0], straight.flip(0))
    swapped.batch_repeat_interleave(2)
    assert swapped.layers[0].positions.shape[0] == 4


def test_positions_are_saved_and_loaded(model, tmp_path):
    """A file without them would load, and continue at wrong positions."""
    cache = cut(model)
    cache.save(tmp_path / "cache.safetensors")
    loaded = EvictedCache.load(tmp_path / "cache.safetensors")
    step = torch.tensor([[5]])
    assert torch.equal(fed(model, loaded, step)[0], fed(model, cache, step)[0])


def test_a_fixed_cache_gives_the_same():
    """Unused slots have positions as well, behind those in use."""
    model = build("seq2seq", "t5")
    ckv_compile.optimize(model, 0.5, window_size=8, lowering="eager")

    def steps(**options):
        with mock.patch.object(check, "STEPS", 6):
            return check._generate(model, prompt(), **options)

    growing = steps()
    both = [EvictedCache(max_new_tokens=8), DynamicCache()]
    with mock.patch.object(
        model,
        "generate",
        functools.partial(model.generate, past_key_values=EncoderDecoderCache(*both)),
    ):
        fixed = steps()
    assert both[0].layers[0].filled is not None and both[0].layers[0].positions is not None
    assert same(fixed.logits, growing.logits)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_where_a_fixed_cache_cannot_have_its_bias_it_is_an_error(name):
    """Bloom computes it from the mask of the slots, MPT behind a graph break of its own."""
    model = ckv_compile.optimize(build("causal", name), 0.5, window_size=8, lowering="eager")
    cache = EvictedCache(max_new_tokens=8)
    with pytest.raises(Exception, match="the bias cannot be had for a cache that is cut"):
        generated(model, prompt(), 6, past_key_values=cache)


def test_tokens_taken_back(plain, model):
    """crop() shortens the tail; the positions of what stays are the same."""
    cache = cut(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[9, 33]]), past_key_values=cache)
    cache.crop(-2)
    text = torch.tensor([[41]])
    assert same(fed(model, cache, text), expected(plain, cache, text))


def test_a_later_piece_is_kept_whole_with_its_reason(model):
    """The bias of kept entries is known; scoring with it is not built: never guessed."""
    cache, piece = cut(model), prompt()[:, :20]
    with torch.no_grad():
        model(input_ids=piece, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == N // 2 + 20
    assert cache.get_seq_length() == N + 20
    reasons = {row.reason for row in ckv_compile.explain(model).rejections}
    assert "BIAS_UNREADABLE" in reasons


def test_padded_rows_keep_all(model):
    """Bloom computes its bias from the mask: what hides pads cannot be followed."""
    ids = torch.cat([prompt(), prompt()])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = generated(model, ids, 2, attention_mask=mask).past_key_values
    assert cache.layers[0].keys.shape[2] == N + 1


def test_the_unoptimised_model_cannot_continue(plain, model):
    """It would add the bias of slot numbers, silently."""
    with pytest.raises(RuntimeError, match="bias by position"):
        fed(plain, cut(model), torch.tensor([[5]]))


def test_an_attention_that_is_not_read_later_is_an_error(plain, monkeypatch):
    """What was read in the prefill may look otherwise in a step: never go on with a wrong bias."""
    model = ckv_compile.optimize(copy.deepcopy(plain), 0.5, window_size=8, lowering="eager")
    cache = cut(model)
    monkeypatch.setattr("ckv_compile.passes.bias.find_attentions", lambda gm: [])
    with pytest.raises(Exception, match=r"attention over .* is not read"):
        fed(model, cache, torch.tensor([[5]]))


@pytest.mark.slow
def test_generated_code_gives_the_same(plain, model):
    compiled = ckv_compile.optimize(copy.deepcopy(plain), 0.5, window_size=8)
    assert torch.equal(
        generated(compiled, prompt()).sequences, generated(model, prompt()).sequences
    )
