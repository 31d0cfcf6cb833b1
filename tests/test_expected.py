"""Expected Attention: queries from before their rotary embedding, found in any model's graph."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest import mock

import eager
import pytest
import torch
from brute_methods import expected_scores
from families import generated, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig
from ckv_compile.evidence.perturbation import perturbation
from ckv_compile.kernels import reference, reference_packed

OPTIONS = {"method": "expected_attention", "window_size": 4, "lowering": "eager"}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
YARN["original_max_position_embeddings"] = 128


def model_of(family: str, **options: Any) -> Any:
    model = tiny(family, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "query_key_value.bias")):
                parameter.normal_()  # a mean that is not near zero
    return model


@torch.no_grad()
def recorded(model: Any, ids: Tensor) -> list[tuple[eager.Recorded, Tensor]]:
    """Each layer's attention, and its queries ``[B, H, Q, D]`` turned to all of the next 512
    positions, one after the other, and averaged."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("recording")
    modeling = sys.modules[type(plain).__module__]
    rotate, taken = modeling.apply_rotary_pos_emb, []

    def recording(q: Tensor, k: Tensor, *more: Any, **named: Any) -> Any:
        taken.append(q)
        return rotate(q, k, *more, **named)

    eager._calls.clear()
    with mock.patch.object(modeling, "apply_rotary_pos_emb", recording):
        plain(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    base = plain.base_model
    n, hidden = ids.shape[1], torch.zeros(1, 1, 64)
    found = []
    for call, query in zip(eager._calls, taken, strict=True):
        turned = torch.zeros_like(query)
        for position in range(n, n + 512):
            cos, sin = base.rotary_emb(hidden, torch.tensor([[position]]))
            turned += rotate(query, query, cos, sin)[0] / 512
        # What is not rotated passes beside it.
        rest = call.query[..., turned.shape[-1] :]
        found.append((call, torch.cat([turned, rest], dim=-1)))
    return found


def scores_of(call: eager.Recorded, turned: Tensor) -> Tensor:
    """By brute force, ``[B, Hkv, K]``."""
    scale = call.scale or call.query.shape[3] ** -0.5
    rows = zip(
        turned.double().numpy(), call.key.double().numpy(), call.value.double().numpy(), strict=True
    )
    return torch.stack([torch.from_numpy(expected_scores(*row, scale)) for row in rows]).float()


def kept(model: Any, ids: Tensor, config: EvictionConfig) -> list[tuple[Tensor, Tensor]]:
    """K and V of each layer that stay, by brute force and the oracle's selection."""
    caches = []
    for call, turned in recorded(model, ids):
        scores = scores_of(call, turned)
        keep = reference.select(scores, None, config.entries(ids.shape[1]), 4, 0.5, 0.0)
        caches.append(reference.compact(call.key, call.value, keep))
    return caches


def filled(model: Any, **inputs: Any) -> EvictedCache:
    cache = EvictedCache()
    with torch.no_grad():
        model(past_key_values=cache, use_cache=True, **inputs)
    return cache


@pytest.fixture(scope="module")
def optimised() -> Any:
    """Cosines and sines of YaRN are scaled: their squares do not add up to 1."""
    return ckv_compile.optimize(model_of("llama", rope_parameters=YARN), 0.3, **OPTIONS)


def check(model: Any, optimised: Any) -> None:
    ids, config = prompt(70, batch=2), EvictionConfig(budget=0.3, **OPTIONS)
    expected = kept(model, ids, config)
    cache = filled(optimised, input_ids=ids)
    assert ckv_compile.explain(optimised).evicted == 2
    for layer, (key, value) in zip(cache.layers, expected, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :21], key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values[:, :, :21], value, rtol=1e-4, atol=1e-5)


def test_entries_are_those_of_queries_before_their_rotation(optimised: Any) -> None:
    """Prevents a query that is rotated twice or not at all, and other positions than the next."""
    check(model_of("llama", rope_parameters=YARN), optimised)


# Phi, GPT-NeoX and StableLM rotate a part of each head, Cohere neighbours and not halves.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "gpt_neox", "phi")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "starcoder2", "cohere"])
def test_the_same_of_other_families(family: str) -> None:
    """Prevents a form of rotation that is misread."""
    model = model_of(family)
    check(model, ckv_compile.optimize(copy.deepcopy(model), 0.3, **OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(optimised: Any, side: str) -> None:
    """Prevents pads among the queries, and positions that follow a pad's."""
    ids, lengths = prompt(40, batch=2), (40, 25)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    alone = []
    for b, n in enumerate(lengths):
        place = slice(40 - n, 40) if side == "left" else slice(0, n)
        padded[b, place], mask[b, place] = ids[b, :n], 1
        alone.append(filled(optimised, input_ids=ids[b : b + 1, :n].expand(2, -1)))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # Without positions a model counts columns: alike for pads behind the tokens.
    ways = [{"position_ids": positions}, *([{}] if side == "right" else [])]
    for given in ways:
        cache = filled(optimised, input_ids=padded, attention_mask=mask, **given)
        for layer, *others in zip(cache.layers, *(one.layers for one in alone), strict=True):
            for b, own in enumerate(others):
                held = (3 * lengths[b] + 5) // 10
                # A shorter row stands in the last slots of its batch.
                kept = layer.keys[b, :, 12 - held : 12]
                torch.testing.assert_close(kept, own.keys[0, :, :held], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_full_budget_gives_the_untouched_models_tokens(optimised: Any) -> None:
    """Prevents queries that are turned in attention as well, not beside it alone."""
    plain, ids = model_of("llama", rope_parameters=YARN), prompt(30, batch=2)
    model = ckv_compile.optimize(optimised, 1.0, **OPTIONS)
    try:
        assert torch.equal(generated(model, ids).sequences, generated(plain, ids).sequences)
    finally:
        ckv_compile.optimize(optimised, 0.3, **OPTIONS)


def test_no_rotation_is_left_alone_with_its_reason() -> None:
    """Prevents scores of queries whose positions are not understood."""
    config = EvictionConfig(0.5, **OPTIONS)
    report = ckv_compile.explain(tiny("gpt2"), input_ids=prompt(30), config=config)
    reasons = {row.reason: row.detail for row in report.rejections}
    assert report.evicted == 0 and "not seen to be made of" in reasons["ROTATION"]


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["adakv", "cake"])
def test_heads_of_their_own_lengths(allocation: str) -> None:
    """Prevents a packed prefill that does not reach the turned queries."""
    model, ids = model_of("llama"), prompt(70, batch=2)
    calls = recorded(model, ids)
    scores = [scores_of(call, turned) for call, turned in calls]
    asked = [reference_packed.layer_preference(c.query, c.key, c.scale, 4) for c, _ in calls]
    real, rows = torch.ones_like(ids, dtype=torch.bool), torch.tensor([21, 21])
    shared = reference_packed.head_budgets(
        scores, rows, 4, real, allocation, preferences=torch.stack(asked, 1)
    )
    optimised = ckv_compile.optimize(model, 0.3, allocation=allocation, **OPTIONS)
    cache = filled(optimised, input_ids=ids)
    for layer, (call, _), base, own in zip(cache.layers, calls, scores, shared, strict=True):
        key, _, cu = reference_packed.pack(
            [call.key], [call.value], [base], [], [own], 4, 0.5, 0.0, real
        )
        assert torch.equal(layer.packed.lengths.flatten() + 2, own.flatten())
        start, end = layer.packed.cu_kv_lens[:2].tolist()
        first = torch.cat([layer.packed.keys[start:end], layer.keys[0, 0, :2]])
        torch.testing.assert_close(first, key[: cu[1]], rtol=1e-4, atol=1e-5)


def test_options_that_ask_for_other_queries_are_errors() -> None:
    """Prevents a cut in mid-generation by queries that are rotated already."""
    for options in ({"method": "expected_attention"}, {"base": "expected_attention"}):
        with pytest.raises(ValueError, match="are rotated already"):
            EvictionConfig(max_entries=400, **options)


def test_where_it_cannot_be_measured_is_said() -> None:
    """Prevents an error in the middle of a long reading."""
    with pytest.raises(ValueError, match="later=8 with 'expected_attention'"):
        perturbation(model_of("llama"), prompt(60), (0.5,), ["expected_attention"], later=8)
