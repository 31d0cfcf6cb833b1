"""The matcher: every family it must read, every spelling, and all it must refuse with a reason."""

from __future__ import annotations

from collections import Counter

import capture
import pytest
import torch
import torch.nn.functional as F
from capture import BATCH, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, Q_LEN, attention, captured, qkv
from families import FAMILIES, prompt, tiny
from transformers import DynamicCache

from ckv_compile.config import EvictionConfig
from ckv_compile.passes.match import match_sites
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.site import Reason


def match(fn, *args, dynamic=False, **flags):
    """The sites and rejections of Dynamo's graph; torch.export's must be read alike."""
    found = match_sites(captured(fn, *args, dynamic=dynamic), **flags)
    program = capture.exported(fn, *args, dynamic=dynamic)
    assert facts(match_sites(program.graph_module, **flags)) == facts(found)
    return found


def facts(found):
    """What is known of each attention, whatever the dialect calls its nodes."""
    sites, rejections = found
    plain = (bool, int, float, str, tuple, type(None))
    read = [
        {name: value for name, value in vars(site).items() if isinstance(value, plain)}
        for site in sites
    ]
    for facts, site in zip(read, sites, strict=True):
        del facts["name"]  # a node's, where there is no module
        facts["terms"] = len(site.terms)
        facts["projection"] = (site.projection.matrix.in_out, site.projection.gated)
    return read, [rejection.reason for rejection in rejections]


def only_site(fn, *args, **flags):
    sites, rejections = match(fn, *args, **flags)
    assert rejections == ()
    (site,) = sites
    return site


def only_reason(fn, *args, **flags):
    sites, rejections = match(fn, *args, **flags)
    assert sites == ()
    (rejection,) = rejections
    assert rejection.detail and rejection.cure
    return rejection.reason


def inputs(kv_heads=HEADS, q_len=Q_LEN):
    return (*qkv(kv_heads, q_len), capture.weight())


# --- real models


def graph_of(model, dynamic, **inputs):
    return captured(lambda: model(**inputs), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_matched_exactly(family, dynamic):
    """A new transformers or torch that changes a graph must change these counts visibly."""
    _, kv_heads, count, reasons = FAMILIES[family]
    model = tiny(family)
    graph = graph_of(model, dynamic, input_ids=prompt(40, batch=2), use_cache=True)
    sites, rejections = match_sites(graph)
    assert len(sites) == count
    assert Counter(r.reason.name for r in rejections) == reasons
    for i, site in enumerate(sites):
        assert (site.index, site.phase) == (i, "prefill")
        assert (site.num_attention_heads, site.num_key_value_heads) == (4, kv_heads)
        assert (site.head_dim, site.value_head_dim) == (16, 16)
        assert site.num_key_value_groups == 4 // kv_heads
        assert len(site.key_outputs) == len(site.value_outputs) == 1
        assert site.mask_kind in ("is_causal", "causal tensor")


def test_sites_are_named_by_module_path():
    """A report that cannot say which layer it means is of no use."""
    graph = graph_of(tiny("gpt2"), False, input_ids=prompt(40), use_cache=True)
    names = [site.name for site in match_sites(graph)[0]]
    assert all(name.endswith(f"transformer.h.{i}.attn") for i, name in enumerate(names)), names


def test_soft_cap_and_scale_are_read_from_eager_attention():
    """Gemma 2 has no SDPA; leaving its soft cap out would score another attention."""
    graph = graph_of(tiny("gemma2"), False, input_ids=prompt(40), use_cache=True)
    (site,), _ = match_sites(graph)
    assert site.softcap == 50.0
    assert site.scale == pytest.approx(16**-0.5)


def test_decode_step_is_a_site_without_eviction():
    """q_len == 1 must be told from a prefill at trace time, never at run time."""
    model, cache = tiny(), DynamicCache()
    with torch.no_grad():
        model(input_ids=prompt(40), past_key_values=cache)
    graph = graph_of(model, True, input_ids=prompt(1), past_key_values=cache)
    sites, rejections = match_sites(graph)
    assert [site.phase for site in sites] == ["decode", "decode"] and rejections == ()


def test_second_turn_is_a_continuation():
    """Several tokens on a filled cache: kv_len > q_len, which is no fresh prefill."""
    model, cache = tiny(), DynamicCache()
    with torch.no_grad():
        model(input_ids=prompt(40), past_key_values=cache)
    graph = graph_of(model, True, input_ids=prompt(7), past_key_values=cache)
    assert {site.phase for site in match_sites(graph)[0]} == {"continuation"}


def test_padding_is_read_from_the_mask_and_refused_where_rows_are_not_counted():
    """A plain cache cannot follow which of its entries were pads: wrong tokens, silently."""
    mask = torch.ones(2, 40, dtype=torch.long)
    graph = graph_of(tiny(), False, input_ids=prompt(40, 2), attention_mask=mask, use_cache=True)
    sites, rejections = match_sites(graph)
    assert rejections == () and {site.mask_kind for site in sites} == {"causal, padded"}
    assert all("attention_mask" in site.padding.name for site in sites)
    found = rewrite(graph, EvictionConfig(budget=0.5))
    assert found.sites == () and found.inserted == ()
    assert {r.reason for r in found.rejections} == {Reason.PADDING_MASK}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_mask_of_ones_that_the_model_makes_hides_nothing(dtype):
    """Megatron-BERT makes one of floats where it is given none: no row is padded by it."""

    def mask(q, k):
        real = torch.ones(BATCH, k.shape[2], dtype=dtype).to(torch.bool)
        rows = torch.arange(BATCH)[:, None, None, None]
        return causal(q, k) & real[rows, torch.arange(k.shape[2])[None, None, None]]

    site = only_site(with_mask(mask), *inputs())
    assert site.mask_kind == "causal tensor" and site.padding is None


def test_sliding_window_model_is_left_alone():
    """Mistral's bounded layers take their mask from a counter, not from K: a cut breaks them."""
    graph = graph_of(tiny("mistral", sliding_window=16), False, input_ids=prompt(40))
    sites, rejections = match_sites(graph)
    assert sites == () and {r.reason for r in rejections} == {Reason.SLIDING_WINDOW}


# --- spellings

REPEATS = {
    "expand+reshape": lambda x: (
        x[:, :, None]
        .expand(BATCH, KV_HEADS, HEADS // KV_HEADS, x.shape[2], HEAD_DIM)
        .reshape(BATCH, HEADS, x.shape[2], HEAD_DIM)
    ),
    "unsqueeze+expand+flatten": lambda x: (
        x.unsqueeze(2).expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2)
    ),
    "repeat_interleave": lambda x: x.repeat_interleave(HEADS // KV_HEADS, dim=1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, HEADS // KV_HEADS, 1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_grouped_queries(repeat, dynamic):
    """The cache holds K before repeat_kv; evicting the repeated K would change its shape."""
    site = only_site(attention(repeat=repeat), *inputs(KV_HEADS), dynamic=dynamic)
    assert (site.num_key_value_heads, site.num_key_value_groups) == (KV_HEADS, 2)
    assert site.cache_key is not site.key


def test_grouped_queries_inside_sdpa():
    """enable_gqa=True leaves no repeat to read; the head counts tell."""

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    site = only_site(attention(sdpa=sdpa), *inputs(KV_HEADS))
    assert site.num_key_value_groups == 2 and site.cache_key is site.key


def test_no_groups():
    assert only_site(attention(), *inputs()).num_key_value_groups == 1


PROJECTIONS = {
    "linear": (F.linear, False),
    "linear+bias": (lambda x, w: F.linear(x, w, torch.ones(HIDDEN)), False),
    "addmm": (
        lambda x, w: torch.addmm(torch.ones(HIDDEN), x.reshape(-1, HIDDEN), w),
        True,
    ),
    "matmul": (torch.matmul, True),
    "x @ w.T": (lambda x, w: x @ w.T, True),
    "x @ w.t()": (lambda x, w: x @ w.t(), True),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("project", "in_out"), PROJECTIONS.values(), ids=PROJECTIONS)
def test_output_projection(project, in_out, dynamic):
    """The side on which W_O keeps H*D decides which of its slices belongs to a head."""
    site = only_site(attention(project=project), *inputs(), dynamic=dynamic)
    assert site.projection.matrix.in_out is in_out


MERGES = {
    "permute+flatten": lambda o: o.permute(0, 2, 1, 3).flatten(2),
    "contiguous+view": lambda o: o.transpose(1, 2).contiguous().view(o.shape[0], -1, HIDDEN),
    "two steps": lambda o: (
        o.reshape(BATCH, HEADS, -1, HEAD_DIM)
        .swapaxes(1, 2)
        .reshape(-1, HEADS, HEAD_DIM)
        .reshape(BATCH, -1, HIDDEN)
    ),
    "dropout in eval": lambda o: F.dropout(o, 0.1, False).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_output_layout(merge):
    assert only_site(attention(merge=merge), *inputs()).head_dim == HEAD_DIM


def test_eager_attention_with_a_written_out_mask():
    """Softmax between two products is the same site as SDPA, with its scale read from the graph."""

    def sdpa(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        logits = q @ k.transpose(-2, -1) / 8.0 + bias
        return logits.softmax(dim=-1) @ v

    site = only_site(attention(sdpa=sdpa), *inputs())
    assert site.scale == 0.125 and site.softcap is None and site.mask_kind == "causal tensor"


def causal(q, k):
    query, key = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return key[None, :] <= query[:, None]


def with_mask(mask, **options):
    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q, k), **options)

    return attention(sdpa=sdpa)


READABLE = {
    "le": causal,
    "ge": lambda q, k: torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2]),
    "shifted alike": lambda q, k: (
        torch.arange(k.shape[2]) + 3 <= (torch.arange(q.shape[2]) + 3)[:, None]
    ),
    "4-D": lambda q, k: causal(q, k)[None, None].expand(BATCH, 1, q.shape[2], k.shape[2]),
    "and true": lambda q, k: causal(q, k) & torch.ones((), dtype=torch.bool),
    "tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(),
    "additive": lambda q, k: torch.where(causal(q, k), 0.0, float("-inf")),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask", READABLE.values(), ids=READABLE)
def test_causal_mask_is_read_from_its_ops(mask, dynamic):
    site = only_site(with_mask(mask), *inputs(), dynamic=dynamic)
    assert site.mask_kind == "causal tensor"


# --- counter-examples: each would compute wrong numbers if it were matched

UNREADABLE = {
    "commuted": lambda q, k: causal(q, k).transpose(0, 1),
    "anti-causal": lambda q, k: torch.arange(k.shape[2]) >= torch.arange(q.shape[2])[:, None],
    "strict": lambda q, k: torch.arange(k.shape[2]) < torch.arange(q.shape[2])[:, None] + 1,
    "shifted": lambda q, k: torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + 2,
    "window": lambda q, k: (
        causal(q, k) & (torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None] - 4)
    ),
    "flipped": lambda q, k: causal(q, k).flip(0),
    "scaled shift": lambda q, k: (
        torch.arange(k.shape[2]) <= torch.add(torch.arange(q.shape[2]), 0, alpha=2)[:, None]
    ),
    "prefix": lambda q, k: causal(q, k) | (torch.arange(k.shape[2]) < 4),
    "strided": lambda q, k: torch.arange(0, 2 * k.shape[2], 2) <= torch.arange(q.shape[2])[:, None],
    "tril above the diagonal": lambda q, k: torch.ones(
        q.shape[2], k.shape[2], dtype=torch.bool
    ).tril(1),
    "small penalty": lambda q, k: torch.where(causal(q, k), 0.0, -1.0),
    "random": lambda q, k: torch.rand(q.shape[2], k.shape[2]) > 0.5,
    "not causal": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool),
}


@pytest.mark.parametrize("mask", UNREADABLE.values(), ids=UNREADABLE)
def test_other_masks_are_refused(mask):
    assert only_reason(with_mask(mask), *inputs()) is Reason.MASK_UNREADABLE


def test_mask_from_outside_is_refused():
    """A mask that is an input says nothing about its values."""

    def forward(q, k, v, w, mask):
        def sdpa(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return attention(sdpa=sdpa)(q, k, v, w)

    mask = torch.ones(Q_LEN, Q_LEN, dtype=torch.bool).tril()
    assert only_reason(forward, *inputs(), mask) is Reason.MASK_UNREADABLE


def merged_by(merge, q_len=Q_LEN):
    return attention(merge=merge), inputs(q_len=q_len)


OUTPUTS = {
    # Q == H: the shape alone cannot tell that the transpose is missing.
    "no transpose, Q == H": (
        *merged_by(lambda o: o.reshape(BATCH, -1, HIDDEN), q_len=HEADS),
        Reason.OUTPUT_AXES,
    ),
    "no transpose": (*merged_by(lambda o: o.reshape(BATCH, Q_LEN, HIDDEN)), Reason.OUTPUT_AXES),
    "[D, H] order": (
        *merged_by(lambda o: o.permute(0, 2, 3, 1).reshape(BATCH, -1, HIDDEN)),
        Reason.OUTPUT_AXES,
    ),
    "scaled": (*merged_by(lambda o: (o * 2).transpose(1, 2).flatten(2)), Reason.OUTPUT_OP),
    "gated": (
        *merged_by(lambda o: o.transpose(1, 2).flatten(2).sigmoid()),
        Reason.OUTPUT_OP,
    ),
    "normed": (
        *merged_by(lambda o: F.rms_norm(o.transpose(1, 2).flatten(2), (HIDDEN,))),
        Reason.OUTPUT_OP,
    ),
    "flipped": (*merged_by(lambda o: o.flip(2).transpose(1, 2).flatten(2)), Reason.OUTPUT_OP),
    "dropout in training": (
        *merged_by(lambda o: F.dropout(o, 0.0, True).transpose(1, 2).flatten(2)),
        Reason.TRAINING,
    ),
}


@pytest.mark.parametrize(("fn", "args", "reason"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_is_not_projected_head_by_head_is_refused(fn, args, reason):
    assert only_reason(fn, *args) is reason


def forked(x, w):
    return F.linear(x, w) + x


PROJECTED = {
    "forked": (attention(project=forked), Reason.OUTPUT_FORKS),
    "none": (attention(project=lambda x, w: x), Reason.NO_PROJECTION),
}


@pytest.mark.parametrize(("fn", "reason"), PROJECTED.values(), ids=PROJECTED)
def test_other_projections_are_refused(fn, reason):
    assert only_reason(fn, *inputs()) is reason


def test_permuted_key_is_refused():
    """D == K hides a permutation of K from every check of shapes (PyTorch issue 195320)."""
    args = inputs(q_len=HEAD_DIM)
    fn = attention(repeat=lambda x: x.permute(0, 1, 3, 2))
    assert only_reason(fn, *args) is Reason.KEY_AXES


def test_repeated_as_a_tile_is_refused():
    """[G, Hkv] order gives query head h the KV head h % Hkv: other groups than ours."""

    def repeat(x):
        return x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)

    assert only_reason(attention(repeat=repeat), *inputs(KV_HEADS)) is Reason.KEY_AXES


def test_cache_that_holds_another_key_is_refused():
    """Evicting a tensor that attention never saw would keep positions scored on another."""
    fn = attention(cached=lambda k, v: (k.flip(2), v))
    assert only_reason(fn, *inputs()) is Reason.CACHE_NOT_FOUND


def test_cache_that_is_written_in_place_is_refused():
    """The evicted copy would miss what is written to the cache after the attention."""
    fn = attention(cached=lambda k, v: (k.mul_(2), v))
    reasons = {r.reason for r in match(fn, *inputs())[1]}
    assert reasons == {Reason.CACHE_NOT_FOUND}


def test_no_cache_is_refused():
    assert only_reason(attention(cached=lambda k, v: ()), *inputs()) is Reason.CACHE_NOT_FOUND


def test_sliding_window_output_is_refused():
    fn = attention(cached=lambda k, v: (k[:, :, -7:], v[:, :, -7:]))
    assert only_reason(fn, *inputs()) is Reason.SLIDING_WINDOW


def test_two_attentions_on_one_cache_are_refused():
    """Each would evict by its own scores what the other still needs."""

    def forward(q, k, v, w):
        first, k, v = attention()(q, k, v, w)
        out = F.scaled_dot_product_attention(q + 1, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).flatten(2), w) + first, k, v

    sites, rejections = match(forward, *inputs())
    assert sites == () and [r.reason for r in rejections] == [Reason.SHARED_CACHE] * 2


def test_bidirectional_attention_is_refused():
    fn = attention(sdpa=F.scaled_dot_product_attention)
    assert only_reason(fn, *inputs()) is Reason.NOT_CAUSAL


def test_attention_dropout_is_refused():
    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    assert only_reason(attention(sdpa=sdpa), *inputs()) is Reason.DROPOUT


def test_training_and_gradients_are_refused():
    assert only_reason(attention(), *inputs(), training=True) is Reason.TRAINING
    assert only_reason(attention(), *inputs(), grad_enabled=True) is Reason.GRADIENTS


def test_other_softmax_is_not_taken_for_attention():
    """A router of experts ends in a softmax as well."""

    def forward(x, w):
        return F.linear(x, w).softmax(-1), x.view(2, 2, 3, 64).softmax(-1)

    assert match(forward, torch.randn(2, 6, 64), capture.weight()) == ((), ())


def test_matching_changes_nothing():
    graph = captured(attention(), *inputs())
    before = str(graph.graph)
    match_sites(graph)
    assert str(graph.graph) == before
