"""``max_entries``: a long generation in bounded memory, cut by what its last queries look at."""

from __future__ import annotations

import copy

import eager
import pytest
import torch
from families import generated, prompt, tiny
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig
from ckv_compile.kernels import reference

OPTIONS = {"window_size": 8, "max_entries": 60, "interval": 16, "lowering": "eager"}


@pytest.fixture(scope="module")
def bounded():
    counters.clear()
    return ckv_compile.optimize(tiny(), 1.0, **OPTIONS)


def fed(model, ids, cache):
    """Feed a prompt and then one token after the other; yields the logits of each call."""
    with torch.no_grad():
        yield model(input_ids=ids[:, :40], past_key_values=cache, use_cache=True).logits[:, -1]
        for i in range(40, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            yield out.logits[:, -1]


def test_cuts_are_those_of_the_oracle(bounded):
    """The uncompiled model, its K and V cut by the reference when they are full."""
    ids, config = prompt(110, batch=2), EvictionConfig(budget=44, **OPTIONS)
    plain = copy.deepcopy(tiny())
    plain.set_attn_implementation("recording")
    cache, whole, last, cuts = EvictedCache(), DynamicCache(), [], 0
    for step, logits in enumerate(fed(bounded, ids, cache)):
        n = 40 + step
        eager._calls.clear()
        piece = ids[:, :40] if step == 0 else ids[:, n - 1 : n]
        position = torch.arange(40)[None] if step == 0 else torch.tensor([[n - 1]])
        with torch.no_grad():
            out = plain(
                input_ids=piece, past_key_values=whole, position_ids=position, use_cache=True
            )
        torch.testing.assert_close(logits, out.logits[:, -1], rtol=1e-4, atol=1e-4)
        last = [*last, list(eager._calls)][-8:]
        if whole.get_seq_length() > 60:
            cuts += 1
            for i, layer in enumerate(whole.layers):
                query = torch.cat([calls[i].query for calls in last], dim=2)
                one = last[-1][i]
                scores = reference.window_attention(query, one.key, one.scale, 8, 7)
                weight, in_out = eager.weight_of(one.module.o_proj)
                norms = reference.projected_norm(one.value, weight, in_out, 4, "l1")
                keep = reference.select(scores, norms, 44, 8, 0.5, config.epsilon)
                layer.keys, layer.values = reference.compact(one.key, one.value, keep)
        assert cache.layers[0].held == whole.get_seq_length()
        assert cache.get_seq_length() == n
    assert cuts == 3


def test_a_long_generation_is_bounded(bounded):
    """Bytes stay, whatever comes."""
    bytes_seen, most = set(), 0
    cache = EvictedCache()
    for i, _ in enumerate(fed(bounded, prompt(400), cache)):
        most = max(most, cache.layers[0].held)
        if i > 100:
            bytes_seen.add(cache.nbytes)
    assert most == 60 and max(bytes_seen) <= 2 * 2 * 2 * 16 * 4 * 256
    assert not counters["graph_break"]


def test_one_more_graph_than_without_a_bound():
    """A recompile at every cut would cost more than it saves."""
    model = ckv_compile.optimize(tiny(), 0.9, **OPTIONS)
    for n in (50, 90, 64):
        cache = generated(model, prompt(n, batch=2), 50).past_key_values
        assert max(layer.held for layer in cache.layers) <= 60
        assert cache.get_seq_length() == n + 49
    report = ckv_compile.explain(model)
    assert report.graphs == 3 and not report.rejections


def test_a_bound_that_is_never_reached_changes_nothing():
    model = ckv_compile.optimize(tiny(), 1.0, **OPTIONS | {"max_entries": 400})
    ids = prompt(40, batch=2)
    assert torch.equal(generated(model, ids, 30).sequences, generated(tiny(), ids, 30).sequences)


@pytest.mark.slow
def test_padded_rows_are_the_rows_alone():
    """Each row is cut by its own tokens, whatever the row beside it has seen."""
    model = ckv_compile.optimize(tiny(), 1.0, **OPTIONS)
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    out = generated(model, ids * mask, 60, attention_mask=mask)
    sequences, cache = out.sequences, out.past_key_values
    assert max(layer.held for layer in cache.layers) <= 60
    alone = generated(model, ids[1:], 60).sequences
    assert torch.equal(sequences[1], alone[0])


def test_options_are_checked():
    with pytest.raises(ValueError, match="window_size \\+ interval \\+ 1 = 161"):
        EvictionConfig(max_entries=100)
    with pytest.raises(ValueError, match="interval=4"):
        EvictionConfig(max_entries=400, interval=4)
    with pytest.raises(ValueError, match="method='tova', which looks at several heads"):
        EvictionConfig(max_entries=400, allocation="adakv", method="tova")
    model = ckv_compile.optimize(tiny(), 1.0, **OPTIONS)
    with pytest.raises(ValueError, match="max_entries=60"):
        generated(model, prompt(40), 3, past_key_values=EvictedCache(max_new_tokens=4))


@pytest.mark.slow
def test_four_thousand_tokens():
    """As long as a chain of thought; positions go on past everything that is held."""
    options = OPTIONS | {"max_entries": 256, "interval": 64, "lowering": "aot_eager"}
    model = ckv_compile.optimize(tiny(max_position_embeddings=8192), 1.0, **options)
    cache = generated(model, prompt(100), 4000).past_key_values
    assert cache.get_seq_length() == 4099
    assert max(layer.held for layer in cache.layers) <= 256
    assert (
        sum(t.nbytes for layer in cache.layers for t in layer.tensors()) <= 2 * 2 * 2 * 16 * 4 * 384
    )
    assert ckv_compile.explain(model).graphs == 3


def test_a_prompt_of_one_token_is_bounded_too(bounded):
    """Nothing of it is cut, so no cut had said how many tokens the cache has seen."""
    cache = EvictedCache()
    with torch.no_grad():
        for token in prompt(90)[0]:
            bounded(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 90 and cache.layers[0].held <= 60
