"""A decode step copies nothing old: buffers that grow by blocks, and buffers that never move."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from families import prompt, tiny
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import ckv_compile
from ckv_compile import EvictedCache
from ckv_compile.cache.layers import _BLOCK


def generated(model, ids, steps, cache, **options):
    return model.generate(
        ids, max_new_tokens=steps, do_sample=False, past_key_values=cache, **options
    )


@torch.no_grad()
def prefilled(model, n=90, batch=2, config=None, **options):
    cache = EvictedCache(config, **options)
    model(input_ids=prompt(n, batch=batch), past_key_values=cache)
    return cache


@torch.no_grad()
def step(model, cache, seed=1):
    ids = prompt(1, batch=cache.layers[0].keys.shape[0], seed=seed)
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.fixture(scope="module")
def compiled():
    return ckv_compile.optimize(tiny(), 0.5, lowering="inductor")


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 40}], ids=["growing", "fixed"])
def test_the_decode_code_writes_one_token_and_concatenates_nothing(compiled, options):
    """The generated code itself: nothing but the mask is made in the length of the cache."""
    cache = prefilled(compiled, **options)
    _, (code, *_) = run_and_get_code(step, compiled, cache)
    made = re.findall(r"= empty_strided_cpu\((\(.*?\)), ", code)
    length, held = str(cache.layers[0]._keys.shape[2]), r"\bs\d+\b"
    long = {shape for shape in made if length in shape or re.search(held, shape)}
    # A mask, and where nothing is masked the size that counts what is held.
    mask = {f"(2, 1, 1, {length})", f"(2, {length})", f"(1, 1, 1, {length})"}
    assert "scaled_dot_product" in code and made
    assert all(shape in mask or shape.endswith(", 0)") for shape in long), long


def test_a_growing_buffer_costs_no_recompile(half):
    """Over several blocks, one prefill graph and one decode graph."""
    counters.clear()
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    cache = EvictedCache()
    generated(model, prompt(90), 2 * _BLOCK + 20, cache)
    assert ckv_compile.explain(model).graphs == 2 and not counters["graph_break"]
    assert cache.layers[0].held == 45 + 2 * _BLOCK + 19
    assert cache.layers[0]._keys.shape[2] == 3 * _BLOCK


def test_a_step_leaves_the_buffer_where_it_is(half):
    """A copy at every step is what the buffer is there to avoid; one in a block is its price."""
    cache = prefilled(half)
    assert cache.nbytes == 2 * 2 * (2 * 2 * 45 * 16) * 4  # right after the cut: not a byte more
    addresses = set()
    for _ in range(_BLOCK - 1 - 45):  # the last slot stays free
        step(half, cache)
        addresses.add(cache.layers[0]._keys.data_ptr())
    assert len(addresses) == 1 and cache.layers[0].held == _BLOCK - 1
    before = cache.layers[0].keys.clone()
    step(half, cache)
    assert torch.equal(cache.layers[0].keys[:, :, : _BLOCK - 1], before)
    assert cache.layers[0]._keys.shape[2] == 2 * _BLOCK


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lowering", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_both_forms_give_the_same_tokens(lowering, padded):
    model = ckv_compile.optimize(tiny(), 0.5, lowering=lowering)
    ids, mask = prompt(90, batch=2), torch.ones(2, 90).long()
    mask[0, :30] = 0 if padded else 1
    sequences = [
        generated(model, ids, 12, EvictedCache(max_new_tokens=room), attention_mask=mask)
        for room in (None, 12, 50)
    ]
    assert torch.equal(sequences[0], sequences[1]) and torch.equal(sequences[0], sequences[2])


@pytest.mark.parametrize("configured", [False, True])
def test_a_fixed_cache_keeps_address_shape_and_graph(configured):
    """What CUDA graphs replay: the same tensors, filled further."""
    counters.clear()
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    cache = prefilled(model, config=model.config if configured else None, max_new_tokens=20)
    seen = set()
    for i in range(20):
        layer = cache.layers[1]
        tensors = (layer._keys, layer._values, layer.filled, layer.shift)
        seen.add(tuple((t.data_ptr(), t.shape) for t in tensors))
        step(model, cache)
        assert layer.held == int(layer.filled) == 46 + i and cache.get_seq_length() == 91 + i
    assert len(seen) == 1 and ckv_compile.explain(model).graphs == 2
    assert not counters["graph_break"]
    with pytest.raises(ValueError, match=r"room for 0 more tokens.*larger max_new_tokens than 20"):
        step(model, cache)
    assert cache.get_seq_length() == 110


def test_unused_slots_of_a_fixed_cache_are_never_attended_to(half):
    """Zero keys have a logit of zero: unmasked they would take part in every softmax."""
    logits = []
    for hostile in (0.0, 1e4):
        cache = prefilled(half, max_new_tokens=20)
        for layer in cache.layers:
            layer._keys[:, :, layer.used + 1 :] = layer._values[:, :, layer.used + 1 :] = hostile
        logits.append(step(half, cache))
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], step(half, prefilled(half)))


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 40}], ids=["growing", "fixed"])
def test_rows_are_reordered_in_both_forms(half, options):
    """Beam search reorders the rows at every step; the room behind them must survive."""
    cache = prefilled(half, **options)
    step(half, cache)
    length, expected = cache.layers[0]._keys.shape[2], cache.layers[0].keys.flip(0)
    address = cache.layers[0]._keys.data_ptr()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, expected)
    assert cache.layers[0]._keys.shape[2] == length
    assert (cache.layers[0]._keys.data_ptr() == address) == bool(options)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, expected.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 40}], ids=["growing", "fixed"])
def test_crop_goes_back_to_the_earlier_state(half, options):
    cache = prefilled(half, **options)
    before, logits = copy.deepcopy(cache), step(half, cache, seed=3)
    step(half, cache, seed=4)
    cache.crop(-2)
    assert cache.get_seq_length() == 90 and cache.layers[0].held == 45
    assert torch.equal(cache.layers[0].keys, before.layers[0].keys)
    assert torch.equal(step(half, cache, seed=3), logits)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_a_fixed_cache_under_the_unmodified_model_is_an_ordinary_one(half):
    """Nobody masks its unused slots there: they must not be seen."""
    cache, plain = prefilled(half, max_new_tokens=40), prefilled(half)
    steps = [step(tiny(), one) for one in (cache, plain) for _ in range(2)]
    assert torch.equal(steps[0], steps[2]) and torch.equal(steps[1], steps[3])
    assert cache.get_seq_length() == 92
    # Masked slots in one of them: some processors' sums then take another order.
    torch.testing.assert_close(step(half, cache), step(half, plain), rtol=0, atol=1e-6)


def test_rows_of_a_padded_batch_are_refused_by_the_unmodified_model(half):
    """It would take unused slots for tokens: wrong, silently."""
    ids, mask = prompt(90, batch=2), torch.ones(2, 90).long()
    mask[0, :50] = 0
    cache = EvictedCache()
    with torch.no_grad():
        half(input_ids=ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cut rows of a padded batch"):
        step(tiny(), cache)


def test_a_padded_cache_goes_on_without_a_mask(half):
    """The cache knows which slots its rows filled, whether or not the caller says it again."""
    ids, mask = prompt(90, batch=2), torch.ones(2, 90).long()
    mask[0, :50] = 0
    logits = []
    for later in (torch.cat([mask, mask.new_ones(2, 1)], 1), None):
        cache = EvictedCache()
        with torch.no_grad():
            half(input_ids=ids, attention_mask=mask, past_key_values=cache)
            at = torch.tensor([[90], [90]])
            options = {"attention_mask": later, "position_ids": at, "past_key_values": cache}
            logits.append(half(input_ids=ids[:, :1], **options).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("room", [0, -1, 2.5, True])
def test_max_new_tokens_takes_a_positive_int(room):
    with pytest.raises(ValueError, match="max_new_tokens"):
        EvictedCache(max_new_tokens=room)


def test_a_full_buffer_compiles_nothing():
    """The 128th token of a batch of one cost a third graph: the part in use became contiguous."""
    model = ckv_compile.optimize(tiny(), 1.0, lowering="aot_eager")
    cache = EvictedCache()
    generated(model, prompt(_BLOCK - 8), 20, cache)
    assert cache.get_seq_length() == _BLOCK + 11
    assert ckv_compile.explain(model).graphs == 2
