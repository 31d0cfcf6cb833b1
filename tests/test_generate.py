"""``optimize`` and ``generate``: the same tokens where nothing is cut, the oracle's where it is."""

from __future__ import annotations

import copy

import eager
import pytest
import torch
from families import FAMILIES, generated, prompt, tiny
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictionConfig

LENGTHS = (77, 50, 20, 33, 34, 2, 128, 64, 16)


@pytest.fixture(
    scope="module", params=[pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"]
)
def optimized(request):
    """One compiled model for all tests of a lowering: Inductor takes its time."""
    counters.clear()
    return ckv_compile.optimize(tiny(), budget=0.5, lowering=request.param)


def test_two_graphs_for_all_lengths_and_budgets(optimized):
    """A recompile for each prompt length would make eviction slower than no eviction."""
    for budget in (0.5, 0.25, 1.0, 50, "max(40, n/4)"):
        ckv_compile.optimize(optimized, budget, lowering=_lowering(optimized))
        for n in LENGTHS:
            cache = generated(optimized, prompt(n, batch=2), steps=3).past_key_values
            kept = EvictionConfig(budget=budget).entries(n)
            for layer in cache.layers:
                # Two of the three new tokens have been fed back.
                assert layer.keys.shape == layer.values.shape == (2, 2, kept + 2, 16)
        site = next(row for row in ckv_compile.explain(optimized).sites if row.action == "evict")
        assert (site.kv_len, site.budget) == (77, EvictionConfig(budget=budget).entries(77))
        assert site.bytes_after == site.bytes_before // 77 * site.budget
    report = ckv_compile.explain(optimized)
    assert report.graphs == 2 and report.evicted == 2
    assert not counters["graph_break"]


def test_two_graphs_for_cut_padded_batches_of_all_lengths():
    """How many slots the rows fill is read outside of the graph: no guard may know it."""
    options = {"lowering": "eager", "window_size": 4}
    model = ckv_compile.optimize(tiny(), budget=0.5, **options)
    for budget in (0.5, 0.4, 0.25):
        ckv_compile.optimize(model, budget, **options)
        for n in (77, 50, 64):
            mask = torch.ones(2, n, dtype=torch.int64)
            mask[0, : n // 3] = 0
            generated(model, prompt(n, batch=2), steps=3, attention_mask=mask)
    assert ckv_compile.explain(model).graphs == 2


def test_full_budget_gives_the_untouched_models_tokens(optimized):
    untouched = tiny()
    ckv_compile.optimize(optimized, 1.0, lowering=_lowering(optimized))
    for n in (77, 20):
        ids = prompt(n, batch=2, seed=n)
        expected = generated(untouched, ids, 12).sequences
        assert torch.equal(generated(optimized, ids, 12).sequences, expected)


@pytest.mark.parametrize("n", [60, 111])
def test_cut_cache_gives_the_oracles_tokens(optimized, n):
    """Shapes alone prove nothing: the tokens are those of the reference selection."""
    ckv_compile.optimize(optimized, 0.6, lowering=_lowering(optimized))
    ids = prompt(n, batch=2, seed=n)
    tokens, _ = eager.generate(tiny(), ids, EvictionConfig(budget=0.6), 8)
    assert torch.equal(generated(optimized, ids, 8).sequences[:, n:], tokens)


def test_sampling_with_full_budget_draws_the_same_tokens(optimized):
    ckv_compile.optimize(optimized, 1.0, lowering=_lowering(optimized))
    ids, untouched = prompt(40, batch=2), tiny()
    torch.manual_seed(3)
    expected = untouched.generate(ids, max_new_tokens=8, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(
        optimized.generate(ids, max_new_tokens=8, do_sample=True, top_k=20), expected
    )


def test_prefill_leaves_exactly_the_budget_in_memory(optimized):
    """A view of the full cache would have the right shape and free nothing."""
    ckv_compile.optimize(optimized, 0.5, lowering=_lowering(optimized))
    cache = DynamicCache()
    with torch.no_grad():
        optimized(input_ids=prompt(100, batch=2), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.shape == (2, 2, 50, 16)
            assert tensor.untyped_storage().nbytes() == 2 * 2 * 50 * 16 * 4


def _lowering(model):
    return model._compiled_call_impl.config.lowering


# Of all architectures a sample is run by test_coverage.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("llama", "gemma2", "gpt2") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_family_with_full_budget(family):
    """budget=1.0 must be the unmodified model, token for token, in every family."""
    model = tiny(family)
    ids = prompt(45, batch=2)
    expected = generated(model, ids).sequences
    ckv_compile.optimize(model, 1.0, lowering="eager")
    assert torch.equal(generated(model, ids).sequences, expected)
    assert ckv_compile.explain(model).evicted == FAMILIES[family][2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "granite"])
def test_family_keeps_what_the_oracle_keeps(family):
    """Each family's scale, groups and projection layout enter the scores; the cache shows it."""
    model, ids, config = tiny(family), prompt(90, batch=2), EvictionConfig(budget=0.5)
    _, expected = eager.prefill(model, ids, config)
    cache = DynamicCache()
    ckv_compile.optimize(model, config.budget, lowering="eager")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer, oracle in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, oracle.keys)
        torch.testing.assert_close(layer.values, oracle.values)


def test_gemma2_evicts_its_full_layers_alone():
    """Cutting a sliding-window layer breaks the model's own mask arithmetic."""
    model = ckv_compile.optimize(tiny("gemma2"), 0.5, lowering="eager")
    out = generated(model, prompt(80, batch=2), steps=2)
    sliding, full = out.past_key_values.layers
    assert full.keys.shape[2] == 40 + 1 and sliding.keys.shape[2] == 15


@pytest.mark.parametrize("method", ["criticalkv", "snapkv"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_methods_and_norms_differ_as_the_oracle_says(method, norm):
    config = EvictionConfig(budget=40, method=method, norm=norm, window_size=8)
    model, ids = tiny(), prompt(120)
    _, expected = eager.prefill(model, ids, config)
    options = {"method": method, "norm": norm, "window_size": 8, "lowering": "eager"}
    ckv_compile.optimize(model, 40, **options)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    for layer, oracle in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, oracle.keys)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_low_precision_generates(dtype):
    """Scores in half precision overflow or tie; ours are float32 whatever the model is."""
    model = ckv_compile.optimize(tiny().to(dtype), 0.5, lowering="eager")
    out = generated(model, prompt(80, batch=2), output_logits=True)
    assert all(logits.isfinite().all() for logits in out.logits)
    assert out.past_key_values.layers[0].keys.dtype == dtype


# --- the model around it


def test_restore_gives_the_model_back():
    model, ids = tiny(), prompt(60)
    expected = generated(model, ids, 6).sequences
    ckv_compile.optimize(model, 0.6, lowering="eager")
    assert ckv_compile.restore(model) is model
    out = generated(model, ids, 6)
    assert torch.equal(out.sequences, expected) and out.past_key_values.get_seq_length() == 65
    assert ckv_compile.restore(model) is model  # twice does no harm


def test_other_options_compile_anew():
    """Code compiled for one window must not serve another."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    generated(model, prompt(80))
    ckv_compile.optimize(model, 10, window_size=4, lowering="eager")
    assert generated(model, prompt(80), 2).past_key_values.layers[0].keys.shape[2] == 11


def test_training_and_gradients_run_uncompiled_with_a_warning():
    """An eviction inside a training step would be silent damage."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    with pytest.warns(UserWarning, match="gradients"):
        out = model(input_ids=prompt(80), use_cache=True)
    assert out.past_key_values.get_seq_length() == 80 and out.logits.requires_grad


def test_mask_of_ones_is_dropped():
    """A plain call with tokenizer output must be evicted as generate's is."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    ids = prompt(80, batch=2)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert out.past_key_values.layers[0].keys.shape[2] == 40


def test_nothing_matched_warns_once_and_runs_unchanged():
    """A user who believes that the cache is cut must hear that it is not."""
    model = tiny("mistral", sliding_window=16)
    ids = prompt(60)
    expected = generated(model, ids).sequences
    ckv_compile.optimize(model, 0.5, lowering="eager")
    with pytest.warns(UserWarning, match="no attention was matched.*SLIDING_WINDOW") as caught:
        first = generated(model, ids).sequences
        generated(model, ids)
    assert torch.equal(first, expected)
    assert sum("no attention" in str(w.message) for w in caught) == 1


def test_recompile_limit_is_said_aloud(monkeypatch):
    """Past the limit Dynamo silently runs eager, that is, silently stops evicting."""
    monkeypatch.setattr("ckv_compile.region.RECOMPILE_LIMIT", 1)
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    with torch.no_grad():
        model(input_ids=prompt(60), use_cache=True)
        with pytest.warns(UserWarning, match="recompile limit"):
            out = model(input_ids=prompt(60, batch=3), use_cache=True)
    assert out.past_key_values.get_seq_length() == 60


def test_two_models_do_not_share_budgets():
    small = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    large = ckv_compile.optimize(tiny(), 0.75, lowering="eager")
    for model, kept in ((small, 41), (large, 61), (small, 41)):
        assert generated(model, prompt(80), 2).past_key_values.layers[0].keys.shape[2] == kept


def test_a_copy_is_the_plain_model():
    """nn.Module leaves compiled calls behind on copies; a copy must not evict by surprise."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    out = generated(copy.deepcopy(model), prompt(80), 2)
    assert out.past_key_values.get_seq_length() == 81


def test_inputs_embeds_are_counted():
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt(80))
        out = model(inputs_embeds=embeds, use_cache=True)
    assert out.past_key_values.layers[0].keys.shape[2] == 40


def test_optimize_takes_a_module():
    with pytest.raises(TypeError, match="model is a str"):
        ckv_compile.optimize("gpt2")
    with pytest.raises(TypeError, match="unknown option 'windw_size'"):
        ckv_compile.optimize(tiny(), windw_size=4)
