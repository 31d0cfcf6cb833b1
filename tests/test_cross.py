"""Cross-attention: an encoder's entries, evicted once, at the first call of the decoder."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache

import ckv_compile
from ckv_compile import EvictionConfig
from ckv_compile.coverage.tiny import build
from ckv_compile.kernels import reference

LENGTH, STEPS = 30, 5
OPTIONS = {"window_size": 4, "lowering": "eager"}
CONFIG = EvictionConfig(budget=0.5, window_size=4)


def text(n=LENGTH):
    return torch.randint(3, 80, (1, n), generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module", params=["bart", pytest.param("t5", marks=pytest.mark.slow)])
def plain(request):
    model = build("seq2seq", request.param)
    config = model.generation_config
    config.eos_token_id = config.forced_eos_token_id = config.forced_bos_token_id = None
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return model


@pytest.fixture(scope="module")
def model(plain):
    return ckv_compile.optimize(copy.deepcopy(plain), 0.5, cross_attention=True, **OPTIONS)


@torch.no_grad()
def generated(model, ids, **options):
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(
        ids, num_beams=1, return_dict_in_generate=True, output_logits=True, **options
    )


def projection_of(model, layer):
    layers = model.decoder.block if model.config.model_type == "t5" else model.model.decoder.layers
    if model.config.model_type == "t5":
        return layers[layer].layer[1].EncDecAttention.o.weight
    return layers[layer].encoder_attn.out_proj.weight


@torch.no_grad()
def expected(model, ids, decoder_ids):
    """Logits of the unmodified model over cross caches cut by hand, as the reference selects."""
    calls, sdpa = [], F.scaled_dot_product_attention

    def recording(query, key, value, *args, **kwargs):
        calls.append((query, key, value, kwargs.get("scale")))
        return sdpa(query, key, value, *args, **kwargs)

    encoded = model.get_encoder()(ids)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    inputs = {"encoder_outputs": encoded, "past_key_values": cache, "use_cache": True}
    with mock.patch.object(F, "scaled_dot_product_attention", recording):
        logits = [model(decoder_input_ids=decoder_ids, **inputs).logits[:, -1]]
    cross = [call for call in calls if call[1].shape[2] == ids.shape[1]]
    layers = cache.cross_attention_cache.layers
    assert len(cross) == len(layers)
    for i, (layer, (query, key, value, scale)) in enumerate(zip(layers, cross, strict=True)):
        weight, heads = projection_of(model, i), query.shape[1]
        keep = reference.select(
            reference.cross_attention(query, key, scale, 4, CONFIG.kernel_size),
            reference.projected_norm(value, weight, False, heads, "l1"),
            CONFIG.entries(ids.shape[1]),
            0,
            CONFIG.first_stage_ratio,
            CONFIG.epsilon,
        )
        layer.keys, layer.values = reference.compact(layer.keys, layer.values, keep)
    for _ in range(STEPS - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(model(decoder_input_ids=token, **inputs).logits[:, -1])
    return logits


@pytest.mark.parametrize("decoded", [1, 12])
def test_an_encoders_entries_are_evicted_once(plain, model, decoded):
    """A wrong choice, a window that is exempt, or a second cut would all show in the logits."""
    start = torch.cat([torch.tensor([[2]]), text(11)], 1)[:, :decoded]
    out = generated(model, text(), decoder_input_ids=start)
    layers = out.past_key_values.cross_attention_cache.layers
    assert [layer.keys.shape[2] for layer in layers] == [LENGTH // 2] * 2
    if decoded == 1:  # of a longer start the decoder's own cache is cut as well
        for actual, wanted in zip(out.logits, expected(plain, text(), start), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    rows = [row for row in ckv_compile.explain(model).sites if row.phase == "cross"]
    assert rows and all(row.action == "evict" for row in rows)


def test_another_length_and_budget(plain, model):
    """The share is of the encoder's tokens; another one never gets the old number."""
    out = generated(model, text(44))
    assert out.past_key_values.cross_attention_cache.layers[0].keys.shape[2] == 22
    other = ckv_compile.optimize(copy.deepcopy(plain), 0.25, cross_attention=True, **OPTIONS)
    generated(other, text())
    ckv_compile.optimize(other, 0.5, cross_attention=True, **OPTIONS)
    out = generated(other, text())
    assert out.past_key_values.cross_attention_cache.layers[0].keys.shape[2] == LENGTH // 2


def test_budget_1_and_default_leave_it_whole(plain):
    """Without being asked nobody loses an encoder's entries; the reason stands in the report."""
    wanted = generated(plain, text()).sequences
    whole = ckv_compile.optimize(copy.deepcopy(plain), 1.0, cross_attention=True, **OPTIONS)
    assert torch.equal(generated(whole, text()).sequences, wanted)
    default = ckv_compile.optimize(copy.deepcopy(plain), 0.5, **OPTIONS)
    assert torch.equal(generated(default, text()).sequences, wanted)
    generated(default, text(), decoder_input_ids=text(3))
    reasons = {row.reason for row in ckv_compile.explain(default).rejections}
    assert "CROSS_ATTENTION" in reasons


def test_a_padded_encoder_keeps_its_entries(plain, model):
    """Its mask has a column for every entry: with fewer of them it would not fit, or be wrong."""
    ids, mask = torch.cat([text(), text()]), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 20:] = 0
    wanted = generated(plain, ids, attention_mask=mask)
    out = generated(model, ids, attention_mask=mask)
    assert out.past_key_values.cross_attention_cache.layers[0].keys.shape[2] == LENGTH
    assert torch.equal(out.sequences, wanted.sequences)


def test_bytes_are_refused(plain):
    with pytest.raises(ValueError, match="cross_attention=True takes a budget in shares"):
        ckv_compile.optimize(plain, "1MB", cross_attention=True)
    with pytest.raises(TypeError, match="cross_attention='yes'; it takes True or False"):
        ckv_compile.optimize(plain, 0.5, cross_attention="yes")
