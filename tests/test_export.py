"""``torch.export``: what a program returns, saved, loaded, through AOTInductor; and refusals."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import capture
import pytest
import torch
import torch.nn.functional as F
from capture import attention, exported, qkv
from families import FAMILIES, prompt, tiny
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import OutputKind
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictionConfig
from ckv_compile.kernels import reference
from ckv_compile.methods.evict import EvictKV
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.passes.verify import VerificationError

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 64
OPTIONS = {"window_size": 4, "kernel_size": 3}
LENGTHS = (2, 4, 5, 11, 40, 41, 100)


class Layer(nn.Module):
    """Grouped-query attention that returns its K and V; a plain module, no transformers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def heads(self, x):
        shape = (x.shape[0], x.shape[1], -1, HEAD_DIM)
        return [p(x).view(shape).transpose(1, 2) for p in self.qkv]

    def forward(self, x):
        q, k, v = self.heads(x)
        merged = self.attended(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.out(merged), k, v

    def attended(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(seed) for seed in range(2))

    def forward(self, x):
        caches = {}
        for i, layer in enumerate(self.layers):
            more, *caches[f"layer {i}"] = layer(x)
            x = x + more
        return x, caches


class Prefill(nn.Module):
    """A transformers model whose prefill returns logits, keys and values as plain tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        done = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        layers = done.past_key_values.layers
        return (done.logits, *((layer.keys, layer.values) for layer in layers))


def program_of(module, *args, **options):
    """Exported with a symbolic batch and length."""
    options.setdefault("dynamic_shapes", [{0: Dim("batch", max=8), 1: Dim("n", min=2, max=512)}])
    options["dynamic_shapes"] = tuple(options["dynamic_shapes"]) * len(args)
    with torch.no_grad():
        return torch.export.export(module, args, **options)


def hidden(n, batch=2):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(n))


def run(program, *args):
    with torch.no_grad():
        return program.module()(*args)


def expected(layer, x, config):
    """K and V that the reference keeps of one layer's."""
    with torch.no_grad():
        query, key, value = layer.heads(x)
    n, window = x.shape[1], config.window_size
    norms = None
    scores = reference.window_attention(query, key, None, window, config.kernel_size)
    if config.method == "criticalkv":
        weight = layer.out.weight.detach()
        norms = reference.projected_norm(value, weight, False, HEADS, config.norm)
    ratio, epsilon = config.first_stage_ratio, config.epsilon
    keep = reference.select(scores, norms, config.entries(n), window, ratio, epsilon)
    return reference.compact(key, value, keep)


@pytest.fixture(scope="module")
def plain():
    return program_of(Layer(), hidden(30))


@pytest.fixture(scope="module")
def llama():
    return program_of(Prefill(tiny()), prompt(40, batch=2))


# --- what the program returns


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.25},
        {"budget": 9, "method": "snapkv"},
        {"budget": "max(8, n/3 + 2)", "norm": "l2", "first_stage_ratio": 0.25},
    ],
    ids=["criticalkv", "snapkv", "expression, l2"],
)
def test_prefill_returns_what_the_reference_keeps_at_every_length(plain, options):
    """One symbolic program serves all prompts: a length fixed by the trace cuts them wrongly."""
    config = EvictionConfig(**{**OPTIONS, **options})
    cut = ckv_compile.optimize(plain, **OPTIONS, **options)
    layer = Layer()
    for n in LENGTHS:
        x = hidden(n, batch=3)
        before, after = run(plain, x), run(cut, x)
        kept_key, kept_value = expected(layer, x, config)
        assert torch.equal(after[0], before[0])  # attention in this call reads everything
        assert kept_key.shape[2] == config.entries(n)
        assert torch.equal(after[1], kept_key) and torch.equal(after[2], kept_value)


def test_caches_are_found_wherever_the_module_returns_them():
    """Outputs are a tree; each cache must come back at its own place."""
    program, model = program_of(TwoLayers(), hidden(30)), TwoLayers()
    cut = ckv_compile.optimize(program, budget=0.3, **OPTIONS)
    x, config = hidden(50), EvictionConfig(budget=0.3, **OPTIONS)
    out, caches = run(cut, x)
    whole, uncut = run(program, x)
    assert torch.equal(out, whole) and list(caches) == list(uncut) == ["layer 0", "layer 1"]
    for layer, cache in zip(model.layers, caches.values(), strict=True):
        for got, want in zip(cache, expected(layer, x, config), strict=True):
            assert torch.equal(got, want)
        with torch.no_grad():
            x = x + layer(x)[0]


def test_static_program():
    program = program_of(Layer(), hidden(30), dynamic_shapes=[None])
    cut = ckv_compile.optimize(program, budget=7, **OPTIONS)
    x = hidden(30)
    want = expected(Layer(), x, EvictionConfig(budget=7, **OPTIONS))
    assert all(map(torch.equal, run(cut, x)[1:], want))


def test_names_that_python_has_taken():
    """A copied graph renames an input called "input", and the signature no longer fits."""

    class Named(Layer):
        def forward(self, input):
            return super().forward(input)

    cut = ckv_compile.optimize(program_of(Named(), hidden(30)), budget=9, **OPTIONS)
    assert cut.graph_signature.user_inputs == ("input",)
    want = expected(Layer(), hidden(30), EvictionConfig(budget=9, **OPTIONS))
    assert all(map(torch.equal, run(cut, hidden(30))[1:], want))


def test_the_same_cache_returned_twice_is_cut_twice():
    class Twice(Layer):
        def forward(self, x):
            out, k, v = super().forward(x)
            return out, k, v, k

    cut = ckv_compile.optimize(program_of(Twice(), hidden(30)), budget=9, **OPTIONS)
    _, key, _, again = run(cut, hidden(30))
    assert key.shape[2] == 9 and torch.equal(key, again)


def test_transformers_model_keeps_what_the_compiled_model_keeps(llama):
    """Masks under export are built in full; they must be read, or nothing would be cut."""
    cut = ckv_compile.optimize(llama, budget=0.5)
    compiled = ckv_compile.optimize(tiny(), budget=0.5, lowering="eager")
    for n in (30, 70, 120):
        ids = prompt(n, batch=3)
        logits, *caches = run(cut, ids)
        assert torch.equal(logits, run(llama, ids)[0])
        with torch.no_grad():
            layers = compiled(input_ids=ids, use_cache=True).past_key_values.layers
        for (key, value), layer in zip(caches, layers, strict=True):
            assert key.shape[2] == EvictionConfig(budget=0.5).entries(n)
            assert torch.equal(key, layer.keys) and torch.equal(value, layer.values)


# Conv1D, eager attention with a soft cap beside a sliding window, a transposed weight, fused QKV.
FAST = ("gpt2", "gemma2", "falcon", "phi3")


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_family_is_cut_exactly(family):
    """What Dynamo's graph of a family gives, torch.export's must give as well."""
    _, kv_heads, count, reasons = FAMILIES[family]
    shapes = [{0: Dim("batch", max=8), 1: Dim("n", min=16, max=512)}]
    program = program_of(Prefill(tiny(family)), prompt(40, 2), dynamic_shapes=shapes)
    found = ckv_compile.explain(program, config=EvictionConfig(budget=0.5))
    assert found.evicted == count and [row.reason for row in found.rejections] == list(reasons)
    ids = prompt(100, 3)
    logits, *caches = run(ckv_compile.optimize(program, budget=0.5), ids)
    assert torch.equal(logits, run(program, ids)[0])
    cut = [key for key, value in caches if key.shape == value.shape == (3, kv_heads, 50, 16)]
    assert len(cut) == count and len(caches) == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_optimised_model_is_exported_as_it_was_written(strict):
    """What stands in front of it would trace its own bookkeeping into the program."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    with torch.no_grad():
        program = torch.export.export(Prefill(model), (prompt(80),), strict=strict)
    assert not any("ckv_compile" in str(node.target) for node in program.graph.nodes)
    assert run(program, prompt(80))[1][0].shape[2] == 80
    assert run(ckv_compile.optimize(program, budget=0.5), prompt(80))[1][0].shape[2] == 40


def test_decoding_from_the_returned_cache_with_logical_positions(llama):
    """The tokens that optimize(model) generates, by a decode loop of one's own."""
    ids, model = prompt(90), tiny()
    logits, *caches = run(ckv_compile.optimize(llama, budget=0.5), ids)
    token = logits[:, -1:].argmax(-1)
    tokens, cache = [token], DynamicCache()
    for i, (key, value) in enumerate(caches):
        cache.update(key, value, i)
    with torch.no_grad():
        for position in range(90, 97):
            where = torch.tensor([[position]])
            token = model(token, past_key_values=cache, position_ids=where).logits.argmax(-1)
            tokens.append(token)
    compiled = ckv_compile.optimize(tiny(), budget=0.5, lowering="eager")
    wanted = compiled.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.cat(tokens, 1).tolist() == wanted[:, 90:].tolist()


def test_budget_in_bytes_counts_the_caches_of_the_whole_batch():
    program = program_of(TwoLayers(), hidden(30), dynamic_shapes=[{1: Dim("n", min=2, max=512)}])
    entry = 2 * 2 * 2 * KV_HEADS * HEAD_DIM * 4  # batch, layers, K and V
    cut = ckv_compile.optimize(program, budget=f"{10 * entry + 5}B", **OPTIONS)
    assert run(cut, hidden(60))[1]["layer 1"][0].shape[2] == 10
    with pytest.raises(ValueError, match="at least window_size"):
        ckv_compile.optimize(
            program_of(Layer(), hidden(30), dynamic_shapes=[None]), budget="900B", **OPTIONS
        )


# --- the program itself


def test_the_given_program_stays_as_it_is(plain):
    before = str(plain)
    cut = ckv_compile.optimize(plain, budget=0.25, **OPTIONS)
    ckv_compile.explain(plain)
    assert str(plain) == before and cut is not plain
    assert run(plain, hidden(40))[1].shape[2] == 40


def test_full_budget_changes_nothing(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = ckv_compile.optimize(plain, budget=1.0)
    assert str(same.graph) == str(plain.graph)
    assert same.graph_signature == plain.graph_signature


def test_signature_ranges_and_symbols_stay_true(llama):
    """A saved program is trusted by its signature; the kept length must follow the prompt's."""
    cut = ckv_compile.optimize(llama, budget=0.5)
    assert cut.range_constraints == llama.range_constraints
    assert cut.graph_signature.input_specs == llama.graph_signature.input_specs
    specs = cut.graph_signature.output_specs
    assert {spec.kind for spec in specs} == {OutputKind.USER_OUTPUT} and len(specs) == 5
    (output,) = (node for node in cut.graph.nodes if node.op == "output")
    assert [spec.arg.name for spec in specs] == [node.name for node in output.args[0]]
    assert output.args[0][0].name == llama.graph_signature.output_specs[0].arg.name
    for key in output.args[0][1:]:
        size = key.meta["val"].shape[2]
        assert isinstance(size, torch.SymInt) and size.node.expr.free_symbols
        assert key.name.startswith("ckv_evict_") and "self_attn" in str(key.meta["nn_module_stack"])
    assert all(node.op != "call_module" for node in cut.graph.nodes)


def test_optimising_twice_is_refused(plain):
    """A second cut would keep a share of a share."""
    cut = ckv_compile.optimize(plain, budget=0.25, **OPTIONS)
    for verb in (ckv_compile.optimize, ckv_compile.explain):
        with pytest.raises(ValueError, match="optimised already"):
            verb(cut)


def test_explain_needs_no_inputs_and_names_the_weights(llama):
    report = ckv_compile.explain(llama, config=EvictionConfig(budget=0.9))
    assert [row.action for row in report.sites] == ["evict", "evict"] and not report.rejections
    row = report.sites[1]
    assert row.site == "model.model.layers.1.self_attn"
    assert row.weight == "model.model.layers.1.self_attn.o_proj.weight [out, in]"
    assert (row.kv_len, row.budget, row.budget_from) == (40, 36, "config")
    with pytest.raises(ValueError, match="takes no inputs"):
        ckv_compile.explain(llama, input_ids=prompt(40))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"later_turns": "evict"}, "later_turns='evict'"),
        ({"mode": "default"}, "mode='default'"),
        ({"lowering": "eager"}, "lowering='eager'"),
        ({"rewrite_gqa": False}, "rewrite_gqa=False"),
        ({"share_regions": False}, "share_regions=False"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"method": "expected_attention"}, "not read of exported programs"),
    ],
)
def test_options_of_a_running_model_are_refused_by_name(plain, options, error):
    with pytest.raises(ValueError, match=error):
        ckv_compile.optimize(plain, **options)


def test_without_a_budget_the_default_is_said(plain, caplog):
    ckv_compile.optimize(plain)
    assert "no budget was given: it is 0.2" in caplog.text


def test_a_cut_that_would_fix_the_length_is_an_error(plain, monkeypatch):
    """A program has no guards: what the trace assumed of one prompt would cut all others so."""

    def forward(self, query, key, value, *args):
        kept = 9 if key.shape[2] > 20 else 5
        return key[:, :, :kept].clone(), value[:, :, :kept].clone()

    monkeypatch.setattr(EvictKV, "forward", forward)
    for _ in range(2):  # nor may the first attempt leave its guard behind
        with pytest.raises(VerificationError, match="every length"):
            ckv_compile.optimize(plain, budget=9, **OPTIONS)


# --- saved, loaded, compiled


def test_a_loaded_program_is_read_like_the_one_that_was_saved(llama):
    """The saved form loses what a pass may have leaned on: metadata, defaults, hints."""
    file = io.BytesIO()
    torch.export.save(llama, file)
    cut = ckv_compile.optimize(torch.export.load(file), budget=0.5)
    want = run(ckv_compile.optimize(llama, budget=0.5), prompt(77, batch=2))
    got = run(cut, prompt(77, batch=2))
    for one, other in zip(flat(got), flat(want), strict=True):
        assert torch.equal(one, other)


LOADS = """
import sys, torch
try:
    torch.export.load(sys.argv[1])
except RuntimeError:
    print("unknown")
import ckv_compile
given, want = torch.load(sys.argv[2])
with torch.no_grad():
    got = torch.export.load(sys.argv[1]).module()(given)
print(all(map(torch.equal, got, want)))
"""


def test_another_process_loads_it_once_it_knows_the_ops(plain, tmp_path):
    """The program holds ops of this package by name: without the import nobody knows them."""
    cut = ckv_compile.optimize(plain, budget=0.25, **OPTIONS)
    x = hidden(70)
    torch.export.save(cut, tmp_path / "cut.pt2")
    torch.save((x, run(cut, x)), tmp_path / "want.pt")
    command = [sys.executable, "-c", LOADS, tmp_path / "cut.pt2", tmp_path / "want.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["unknown", "True"]
    assert "custom op is not registered" in done.stderr and "ckv_compile" in done.stderr


@pytest.mark.slow
def test_aot_inductor_keeps_the_same_entries(plain, tmp_path):
    """Generated C++ calls our ops back with symbolic budgets and absent tensors."""
    cut = ckv_compile.optimize(plain, budget=0.25, **OPTIONS)
    path = torch._inductor.aoti_compile_and_package(cut, package_path=str(tmp_path / "cut.pt2"))
    compiled, config = torch._inductor.aoti_load_package(path), EvictionConfig(0.25, **OPTIONS)
    layer = Layer()
    for n in LENGTHS:
        x = hidden(n, batch=3)
        out, key, value = compiled(x)
        torch.testing.assert_close(out, run(plain, x)[0])
        for got, want in zip((key, value), expected(layer, x, config), strict=True):
            torch.testing.assert_close(got, want)


def test_decomposed_after_the_cut(plain):
    """Other backends want core ATen: the cut must survive it."""
    cut = ckv_compile.optimize(plain, budget=0.25, **OPTIONS).run_decompositions()
    x = hidden(70)
    want = expected(Layer(), x, EvictionConfig(budget=0.25, **OPTIONS))
    for got, one in zip(run(cut, x)[1:], want, strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.slow
def test_functional_form_is_read_as_well(llama):
    cut = ckv_compile.optimize(llama.run_decompositions({}), budget=0.5)
    want = run(ckv_compile.optimize(llama, budget=0.5), prompt(90))
    for one, other in zip(flat(run(cut, prompt(90))), flat(want), strict=True):
        assert torch.equal(one, other)


def flat(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


# --- what is left alone, and why


def refused(program, **options):
    """The reasons for which ``program`` is not cut; it must come back unchanged, with a warning."""
    with pytest.warns(UserWarning, match="no attention was matched") as seen:
        same = ckv_compile.optimize(program, budget=9, **OPTIONS, **options)
    assert str(same.graph) == str(program.graph)
    reasons = {row.reason for row in ckv_compile.explain(program).rejections}
    assert all(reason in str(seen[0].message) for reason in reasons)
    return reasons


def test_a_mask_that_may_pad_is_refused():
    """Nobody counts the rows' tokens in front of an exported program."""
    program = program_of(Prefill(tiny()), prompt(40, 2), torch.ones(2, 40, dtype=torch.long))
    assert refused(program) == {"PADDING_MASK"}


def test_a_decomposed_program_is_refused_with_the_cure(plain, llama):
    for program in (plain, llama):
        assert refused(program.run_decompositions()) == {"DECOMPOSED"}


def test_attention_in_a_graph_of_its_own_is_refused():
    """no_grad inside the call makes a nested graph, which no output of ours can leave."""

    class NoGrad(Layer):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    assert refused(torch.export.export(NoGrad(), (hidden(30),))) == {"NESTED_GRAPH"}


def test_training_mode_is_refused():
    class Dropout(Layer):
        def forward(self, x):
            out, k, v = super().forward(x)
            return F.dropout(out, 0.1, self.training), k, v

    assert refused(program_of(Dropout().train(), hidden(30))) == {"TRAINING"}
    assert ckv_compile.explain(program_of(Dropout().eval(), hidden(30))).evicted == 1


def test_a_program_without_attention_says_so():
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert refused(program) == set()


def test_a_decode_step_is_not_cut_and_says_so():
    class Step(Layer):
        def forward(self, x, past_key, past_value):
            q, k, v = self.heads(x)
            k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(out.transpose(1, 2).reshape(x.shape[0], 1, -1)), k, v

    past = [torch.randn(2, KV_HEADS, 20, HEAD_DIM) for _ in range(2)]
    with torch.no_grad():
        program = torch.export.export(Step(), (hidden(1), *past))
    with pytest.warns(UserWarning, match="the program is a decode, which is not cut"):
        ckv_compile.optimize(program, budget=9, **OPTIONS)


class Buffered(Layer):
    """A prefill as long as its static cache, which it fills in place."""

    def __init__(self):
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, KV_HEADS, 30, HEAD_DIM))

    def forward(self, x):
        q, k, v = self.heads(x)
        self.keys.copy_(k)
        self.values.copy_(v)
        merged = self.attended(q, self.keys, self.values).transpose(1, 2)
        return self.out(merged.reshape(x.shape[0], x.shape[1], -1)), self.keys * 1


def test_a_buffer_of_the_module_cannot_shrink():
    """Its functional form returns the new buffer like a cache; cut, it would not fit any more."""
    program = program_of(Buffered(), hidden(30), dynamic_shapes=[None])
    assert refused(program) == {"CACHE_NOT_FOUND"}
    functional = program.run_decompositions({})
    kinds = {spec.kind for spec in functional.graph_signature.output_specs}
    assert OutputKind.BUFFER_MUTATION in kinds
    assert refused(functional) == {"CACHE_NOT_FOUND"}


def spoil(name):
    """A layer that writes, in place and through a view, to what the attention reads."""

    class Spoilt(Layer):
        def attended(self, q, k, v):
            if name == "before":
                k[:, :, :, :4].mul_(2)
            if name == "mask":
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
                mask.view(-1)[:7].fill_(True)
                k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
                return F.scaled_dot_product_attention(q, k, v, mask)
            repeated = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)]
            if name == "repeated":
                repeated[0].transpose(1, 2)[:, 3].zero_()
            out = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
            if name == "query":
                q.select(2, 0).copy_(q.select(2, 1))
            if name == "key":
                k.transpose(1, 2)[:, 3].zero_()
            if name == "output":
                out.transpose(1, 2)[:, 3].zero_()
            return out

    return Spoilt()


@pytest.mark.parametrize("name", ["before", "mask", "query", "key", "repeated", "output"])
def test_what_is_written_through_a_view_is_refused(name):
    """A node's value then depends on when it is read: the cut would be made of other numbers."""
    program = program_of(spoil(name), hidden(30), dynamic_shapes=[None])
    reasons = refused(program)
    assert reasons <= {"WRITTEN_IN_PLACE", "OUTPUT_FORKS", "MASK_UNREADABLE"} and len(reasons) == 1


def test_a_write_that_ends_before_the_attention_is_cut_in_functional_form():
    """The cure that the refusal names."""
    program = program_of(spoil("before"), hidden(30), dynamic_shapes=[None])
    functional = program.run_decompositions({})
    cut = ckv_compile.optimize(functional, budget=9, **OPTIONS)
    before, after = run(program, hidden(30)), run(cut, hidden(30))
    assert torch.equal(before[0], after[0]) and after[1].shape[2] == 9
    rows = [set(map(tuple, head)) for head in before[1].flatten(0, 1).tolist()]
    kept = [set(map(tuple, head)) for head in after[1].flatten(0, 1).tolist()]
    assert all(some < every for some, every in zip(kept, rows, strict=True))


@torch.library.custom_op("ckv_tests::linear", mutates_args=())
def other_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x.flip(-1), w)


@other_linear.register_fake
def _(x, w):
    return F.linear(x, w)


def test_an_op_of_another_library_is_not_taken_for_atens_of_that_name():
    for linear in (torch.ops.ckv_tests.linear, torch.ops.ckv_tests.linear.default):
        fn, args = attention(project=linear), (*qkv(), capture.weight())
        assert refused(exported(fn, *args)) == {"OUTPUT_OP"}
        found = rewrite(capture.captured(fn, *args), EvictionConfig(9, **OPTIONS))
        assert [r.reason.name for r in found.rejections] == ["OUTPUT_OP"]


def test_rounded_division_is_no_scaling():
    """``div`` with a rounding mode has the name of a division."""

    def sdpa(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        logits = torch.div(q @ k.transpose(2, 3), 4.0, rounding_mode="floor")
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return (logits + bias).softmax(-1) @ v

    fn, args = attention(sdpa=sdpa), (*qkv(), capture.weight())
    assert refused(exported(fn, *args)) == {"ATTENTION_UNREADABLE"}
    found = rewrite(capture.captured(fn, *args), EvictionConfig(9, **OPTIONS))
    assert [r.reason.name for r in found.rejections] == ["ATTENTION_UNREADABLE"]
