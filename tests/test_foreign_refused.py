"""Foreign models whose cache cannot shrink, or would be wrong if it did: refused, with a reason."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from families import prompt
from models import BARE, LAYERS, STATIC, made
from torch import nn

import ckv_compile
from ckv_compile.region import WrongPositionsError

N, STEPS = 80, 5


def optimized(model, budget):
    return ckv_compile.optimize(model, budget, lowering="eager")


def reports(model):
    return model._compiled_call_impl.region.reports


# --- caches that cannot shrink


@pytest.mark.parametrize("cache", STATIC.values(), ids=STATIC)
def test_static_buffers_are_refused_and_left_alone(cache):
    """A buffer of full length looked like a later turn; the report said nothing of it."""

    def logits_of(model):
        ids, pos, logits = prompt(N), torch.arange(N), []
        with torch.no_grad():
            for _ in range(STEPS):
                logits.append(model(ids, pos)[:, -1])
                ids, pos = logits[-1].argmax(-1, keepdim=True), pos[-1:] + 1
        return torch.stack(logits)

    expected = logits_of(made(lambda: models.AttributeModel(cache)))
    model = optimized(made(lambda: models.AttributeModel(cache)), 0.5)
    with pytest.warns(UserWarning, match="the cache is not cut and the model runs unchanged"):
        logits = logits_of(model)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected)
    prefill = reports(model)[0]
    assert prefill.sites == () and prefill.evicted == 0
    assert [row.reason for row in prefill.rejections] == ["CACHE_NOT_FOUND"] * LAYERS
    assert all("256 slots, written in place" in row.detail for row in prefill.rejections)
    assert all("a buffer written in place cannot shrink" in r.cure for r in prefill.rejections)
    assert all(report.evicted == 0 for report in reports(model))


def test_torch_decoder_has_no_cache_and_is_left_alone():
    """nn.MultiheadAttention was not seen at all; a user asks why nothing got smaller."""
    ids, memory = prompt(N), torch.randn(1, 7, models.HIDDEN)
    model = made(models.TorchDecoder)
    with torch.no_grad():
        expected = model(ids, memory)
        with pytest.warns(UserWarning, match="the cache is not cut"):
            assert torch.equal(optimized(model, 0.5)(ids, memory), expected)
    (report,) = reports(model)
    # Self-attention and cross-attention of each layer.
    assert [row.reason for row in report.rejections] == ["CACHE_NOT_FOUND"] * 2 * LAYERS
    assert report.rejections[0].site == "decoder.layers.0.self_attn"
    assert "makes its K and V inside of itself" in report.rejections[0].detail


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_alone_is_left_alone(need_weights):
    model = nn.MultiheadAttention(models.HIDDEN, models.HEADS, batch_first=True).eval()
    x = torch.randn(2, N, models.HIDDEN)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    report = ckv_compile.explain(model, x, x, x, attn_mask=mask, need_weights=need_weights)
    assert report.sites == () and [r.reason for r in report.rejections] == ["CACHE_NOT_FOUND"]


def test_encoder_layers_of_torch_are_left_alone():
    layer = nn.TransformerEncoderLayer(models.HIDDEN, models.HEADS, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS).eval()
    report = ckv_compile.explain(model, torch.randn(2, N, models.HIDDEN))
    assert report.sites == () and {r.reason for r in report.rejections} == {"CACHE_NOT_FOUND"}


# --- positions


class CountedGrowing(models.AttributeModel):
    """Takes positions from what its first layer holds."""

    def forward(self, idx):
        held = self.layers[0].attn.kv_cache.k
        start = 0 if held is None else held.shape[2]
        return super().forward(idx, torch.arange(start, start + idx.shape[1]))


COUNTING = {
    "tuples": (models.NanoGPT, lambda model, ids, cache: model(ids, past_kvs=cache)),
    "attributes": (
        lambda: CountedGrowing(models.GrowingCache),
        lambda model, ids, cache: (model(ids), None),
    ),
}


@torch.no_grad()
def counted_run(call, model, steps=STEPS):
    ids, cache, tokens = prompt(N), None, []
    for _ in range(steps):
        logits, cache = call(model, ids, cache)
        ids = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize(("make", "call"), COUNTING.values(), ids=COUNTING)
def test_positions_from_the_length_of_a_cut_cache_are_an_error(make, call):
    """After a cut the length says 40 where 80 tokens were: wrong tokens, silently."""
    model = optimized(made(make), 0.5)
    assert len(counted_run(call, model, steps=1)) == 1
    model = optimized(made(make), 0.5)
    with pytest.raises(WrongPositionsError, match="Pass the positions of new tokens"):
        counted_run(call, model, steps=2)
    # Not only where it was compiled: the next prompt must not be cut either.
    with pytest.raises(WrongPositionsError):
        counted_run(call, model, steps=1)


@pytest.mark.parametrize("budget", [1.0, 500])
@pytest.mark.parametrize(("make", "call"), COUNTING.values(), ids=COUNTING)
def test_positions_from_the_length_of_a_whole_cache_are_right(make, call, budget):
    assert counted_run(call, optimized(made(make), budget)) == counted_run(call, made(make))


def test_the_bare_backend_warns_of_counted_positions(caplog):
    make, call = COUNTING["tuples"]
    model = made(make)
    model.compile(backend="criticalkv", dynamic=True, **BARE)
    counted_run(call, model, steps=2)
    assert "it takes positions from the cache's length" in caplog.text


def test_the_report_of_a_decode_step_names_the_layer_that_counts():
    model = made(models.NanoGPT)
    with torch.no_grad():
        _, cache = model(prompt(N))
    report = ckv_compile.explain(model, prompt(1), past_kvs=cache)
    assert [row.reason for row in report.rejections] == ["POSITIONS"] * LAYERS
    assert report.rejections[0].site == "layers.0.attn"


# --- other ways to look like a cache that can be cut


class Attending(models.FusedAttention):
    """What the class attribute ``keep`` makes of K and V goes into the cache."""

    def forward(self, x, past):
        q, k, v = (models.split_heads(p, models.HEADS) for p in self.c_attn(x).split(64, dim=2))
        k, v, pair = self.keep(k, v, past)
        return self.wo(self.attend(q, k, v)), pair


def unrotated(self, k, v, past):
    """Keys are rotated at each call anew, by their slots."""
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    return models.rotated(k, torch.arange(k.shape[2])), v, (k, v)


def stacked(self, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    pair = torch.stack([k, v])
    return k, v, pair


def copied(self, k, v, past):
    """A static buffer without a write in place: the new one is as long as the old."""
    at = torch.arange(k.shape[2])
    empty = torch.zeros(1, models.HEADS, N, models.HEAD_DIM)
    k, v = empty.index_copy(2, at, k), empty.index_copy(2, at, v)
    return k, v, (k, v)


def written(self, k, v, past):
    held = torch.zeros(1, models.HEADS, N, models.HEAD_DIM), torch.zeros_like(v)
    for one, new in zip(held, (k, v), strict=True):
        one[:, :, :] = new
    return *held, held


def features_first(self, k, v, past):
    k = k.transpose(2, 3).contiguous()
    return k.transpose(2, 3), v, (k, v)


def tokens_first(self, k, v, past):
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return k.transpose(1, 2), v.transpose(1, 2), (k, v)


def normed(self, k, v, past):
    """What attention reads is no mere relayout of what is kept."""
    return F.normalize(k, dim=-1) * 4, v, (k, v)


def bounded(self, k, v, past):
    return k, v, (k[:, :, -33:], v[:, :, -33:])


KEEPS = {
    "rotated by slots": (unrotated, "CACHE_NOT_FOUND"),
    "stacked": (stacked, "CACHE_NOT_FOUND"),
    "index_copy": (copied, "CACHE_NOT_FOUND"),
    "written": (written, "CACHE_NOT_FOUND"),
    "features first": (features_first, "KEY_AXES"),
    "tokens first": (tokens_first, "KEY_AXES"),
    "normed": (normed, "CACHE_NOT_FOUND"),
    "bounded": (bounded, "SLIDING_WINDOW"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("keep", "reason"), KEEPS.values(), ids=KEEPS)
def test_caches_that_would_break_are_refused(keep, reason, dynamic):
    """Sizes prove nothing: each of these is as long as the prompt is."""
    attention = type("Attention", (Attending,), {"keep": keep})
    ids, pos = prompt(N), torch.arange(N)
    with torch.no_grad():
        expected = made(lambda: models.NanoGPT(attention))(ids, pos)
        model = made(lambda: models.NanoGPT(attention))
        if dynamic:
            with pytest.warns(UserWarning, match=reason):
                got = optimized(model, 0.5)(ids, pos)
        else:
            model.compile(backend="criticalkv", **BARE)
            got = model(ids, pos)
    torch.testing.assert_close(got, expected)
    found = ckv_compile.explain(made(lambda: models.NanoGPT(attention)), ids, pos)
    assert [row.reason for row in found.rejections] == [reason] * LAYERS


class ComparedMask(models.FusedAttention):
    """Several tokens behind a cache: their positions are compared with its slots."""

    def forward(self, x, past):
        self.first = 0 if past is None else N
        return super().forward(x, past)

    def attend(self, q, k, v):
        if q.shape[2] == k.shape[2] or q.shape[2] == 1:
            return super().attend(q, k, v)
        positions = torch.arange(q.shape[2]) + self.first
        seen = torch.arange(k.shape[2]) <= positions[:, None]
        return models.merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_mask_of_positions_against_slots_is_an_error_behind_a_cut(budget):
    """47 slots, positions 80 to 86: each new token would see those that follow it."""
    ids, more, pos = prompt(N), prompt(7, seed=1), torch.arange(N, N + 7)
    plain, model = (made(lambda: models.NanoGPT(ComparedMask)) for _ in range(2))
    optimized(model, budget)
    with torch.no_grad():
        _, cache = model(ids, torch.arange(N))
        if budget == 1.0:
            _, expected = plain(ids, torch.arange(N))
            got = model(more, pos, cache)[0]
            torch.testing.assert_close(got, plain(more, pos, expected)[0])
        else:
            with pytest.raises(WrongPositionsError, match="compares positions with slots"):
                model(more, pos, cache)


class Split(nn.Module):
    """Breaks the graph on both sides of its softmax: no graph holds an attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = q @ (k * 2).mT
        torch._dynamo.graph_break()
        weights = logits.softmax(-1)
        torch._dynamo.graph_break()
        return weights @ v


def test_an_attention_in_pieces_is_told_from_none_at_all():
    """Nothing is rejected where nothing is seen: the user must hear of the breaks all the same."""
    model = ckv_compile.optimize(Split().eval(), 0.5, lowering="eager")
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"traced as \d graphs.* graph breaks"):
        got = model(q, k, v)
    torch.testing.assert_close(got, Split()(q, k, v))
