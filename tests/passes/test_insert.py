"""Insertion: what the cache holds afterwards, and what must not change."""

from __future__ import annotations

import capture
import pytest
import torch
from capture import attention, captured, qkv

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference
from ckv_compile.passes.insert import insert_eviction
from ckv_compile.passes.match import match_sites
from ckv_compile.passes.nodes import outputs_of
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.passes.verify import VerificationError, verify

CONFIG = EvictionConfig(budget=9, window_size=3, kernel_size=3)


def in_order(gm):
    """Run a captured graph again; the attention's output first, then what it caches."""
    results = gm(*gm.meta["inputs"])
    return sorted(results, key=lambda x: x.dim())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cache_outputs_hold_the_reference_selection(kv_heads):
    """The contents count: a graph with the right shapes and the wrong entries is wrong."""
    args = (*qkv(kv_heads), capture.weight())

    def repeat(x):
        return x.repeat_interleave(4 // kv_heads, dim=1)

    gm = captured(attention(repeat=repeat), *args)
    before, key, value = in_order(gm)
    found = rewrite(gm, CONFIG)
    assert len(found.inserted) == 1 and found.rejections == ()
    after, kept_key, kept_value = in_order(gm)

    scores = reference.window_attention(args[0], key, None, 3, 3)
    norms = reference.projected_norm(value, args[3], False, 4, "l1")
    keep = reference.select(scores, norms, 9, 3, 0.5, 1e-4)
    expected_key, expected_value = reference.compact(key, value, keep)
    assert torch.equal(after, before)  # attention in this call reads everything
    assert torch.equal(kept_key, expected_key) and torch.equal(kept_value, expected_value)
    assert kept_key.is_contiguous()
    assert kept_key.untyped_storage().nbytes() == kept_key.numel() * kept_key.itemsize


def test_second_run_inserts_nothing():
    """A backend inside a backend must not evict from the evicted."""
    gm = captured(attention(), *qkv(), capture.weight())
    assert len(rewrite(gm, CONFIG).inserted) == 1
    code = gm.code
    assert rewrite(gm, CONFIG).inserted == ()
    assert gm.code == code


def test_full_budget_inserts_nothing():
    gm = captured(attention(), *qkv(), capture.weight())
    code = gm.code
    assert rewrite(gm, EvictionConfig(budget=1.0)).inserted == ()
    assert gm.code == code


def test_one_readable_node_per_site_with_metadata():
    """Without stack_trace and example_value later passes and error messages are blind."""
    gm = captured(attention(), *qkv(), capture.weight(), dynamic=True)
    (inserted,) = rewrite(gm, CONFIG).inserted
    assert inserted.node.op == "call_module" and inserted.node.target == "ckv_evict_0"
    assert [str(node) for node in gm.graph.nodes].count("ckv_evict_0") == 1
    key, *_ = inserted.node.meta["example_value"]
    assert key.shape[2] is not None and key.dtype == torch.float32
    assert "stack_trace" in inserted.node.meta


def test_budget_stays_symbolic_in_the_graph():
    """A budget that is specialised to the first prompt costs a compile for each prompt."""
    args = (*qkv(q_len=60), capture.weight())
    gm = captured(attention(), *args, dynamic=True)
    config = EvictionConfig(budget="max(8, n/4)", window_size=3)
    (inserted,) = rewrite(gm, config).inserted
    size = inserted.node.meta["example_value"][0].shape[2]
    assert isinstance(size, torch.SymInt) and size.node.expr.free_symbols


def test_verify_refuses_a_changed_output():
    """The last pass must catch a pass that returns something else than promised."""
    gm = captured(attention(), *qkv(), capture.weight())
    before = outputs_of(gm)
    sites, _ = match_sites(gm)
    inserted = insert_eviction(gm, sites, CONFIG)
    verify(gm, before, inserted)
    with pytest.raises(VerificationError, match="not an eviction"):
        verify(gm, before, [broken_copy(gm, inserted[0], sites)])


def broken_copy(gm, inserted, sites):
    """The same eviction, but the graph returns the uncut K again."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    site = sites[0]
    returned = list(output.args[0])
    returned[site.key_outputs[0]] = site.cache_key
    output.args = (tuple(returned),)
    return inserted


def test_verify_refuses_a_changed_other_output():
    gm = captured(attention(), *qkv(), capture.weight())
    before = outputs_of(gm)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = (tuple(reversed(output.args[0])),)
    with pytest.raises(VerificationError, match="output 0"):
        verify(gm, before, [])
