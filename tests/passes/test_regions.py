"""Stretches that repeat share one subgraph: the same numbers, and no look-alike is shared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture import captured
from families import prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

import ckv_compile
from ckv_compile.passes.regions import share_regions

WIDTH = 8


def block(x, w, factor=0.5, activation=F.silu):
    """More nodes than the least that is worth a call."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    inner = activation(F.linear(x * scale * factor, w))
    return x + F.linear(inner.sin() * inner.cos(), w.t())


class Stack(torch.nn.Module):
    """Layers with a write to a cache between them, which keeps the stretches apart."""

    def __init__(self, layers, apply=block, weights=None):
        super().__init__()
        generator = torch.Generator().manual_seed(layers)
        if weights is None:
            weights = [torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(layers)]
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(w) for w in weights)
        self.apply_layer = apply

    def forward(self, x, cache):
        for i, w in enumerate(self.weights):
            cache[i, : x.shape[1]] = x[0]
            x = self.apply_layer(x, w, i) if self.apply_layer is not block else block(x, w)
        return x


def shared(apply=block, layers=4, length=6, dynamic=False, weights=None):
    """The graph, how many stretches became calls, and what it gave before and after."""
    model = Stack(layers, apply, weights)
    x, cache = torch.randn(1, length, WIDTH), torch.zeros(layers, 16, WIDTH)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    gm = captured(lambda x, cache: model(x, cache), x, cache)
    before = gm(*gm.meta["inputs"])
    wrote = cache.clone()
    cache.zero_()
    count = share_regions(gm)
    after = gm(*gm.meta["inputs"])
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(cache, wrote, rtol=0, atol=0)
    return gm, count


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 5), length=st.integers(2, 9), dynamic=st.booleans())
def test_layers_that_are_the_same_become_calls_of_one_subgraph(layers, length, dynamic):
    """A stretch that took another layer's tensors would change the numbers."""
    gm, count = shared(layers=layers, length=length, dynamic=dynamic)
    assert count == (layers if layers > 1 else 0)
    assert len([name for name, _ in gm.named_children() if "region" in name]) == (layers > 1)


def by_turns(x, w, i):
    return block(x, w, activation=F.silu if i % 2 else F.gelu)


def other_constants(x, w, i):
    return block(x, w, factor=0.5 + i)


def test_two_kinds_of_layers_are_two_subgraphs():
    gm, count = shared(by_turns, layers=6)
    assert count == 6
    assert len([name for name, _ in gm.named_children() if "region" in name]) == 2


def inside_a_context(x, w, i):
    with torch.autocast("cpu", torch.bfloat16):
        return block(x, w).float()


def returns_a_view(x, w, i):
    seen = x.view(-1)
    x = block(x, w)
    x.mul_(2)
    return x + seen.view(x.shape)


def few_nodes(x, w, i):
    return F.linear(x, w) + x


@pytest.mark.parametrize("apply", [other_constants, inside_a_context, returns_a_view, few_nodes])
def test_look_alikes_stay_as_they_are(apply):
    """Another constant, a region under autocast, an output that is an input, too little to gain."""
    assert shared(apply)[1] == 0


def test_weights_of_another_shape_or_dtype_are_no_match():
    odd = [torch.randn(WIDTH, WIDTH) for _ in range(3)] + [torch.randn(WIDTH + 1, WIDTH)]
    assert shared(weights=odd)[1] == 3


def test_what_is_written_inside_stays_outside():
    """A subgraph that wrote to its input would be called once for each layer all the same."""

    def writes(x, w, i):
        x = block(x, w)
        x.mul_(2)
        return block(x, w)

    gm, count = shared(writes, layers=3)
    assert count > 0
    for name, region in gm.named_children():
        assert "mul_" not in region.code.split("(") if "region" in name else True
    assert "mul_" in gm.code


def test_generated_code_holds_a_layer_once_and_caches_tell_bodies_apart():
    """Seen in thought alone: two models whose outer graphs look alike served by one cache entry."""

    def run(activation):
        model = Stack(4, lambda x, w, i: block(x, w, activation=activation))
        x, cache = torch.ones(1, 6, WIDTH), torch.zeros(4, 16, WIDTH)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="criticalkv")
        with torch.no_grad():
            expected = model(x, cache)
            result, code = run_and_get_code(compiled, x, cache)
        torch.testing.assert_close(result, expected)
        return "\n".join(code)

    counters.clear()
    with fresh_cache():
        code = run(F.silu)
        run(F.gelu)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
        run(F.silu)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert code.count("def repeated_subgraph0(") == 1
    assert code.count("= repeated_subgraph0(") == 4


def test_sizes_that_no_input_names_by_itself_are_not_shared():
    """Seen with Mixtral and two rows: Inductor could not tell ``s`` from an input of ``2 * s``."""
    stack = Stack(4)

    def forward(x, cache):
        flat = x.reshape(-1, WIDTH)
        for i, w in enumerate(stack.weights):
            cache[i, : x.shape[1]] = flat[: x.shape[1]]
            flat = block(flat, w)
        return flat

    for dynamic, least in ((False, 3), (True, 0)):
        x, cache = torch.randn(2, 6, WIDTH), torch.zeros(4, 16, WIDTH)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 1)
        count = share_regions(captured(lambda x, cache: forward(x, cache), x, cache))
        assert count >= least if least else count == 0


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model_of_three_layers_gives_the_same_tokens(padded):
    model = tiny("llama", num_hidden_layers=3)
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, : 7 * padded] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = ckv_compile.optimize(model, budget=24, window_size=4, lowering="eager")
    expected = expected.generate(**asked)
    ckv_compile.restore(model)
    model = ckv_compile.optimize(model, budget=24, window_size=4)
    assert torch.equal(model.generate(**asked), expected)


MORE = {
    "gpt2": ({"n_layer": 4}, {}),
    "gemma2": ({"num_hidden_layers": 6}, {}),  # layers of two kinds by turns
    "cohere": ({"num_hidden_layers": 4}, {"norm": "l2"}),
    "qwen3": ({"num_hidden_layers": 4}, {"allocation": "adakv"}),
    "mistral": ({"num_hidden_layers": 4}, {"max_entries": 20, "interval": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_compiled_models_of_many_layers_give_the_same_tokens(family, caplog):
    """Padded rows, and more steps than the bound leaves room for."""
    sizes, options = MORE[family]
    model = tiny(family, **sizes)
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    found = {}
    caplog.set_level("INFO", "ckv_compile")
    for lowering in ("eager", "inductor"):
        ckv_compile.optimize(model, budget=12, window_size=4, lowering=lowering, **options)
        with torch.inference_mode():
            found[lowering] = model.generate(**asked)
        ckv_compile.restore(model)
    assert torch.equal(found["inductor"], found["eager"])
    shared = [line for line in caplog.messages if "share their code" in line]
    assert any(not line.startswith("0 ") for line in shared)
