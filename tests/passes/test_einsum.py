"""Einsum: its letters are its axes. What they prove is accepted, the rest is refused."""

from __future__ import annotations

import capture
import pytest
import torch
from capture import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, attention, captured, qkv

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference
from ckv_compile.passes.einsum import spell_out_einsums
from ckv_compile.passes.match import match_sites
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.site import Reason

SIZES = {"b": 2, "h": 4, "q": 37, "k": 53, "d": 16, "e": 64}
BATCHED = [
    "bhqd,bhkd->bhqk",
    "bqhd,bkhd->bhqk",
    "bhkd,bhqd->bhqk",
    "bqhd,bhkd -> bhqk",
    "bhqk,bhkd->bhqd",
    "bhqk,bkhd->bqhd",
    "bhkd,bhqk->bqhd",
]


def ran(graph, *args):
    """What the graph gives for ``args``, in the order in which the function takes them."""
    order = {f"l_inputs_{i}_": arg for i, arg in enumerate(args)}
    return graph(*(order[node.name] for node in graph.graph.find_nodes(op="placeholder")))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 37])
@pytest.mark.parametrize("equation", BATCHED)
def test_the_spelling_is_bit_by_bit_what_einsum_gives(equation, q_len, dtype):
    """Whoever keeps the whole cache must get the unmodified model's numbers."""
    sizes = {**SIZES, "q": q_len}
    letters = equation.replace(" ", "").split("->")[0].split(",")
    args = [torch.randn(*(sizes[axis] for axis in axes)).to(dtype) for axes in letters]
    graph = captured(lambda *args: torch.einsum(equation, *args), *args)
    spell_out_einsums(graph)
    expected, got = torch.einsum(equation, *args), ran(graph, *args)
    assert torch.equal(got, expected)
    if q_len > 1:
        assert not any("einsum" in node.name for node in graph.graph.nodes)
        assert got.stride() == expected.stride()


LEFT_ALONE = {
    "diagonal": ("bhqq,bhqd->bhqd", (2, 4, 5, 5), (2, 4, 5, 6)),
    "ellipsis": ("...qd,...kd->...qk", (2, 4, 5, 6), (2, 4, 7, 6)),
    "no result": ("bhqd,bhkd", (2, 4, 5, 6), (2, 4, 7, 6)),
    "two summed": ("bhqd,bhkd->bqk", (2, 4, 5, 6), (2, 4, 7, 6)),
    "summed on one side": ("bhqd,bhkd->bhkd", (2, 4, 5, 6), (2, 4, 7, 6)),
    "a size of one repeated": ("bhqd,bhkd->bhqk", (2, 4, 5, 6), (2, 1, 7, 6)),
    "grouped": ("bhgqd,bhkd->bhgqk", (2, 2, 3, 5, 6), (2, 2, 7, 6)),
}


@pytest.mark.parametrize(("equation", "one", "two"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_equations_stay_as_they_are(equation, one, two):
    args = torch.randn(*one), torch.randn(*two)
    graph = captured(lambda *args: torch.einsum(equation, *args), *args)
    before = [(node.op, node.target) for node in graph.graph.nodes]
    spell_out_einsums(graph)
    assert [(node.op, node.target) for node in graph.graph.nodes] == before
    assert torch.equal(ran(graph, *args), torch.einsum(equation, *args))


def test_three_operands_stay_as_they_are():
    x = torch.randn(2, 4, 5, 6)
    graph = captured(lambda x: torch.einsum("bhqd,bhkd,bhkd->bhqk", x, x, x), x)
    spell_out_einsums(graph)
    assert any("einsum" in node.name for node in graph.graph.nodes)


# --- whole attentions


def written(scores="bhqd,bhkd->bhqk", output="bhqk,bhkd->bhqd"):
    def sdpa(q, k, v):
        logits = torch.einsum(scores, q, k) * HEAD_DIM**-0.5
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        bias = torch.where(seen, 0.0, float("-inf"))
        return torch.einsum(output, (logits + bias).softmax(dim=-1), v)

    return sdpa


WEIGHTS = (HEADS, HEAD_DIM, HIDDEN)


def project(equation, shape=WEIGHTS):
    return lambda o, w: torch.einsum(equation, o, w.view(*shape))


def heads_apart(project):
    return {"merge": lambda o: o, "project": project}


PROJECTIONS = {
    "bhqd,hde->bqe": ((), WEIGHTS),
    "bqhd,hde->bqe": ((1, 2), WEIGHTS),
    "bqhd,ehd->bqe": ((1, 2), (HIDDEN, HEADS, HEAD_DIM)),
    "bqhd,hed->bqe": ((1, 2), (HEADS, HIDDEN, HEAD_DIM)),
    "bqhd,dhe->bqe": ((1, 2), (HEAD_DIM, HEADS, HIDDEN)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("equation", PROJECTIONS)
def test_everything_written_with_einsum(equation, dynamic):
    """The site's W_O^h must be the slice that the equation gives to head h."""
    swapped, shape = PROJECTIONS[equation]
    args = (*qkv(KV_HEADS, 80), capture.weight())
    fn = attention(
        sdpa=written(),
        repeat=lambda x: x.repeat_interleave(HEADS // KV_HEADS, dim=1),
        merge=lambda o: o.transpose(*swapped) if swapped else o,
        project=project(equation, shape),
    )
    graph = captured(fn, *args, dynamic=dynamic)
    found = rewrite(graph, EvictionConfig(budget=0.5))
    assert found.rejections == () and len(found.inserted) == 1
    (site,) = found.sites
    assert (site.num_key_value_groups, site.mask_kind) == (2, "causal tensor")
    assert site.scale == pytest.approx(HEAD_DIM**-0.5)
    # The weight as [H * D, E], written here by hand.
    axes = equation.split("->")[0].split(",")[1]
    weight = args[3].view(*shape).permute(*(axes.index(axis) for axis in "hde"))
    weight = weight.reshape(HIDDEN, HIDDEN)
    query, key, value = args[0], *((x + 0 * args[0][:, :KV_HEADS]) * 2 for x in args[1:3])
    scores = reference.window_attention(query, key, None, 32, 7)
    norms = reference.projected_norm(value, weight, True, HEADS, "l1")
    keep = reference.select(scores, norms, 40, 32, 0.5, 1e-4)
    expected = fn(*args)[0], *reference.compact(key, value, keep)
    outputs = graph(*graph.meta["inputs"])
    for want in expected:
        assert any(
            got.shape == want.shape and torch.allclose(got, want, atol=1e-4) for got in outputs
        )


REFUSED = {
    # Letters are names only: these say that what is asked with is the key.
    "operands swapped": ({"sdpa": written(scores="bhkd,bhqd->bhqk")}, Reason.CACHE_NOT_FOUND),
    "scores swapped": ({"sdpa": written(scores="bhqd,bhkd->bhkq")}, Reason.CACHE_NOT_FOUND),
    "weights swapped": ({"sdpa": written(output="bhkq,bhkd->bhqd")}, Reason.ATTENTION_UNREADABLE),
    "queries in place of heads": (heads_apart(project("bqhd,hde->bqe")), Reason.OUTPUT_AXES),
    "queries projected": (heads_apart(project("bhqd,qde->bhe")), Reason.OUTPUT_AXES),
    "each head apart": (heads_apart(project("bhqd,hde->bhqe")), Reason.OUTPUT_OP),
    "features alone": (
        heads_apart(lambda o, w: torch.einsum("bhqd,de->bhqe", o, w[:HEAD_DIM])),
        Reason.OUTPUT_AXES,
    ),
}


@pytest.mark.parametrize(("parts", "reason"), REFUSED.values(), ids=REFUSED)
def test_look_alikes_are_refused(parts, reason):
    """Q == H here, so that no size can tell the axes apart."""
    fn = attention(**{"sdpa": written(), **parts})
    graph = captured(fn, *qkv(q_len=HEADS), capture.weight())
    spell_out_einsums(graph)
    sites, (rejection,) = match_sites(graph)
    assert sites == () and rejection.reason is reason


def test_an_einsum_over_merged_heads_is_a_linear_layer():
    fn = attention(sdpa=written(), project=lambda x, w: torch.einsum("bqi,oi->bqo", x, w))
    graph = captured(fn, *qkv(), capture.weight())
    spell_out_einsums(graph)
    ((site,), ()) = match_sites(graph)
    assert not site.projection.matrix.in_out and site.projection.matrix.axes == ()
