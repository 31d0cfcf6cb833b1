"""Models whose caches have other layers than those that are cut, or more in them."""

from __future__ import annotations

import copy

import pytest
import torch
from families import generated, prompt, tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import ckv_compile
from ckv_compile.coverage.tiny import build

LLAMA4 = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def padded(lengths, n, side):
    ids, mask = prompt(n, batch=len(lengths)), torch.zeros(len(lengths), n).long()
    for row, length in enumerate(lengths):
        mask[row, n - length :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :length] = 1
    return ids * mask, mask


def assert_rows_are_as_alone(model, lengths, n, held=None):
    """Row by row the tokens and logits of the same model and budget on the row without pads."""
    ids, mask = padded(lengths, n, "left")
    out = generated(model, ids, 6, attention_mask=mask, output_logits=True)
    if held is not None:
        assert out.past_key_values.layers[-1].keys.shape[2] == held + 5
    for row, length in enumerate(lengths):
        alone = generated(model, ids[row : row + 1, n - length :], 6, output_logits=True)
        assert torch.equal(out.sequences[row, n:], alone.sequences[0, length:]), (row, length)
        for logits, right in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(logits[row], right[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_short_row_keeps_what_its_sliding_layers_hold():
    """They read the same mask: it hid of a row what the cut layers had lost (20 keep 5 of 16)."""
    model = ckv_compile.optimize(tiny("gemma2"), 0.4, window_size=4, lowering="eager")
    # Of 90 tokens 36 stay, of 60 24: more than the window of 16.
    assert_rows_are_as_alone(model, (60, 90), 90, held=36)


@pytest.mark.filterwarnings("ignore:ckv_compile. no attention")
@pytest.mark.slow
def test_a_row_cut_below_a_sliding_window_leaves_the_batch_whole():
    """Of 40 tokens 5 would stay where the sliding layer still attends to 16: wrong, silently."""
    plain = tiny("gemma2")
    ids, mask = padded((40, 90), 90, "left")
    full = generated(plain, ids, 6, attention_mask=mask, output_logits=True)
    model = ckv_compile.optimize(tiny("gemma2"), 0.1, window_size=4, lowering="eager")
    out = generated(model, ids, 6, attention_mask=mask, output_logits=True)
    assert torch.equal(out.sequences, full.sequences)
    for logits, right in zip(out.logits, full.logits, strict=True):
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    # Without pads the same budget is kept.
    alone = generated(model, ids[1:], 6)
    assert alone.past_key_values.layers[-1].keys.shape[2] == 9 + 5


@pytest.mark.filterwarnings("ignore:ckv_compile. no attention")
@pytest.mark.slow
def test_padded_rows_of_chunked_attention_stay_whole():
    """A chunk begins where a row does, which the model counts on the mask of what is held."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **LLAMA4)).eval()
    plain.generation_config.eos_token_id = None
    ids, mask = padded((21, 60), 60, "left")
    full = generated(plain, ids, 6, attention_mask=mask, output_logits=True)
    model = ckv_compile.optimize(plain, 0.5, window_size=4, lowering="eager")
    out = generated(model, ids, 6, attention_mask=mask, output_logits=True)
    for logits, right in zip(out.logits, full.logits, strict=True):
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    alone = generated(model, ids[1:], 6)
    assert alone.past_key_values.layers[-1].keys.shape[2] == 30 + 5


@torch.no_grad()
def test_a_layer_with_a_recurrence_counts_tokens_and_not_entries():
    """A loop without positions took them from the entries of a cut cache: fluent and wrong."""
    plain = build("causal", "falcon_h1")
    model = ckv_compile.optimize(copy.deepcopy(plain), 0.5, window_size=4, lowering="eager")
    ids = prompt(60)
    found = []
    for position in (None, torch.tensor([[60]])):
        out = model(input_ids=ids, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        assert cache.get_seq_length() == 60
        assert {layer.keys.shape[2] for layer in cache.layers} == {30}
        given = {} if position is None else {"position_ids": position}
        found.append(model(input_ids=token, past_key_values=cache, use_cache=True, **given).logits)
    torch.testing.assert_close(*found)


def test_a_layer_of_an_unknown_kind_is_not_cut():
    """It would tell the model that a cut prompt was short."""

    class Strange(DynamicLayer):
        pass

    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    cache = DynamicCache()
    cache.layers = [Strange(), Strange()]
    with torch.no_grad(), pytest.warns(UserWarning, match="UNCOUNTED_TOKENS"):
        model(input_ids=prompt(60), past_key_values=cache)
    assert {layer.keys.shape[2] for layer in cache.layers} == {60}
