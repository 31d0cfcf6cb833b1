"""Models that are not from transformers: what shrinks, what is refused, and nothing in between."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import models
import pytest
import torch
import torch.nn.functional as F
from families import prompt
from models import BARE, LAYERS, STYLES, made
from torch._dynamo.utils import counters

import ckv_compile
from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference

N, STEPS = 80, 5


def optimized(model, budget, lowering="eager"):
    return ckv_compile.optimize(model, budget, lowering=lowering)


def reports(model):
    return model._compiled_call_impl.region.reports


@torch.no_grad()
def run(style, model, ids, steps=STEPS, cache=None, pos=None):
    """Greedy tokens, all logits, and each layer's K and V as the prompt left them."""
    idx, tokens, logits, pairs = ids, [], [], None
    pos = torch.arange(ids.shape[1]) if pos is None else pos
    for _ in range(steps):
        out, cache = style.call(model, idx, pos, cache)
        if pairs is None:
            pairs = [(k.clone(), v.clone()) for k, v in style.pairs(model, cache)]
        logits.append(out[:, -1])
        idx, pos = out[:, -1].argmax(-1, keepdim=True), pos[-1:] + 1
        tokens.append(idx)
    return torch.cat(tokens, 1), torch.stack(logits, 1), pairs


@torch.no_grad()
def reference_run(style, model, ids, config, steps=STEPS):
    """The same by the unmodified model, its caches cut by hand after the prompt."""
    queries = []

    def recording(attend, at=0):
        def attending(*args, **kwargs):
            query = args[at]
            queries.append(query if args[0] != "bqhd,bhkd->bhqk" else query.transpose(1, 2))
            return attend(*args, **kwargs)

        return attending

    with (
        mock.patch.object(
            F, "scaled_dot_product_attention", recording(F.scaled_dot_product_attention)
        ),
        mock.patch.object(models, "flex_attention", recording(models.flex_attention)),
        mock.patch.object(torch, "einsum", recording(torch.einsum, at=1)),
    ):
        out, cache = style.call(model, ids, torch.arange(ids.shape[1]), None)
    queries = [q for q in queries if q.dim() == 4 and q.shape[-1] == models.HEAD_DIM]
    queries = queries[:: len(queries) // LAYERS]
    cut = []
    for (k, v), query, block in zip(style.pairs(model, cache), queries, model.layers, strict=True):
        scores = reference.window_attention(query, k, None, config.window_size, config.kernel_size)
        norms = reference.projected_norm(v, style.weight(block), False, query.shape[1], config.norm)
        keep = reference.select(
            scores,
            norms,
            config.entries(ids.shape[1]),
            config.window_size,
            config.first_stage_ratio,
            config.epsilon,
        )
        cut.append(reference.compact(k, v, keep))
    cache = style.put(model, [(k.clone(), v.clone()) for k, v in cut])
    first = out[:, -1].argmax(-1, keepdim=True)
    tokens, logits, _ = run(style, model, first, steps - 1, cache, torch.tensor([ids.shape[1]]))
    return torch.cat([first, tokens], 1), torch.cat([out[:, -1:], logits], 1), cut


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_budget_of_one_is_the_model_itself(style):
    """Whoever keeps everything must get the unmodified model's tokens, in whole graphs."""
    ids = prompt(N)
    expected, _, held = run(style, made(style.make), ids)
    counters.clear()
    model = optimized(made(style.make), 1.0)
    tokens, _, pairs = run(style, model, ids)
    assert torch.equal(tokens, expected)
    assert not counters["graph_break"]
    for got, want in zip(pairs, held, strict=True):
        assert all(torch.equal(*both) for both in zip(got, want, strict=True))
    assert [(len(r.sites), len(r.rejections)) for r in reports(model)] == [(LAYERS, 0)] * 2


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_half_the_cache_is_what_the_reference_keeps(style):
    """The entries, and the tokens that follow from them, not only the sizes."""
    ids, config = prompt(N), EvictionConfig(budget=0.5)
    expected, all_logits, cut = reference_run(style, made(style.make), ids, config)
    _, whole, _ = run(style, made(style.make), ids)
    assert not torch.allclose(all_logits[:, 1:], whole[:, 1:], atol=1e-2)  # the cut is felt
    model = optimized(made(style.make), 0.5)
    tokens, logits, pairs = run(style, model, ids)
    for got, want in zip(pairs, cut, strict=True):
        for one, other in zip(got, want, strict=True):
            assert one.shape[2] == N // 2
            torch.testing.assert_close(one, other)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, all_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_other_lengths_and_budgets_compile_nothing(style):
    """A cache in a registered buffer was compiled anew for each token, until nothing was cut."""
    model = optimized(made(style.make), 0.5)
    run(style, model, prompt(N))
    graphs = len(reports(model))
    for n, budget in ((97, 0.5), (121, 0.4)):
        for block in model.layers:
            if hasattr(block.attn, "kv_cache"):
                block.attn.kv_cache = type(block.attn.kv_cache)()
        _, _, pairs = run(style, optimized(model, budget), prompt(n))
        sizes = {t.shape[2] for pair in pairs for t in pair}
        assert sizes == {EvictionConfig(budget=budget).entries(n)}
    assert len(reports(model)) == graphs


def test_a_second_turn_is_kept_whole():
    """Several tokens behind a cut cache: all of them are new, and nothing says how to cut again."""
    style = STYLES["nanogpt"]
    ids, more, config = prompt(N), prompt(7, seed=1), EvictionConfig(budget=0.5)
    plain = made(style.make)
    _, _, cut = reference_run(style, plain, ids, config, steps=2)
    expected = run(style, plain, more, cache=cut, pos=torch.arange(N, N + 7))
    model = optimized(made(style.make), 0.5)
    with torch.no_grad():
        _, cache = model(ids, torch.arange(N))
    tokens, _, pairs = run(style, model, more, cache=cache, pos=torch.arange(N, N + 7))
    assert torch.equal(tokens, expected[0])
    assert {t.shape[2] for pair in pairs for t in pair} == {N // 2 + 7}


def test_the_bare_backend_cuts_it_as_well():
    style = STYLES["nanogpt"]
    expected, _, cut = reference_run(style, made(style.make), prompt(N), EvictionConfig(budget=0.5))
    model = made(style.make)
    model.compile(backend="criticalkv", dynamic=True, **BARE)
    tokens, _, pairs = run(style, model, prompt(N))
    assert torch.equal(tokens, expected)
    for got, want in zip(pairs, cut, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_inductor_gives_the_reference_tokens():
    style = STYLES["nanogpt"]
    expected, _, cut = reference_run(style, made(style.make), prompt(N), EvictionConfig(budget=0.5))
    tokens, _, pairs = run(style, optimized(made(style.make), 0.5, "inductor"), prompt(N))
    assert torch.equal(tokens, expected)
    for got, want in zip(pairs, cut, strict=True):
        torch.testing.assert_close(got, want)


def test_bytes_are_not_counted_on_a_foreign_cache():
    style = STYLES["nanogpt"]
    with pytest.raises(ValueError, match="a NanoGPT does not make; give a share"):
        run(style, optimized(made(style.make), "64KB"), prompt(N))


def test_the_readme_example_prints_what_it_says():
    root = Path(ckv_compile.__file__).parents[1]
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    (block,) = (block for block in blocks if "class Model" in block)
    code = block.replace("budget=0.25", 'budget=0.25, lowering="eager"')
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == [str(100 + i) for i in range(8)]
