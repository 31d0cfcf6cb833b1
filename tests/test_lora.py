"""PEFT's adapters on the projections: scores through base and adapter, wrapped models, switches."""

from __future__ import annotations

import eager
import peft
import pytest
import torch
from families import generated, prompt, tiny
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictionConfig

CONFIG = EvictionConfig(budget=0.5, window_size=8, lowering="eager")
OPTIONS = {"window_size": 8, "lowering": "eager"}
EVERYWHERE = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "falcon": ["query_key_value", "dense"],
}


ONE_LAYER = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "falcon": {}}


def lora(family="llama", model=None, **options):
    """A tiny model of one layer with a large random adapter on all projections of its attention."""
    model = model or tiny(family, **ONE_LAYER[family])
    settings = {"r": 4, "lora_alpha": 64, "target_modules": EVERYWHERE[family]}
    torch.manual_seed(1)
    config = peft.LoraConfig(**{**settings, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config).eval()


def add(model, name="other", **options):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, lora_alpha=32, target_modules=["o_proj"], **options)
    config.init_lora_weights = False
    model.add_adapter(name, config)
    return model.eval()


def cut(model, ids):
    """The cache of one call."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def assert_same(cache, expected):
    for layer, oracle in zip(cache.layers, expected.layers, strict=True):
        # Merged, the same sums are made in another order.
        torch.testing.assert_close(layer.keys, oracle.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.values, oracle.values, rtol=1e-3, atol=1e-3)


def differ(cache, other):
    pairs = zip(cache.layers, other.layers, strict=True)
    return any(not torch.equal(a.keys, b.keys) for a, b in pairs)


def assert_oracle(model, ids):
    """What the optimised model keeps is what an eager loop keeps, layer by layer."""
    _, expected = eager.prefill(model.get_base_model(), ids, CONFIG)
    cache = cut(model, ids)
    assert_same(cache, expected)
    return cache


@pytest.mark.parametrize("family", [f for f in EVERYWHERE if f != "falcon"])
def test_keeps_what_the_oracle_keeps(family, monkeypatch):
    """Through the base alone, scores would be those of the model before it was trained."""
    model, ids = lora(family, lora_dropout=0.1), prompt(90, batch=2)
    ckv_compile.optimize(model, CONFIG.budget, **OPTIONS)
    counters.clear()
    cache = assert_oracle(model, ids)
    assert not counters["graph_break"]
    plain = eager.weight_of
    monkeypatch.setattr(eager, "weight_of", lambda m: plain(getattr(m, "base_layer", m)))
    assert differ(cache, eager.prefill(model.get_base_model(), ids, CONFIG)[1])


@pytest.mark.parametrize("family", EVERYWHERE)
def test_full_budget_gives_the_untouched_models_tokens(family):
    model, ids = lora(family), prompt(45, batch=2)
    expected = generated(model, ids).sequences
    ckv_compile.optimize(model, 1.0, **OPTIONS)
    assert torch.equal(generated(model, ids).sequences, expected)
    assert ckv_compile.explain(model).evicted == (2 if family == "falcon" else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"use_rslora": True},
        {"lora_bias": True, "target_modules": ["out_proj"]},
        {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    ],
    ids=str,
)
def test_options_of_lora(options):
    model = lora(model=tiny("opt" if "lora_bias" in options else "llama"), **options)
    ckv_compile.optimize(model, CONFIG.budget, **OPTIONS)
    assert_oracle(model, prompt(70, batch=2))
    assert "+ 1 added" in ckv_compile.explain(model).sites[0].weight


def test_a_wrapped_model_generates_from_a_cut_cache():
    """generate belongs to the model inside: compiled around the wrapper it would run uncompiled."""
    model, ids = lora(), prompt(80, batch=2)
    ckv_compile.optimize(model, 0.5, lowering="eager")
    counters.clear()
    for n in (80, 50, 77):
        out = generated(model, ids[:, :n], steps=4)
        kept = EvictionConfig(budget=0.5).entries(n)
        assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {kept + 3}
    report = ckv_compile.explain(model)
    assert report.graphs == 2 and report.evicted == 1 and not counters["graph_break"]
    assert cut(model, ids).layers[0].keys.shape[2] == 40
    assert ckv_compile.compress(model, ids[:1]).layers[0].keys.shape[2] == 40
    traced = ckv_compile.explain(model, input_ids=ids, config=EvictionConfig(budget=50))
    assert [row.budget for row in traced.sites] == [50]
    assert ckv_compile.restore(model) is model
    assert generated(model, ids, 2).past_key_values.get_seq_length() == 81
    assert cut(model, ids).get_seq_length() == 80 == cut(model, ids).layers[0].keys.shape[2]


def test_an_adapter_that_comes_after_optimize_counts():
    """Code compiled for the base must not score, nor run, the model that it has become."""
    base, ids = tiny(**ONE_LAYER["llama"]), prompt(90, batch=2)
    ckv_compile.optimize(base, CONFIG.budget, **OPTIONS)
    before = cut(base, ids)
    model = lora(model=base)
    after = assert_oracle(model, ids)
    assert differ(before, after)
    expected = generated(ckv_compile.optimize(lora(), CONFIG.budget, **OPTIONS), ids).sequences
    assert torch.equal(generated(model, ids).sequences, expected)
    assert_same(cut(model.unload(), ids), before)


def test_adapters_are_switched_merged_and_disabled():
    """Each is another projection; what was compiled for one must not serve another."""
    model, ids = add(lora()), prompt(90, batch=2)
    ckv_compile.optimize(model, CONFIG.budget, **OPTIONS)
    first = assert_oracle(model, ids)
    with model.disable_adapter():
        plain = assert_oracle(model, ids)
    model.set_adapter("other")
    other = assert_oracle(model, ids)
    model.base_model.set_adapter(["default", "other"])
    both = assert_oracle(model, ids)
    assert "+ 2 added" in ckv_compile.explain(model).sites[-1].weight
    caches = [first, plain, other, both]
    assert all(differ(a, b) for i, a in enumerate(caches) for b in caches[:i])
    model.merge_adapter()
    assert_same(assert_oracle(model, ids), both)
    assert "added" not in ckv_compile.explain(model).sites[-1].weight
    model.unmerge_adapter()
    graphs = ckv_compile.explain(model).graphs
    assert_same(assert_oracle(model, ids), both)
    assert ckv_compile.explain(model).graphs == graphs  # this one was compiled before
    model.set_adapter("default")
    assert_same(assert_oracle(model, ids), first)


def test_an_adapter_whose_numbers_change_is_read_anew():
    """The sum of base and adapter is no constant of the compiled code."""
    model, ids = lora(), prompt(90, batch=2)
    ckv_compile.optimize(model, CONFIG.budget, **OPTIONS)
    before = assert_oracle(model, ids)
    graphs = ckv_compile.explain(model).graphs
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.o_proj.lora_B["default"].weight.copy_(torch.randn(64, 4))
    assert differ(before, assert_oracle(model, ids))
    assert ckv_compile.explain(model).graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["dora", "an adapter for each row"])
def test_other_adapters_are_refused_and_the_value_alone_does(mixed):
    """DoRA divides by the norm of its sum; adapters for rows are other matrices for each."""
    model = lora(target_modules=["o_proj"], use_dora=not mixed)
    ids = prompt(60, batch=2)
    extra = {"adapter_names": ["default", "__base__"]} if mixed else {}
    expected = generated(model, ids, 3, **extra).sequences
    ckv_compile.optimize(model, 0.5, **OPTIONS)
    with pytest.warns(UserWarning, match="no attention was matched"):
        out = generated(model, ids, 3, **extra)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.layers[0].keys.shape[2] == 62
    reasons = {row.reason for row in ckv_compile.explain(model).rejections}
    assert reasons <= {"OUTPUT_FORKS", "NO_PROJECTION"} and reasons
    ckv_compile.optimize(model, 0.5, norm="value", **OPTIONS)
    assert generated(model, ids, 1, **extra).past_key_values.layers[0].keys.shape[2] == 30


def test_soft_prompts_count():
    """They come in from outside of the model inside, which counts them like any token."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(num_hidden_layers=1), config).eval()
    ids = prompt(80, batch=2)
    expected = generated(model, ids).sequences
    ckv_compile.optimize(model, 1.0, lowering="eager")
    assert torch.equal(generated(model, ids).sequences, expected)
    ckv_compile.optimize(model, 0.5, lowering="eager")
    assert generated(model, ids, 2).past_key_values.layers[0].keys.shape[2] == 42 + 1
