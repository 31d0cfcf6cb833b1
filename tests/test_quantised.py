"""Quantised layers: scores through what they multiply by, and refusals where that is no matrix."""

from __future__ import annotations

import copy

import bitsandbytes
import eager
import peft
import pytest
import torch
from families import SMALL, generated, prompt, tiny
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.bitnet import AutoBitLinear

import ckv_compile
from ckv_compile import EvictionConfig

CONFIG = EvictionConfig(budget=0.5, window_size=8, lowering="eager")
OPTIONS = {"window_size": 8, "lowering": "eager"}
LENGTH = 90


def with_layers(make):
    """A tiny model whose linear layers in the blocks are replaced by ``make(linear)``."""

    def build():
        model = tiny(num_hidden_layers=1)
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.layers.set_submodule(name, make(layer))
        return model.eval()

    return build


def by_torchao(config):
    def make(layer):
        layer = copy.deepcopy(layer)
        quantize_(layer, config)
        return layer

    return with_layers(make)


def four_bits(layer, kind="nf4"):
    inside, out = layer.in_features, layer.out_features
    new = bitsandbytes.nn.Linear4bit(inside, out, bias=False, quant_type=kind)
    new.load_state_dict({"weight": layer.weight.data}, strict=False)
    return new.to("cpu")


def eight_bits(layer):
    new = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
    )
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def with_lora(build):
    def adapted():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, lora_alpha=64, target_modules=["q_proj", "o_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(build(), config).eval().get_base_model()

    return adapted


READ = {
    "torchao int8": by_torchao(Int8WeightOnlyConfig()),
    "torchao int4": by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao float8": by_torchao(Float8WeightOnlyConfig()),
    "torchao int8, activations too": by_torchao(Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes nf4": with_layers(four_bits),
    "bitsandbytes fp4": with_layers(lambda layer: four_bits(layer, "fp4")),
    "torchao int4 + lora": with_lora(by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4))),
    "bitsandbytes nf4 + lora": with_lora(with_layers(four_bits)),
}


@pytest.mark.parametrize("build", READ.values(), ids=READ)
def test_keeps_what_the_oracle_keeps(build):
    """The numbers that are multiplied by, not those that the weight holds."""
    model, ids = build(), prompt(LENGTH, batch=2)
    expected = generated(model, ids, 3).sequences
    _, oracle = eager.prefill(model, ids, CONFIG)
    ckv_compile.optimize(model, CONFIG.budget, **OPTIONS)
    counters.clear()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer, right in zip(cache.layers, oracle.layers, strict=True):
        torch.testing.assert_close(layer.keys, right.keys)
        torch.testing.assert_close(layer.values, right.values)
    report = ckv_compile.explain(model)
    assert report.evicted == 1 and "[quantised]" in report.sites[0].weight
    assert not counters["graph_break"]
    ckv_compile.optimize(model, 1.0, **OPTIONS)
    assert torch.equal(generated(model, ids, 3).sequences, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4 + lora"])
def test_through_inductor(name):
    """AOTAutograd takes tensor subclasses apart before Inductor sees them."""
    model, ids = READ[name](), prompt(LENGTH)
    expected = generated(model, ids, 3).sequences
    ckv_compile.optimize(model, 1.0)
    assert torch.equal(generated(model, ids, 3).sequences, expected)
    _, oracle = eager.prefill(model, ids, EvictionConfig(budget=0.5))
    ckv_compile.optimize(model, 0.5)
    cache = generated(model, ids, 1).past_key_values
    torch.testing.assert_close(cache.layers[0].keys, oracle.layers[0].keys)


REFUSED = {
    "bitsandbytes int8": with_layers(eight_bits),
    "transformers' BitNet": with_layers(
        lambda layer: AutoBitLinear(layer.in_features, layer.out_features, bias=False)
    ),
    "torch's dynamic": lambda: torch.ao.quantization.quantize_dynamic(
        tiny(num_hidden_layers=1), {nn.Linear}
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_layers_that_round_their_inputs_are_refused_and_the_value_alone_does(build):
    """What they do to a value depends on the others of its row."""
    model, ids = build(), prompt(60, batch=2)
    expected = generated(model, ids, 3).sequences
    ckv_compile.optimize(model, 0.5, **OPTIONS)
    with pytest.warns(UserWarning, match="no attention was matched"):
        out = generated(model, ids, 3)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.layers[0].keys.shape[2] == 62
    rows = ckv_compile.explain(model).rejections
    reasons = {row.reason for row in rows}
    assert reasons in ({"OUTPUT_OP"}, {"OUTPUT_FORKS"}, {"NO_PROJECTION"})
    assert all('norm="value"' in row.cure for row in rows)
    if reasons == {"NO_PROJECTION"}:
        return  # the graph breaks at every layer, and K and V come in with lengths of their own
    ckv_compile.optimize(model, 0.5, norm="value", **OPTIONS)
    assert generated(model, ids, 1).past_key_values.layers[0].keys.shape[2] == 30


def bitnet():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bitnet", **{**SMALL, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("norm", ["l1", "value"])
def test_a_norm_before_the_projection(norm):
    """BitNet's output is no linear function of the values: refused, unless they are asked alone."""
    model, ids = bitnet(), prompt(LENGTH, batch=2)
    config = EvictionConfig(budget=0.5, norm=norm, **OPTIONS)
    _, oracle = eager.prefill(model, ids, config)
    expected = generated(model, ids, 3).sequences
    ckv_compile.optimize(model, config.budget, norm=norm, **OPTIONS)
    if norm == "l1":
        with pytest.warns(UserWarning, match="no attention was matched"):
            assert torch.equal(generated(model, ids, 3).sequences, expected)
        return
    cache = generated(model, ids, 1).past_key_values
    for layer, right in zip(cache.layers, oracle.layers, strict=True):
        torch.testing.assert_close(layer.keys, right.keys)
    ckv_compile.optimize(model, 1.0, norm=norm, **OPTIONS)
    assert torch.equal(generated(model, ids, 3).sequences, expected)
