"""``budget="64MB"``: bytes of the whole model's cache, counted where the caches are known."""

from __future__ import annotations

import pytest
import torch
from families import prompt, tiny

import ckv_compile
from ckv_compile import Budget, EvictedCache, EvictionConfig
from ckv_compile.budget import CacheBytes


@pytest.mark.parametrize(
    ("spec", "nbytes"),
    [
        ("64MB", 64_000_000),
        ("64 MiB", 64 * 2**20),
        ("1.5gb", 1_500_000_000),
        ("2KiB", 2048),
        ("900B", 900),
        ("0.3kB", 300),
    ],
)
def test_bytes_are_read_exactly(spec, nbytes):
    assert Budget(spec).nbytes == nbytes


@pytest.mark.parametrize("spec", ["0MB", "MB", "-1MB", "1e3MB", "64 M", "64MBB", "1 2MB"])
def test_what_is_no_number_of_bytes_is_refused(spec):
    with pytest.raises(ValueError, match=r"bytes such as \"64MB\""):
        Budget(spec)


def test_entries_are_rounded_down_and_cover_the_window():
    config = EvictionConfig(budget="1kB", window_size=4)
    assert config.entries(500, CacheBytes(entry=10)) == 100
    assert config.entries(500, CacheBytes(entry=11, other=100)) == 81  # 900 / 11
    assert config.entries(60, CacheBytes(entry=10)) == 60
    with pytest.raises(ValueError, match=r"budget='1kB' holds 4 entries.*window_size \+ 1 = 5"):
        config.entries(500, CacheBytes(entry=210))
    with pytest.raises(ValueError, match="no cache has been seen"):
        config.entries(500)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_takes_no_more_than_its_bytes(batch):
    """Another batch, the same bytes: fewer entries for each row."""
    model = ckv_compile.optimize(tiny(), "64kB", lowering="eager")
    for n in (300, 200):
        cache = EvictedCache()
        with torch.no_grad():
            model(input_ids=prompt(n, batch=batch), past_key_values=cache)
        entry = 2 * 2 * 2 * 16 * 4 * batch  # layers, K and V, heads, head_dim, float32
        assert cache.layers[0].held == min(n, 64_000 // entry)
        assert cache.nbytes == cache.layers[0].held * entry <= 64_000


def test_bounded_layers_are_paid_first():
    """Gemma 2's sliding windows take their part; the full layers get what is left."""
    model = ckv_compile.optimize(tiny("gemma2"), "64kB", lowering="eager")
    cache = EvictedCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(300), past_key_values=cache)
    window, each = 15, 2 * 2 * 16 * 4
    assert cache.layers[1].held == (64_000 - window * each) // each
    assert 64_000 - each < cache.nbytes <= 64_000


def test_bytes_follow_the_dtype():
    """Half the bytes an entry, twice the entries; what float32 took must not be remembered."""
    model = ckv_compile.optimize(tiny(), "32kB", lowering="eager")
    held = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = EvictedCache()
        with torch.no_grad():
            model.to(dtype)(input_ids=prompt(200), past_key_values=cache)
        held.append(cache.layers[0].held)
    assert held == [62, 125]


def test_padded_rows_share_the_bytes():
    model = ckv_compile.optimize(tiny(), "64kB", lowering="eager")
    ids, mask = prompt(300, batch=2), torch.ones(2, 300).long()
    mask[0, :260] = 0
    cache = EvictedCache()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert cache.layers[0].valid.sum(-1).tolist() == [40, 62]
    assert cache.nbytes <= 64_000


def test_too_few_bytes_say_how_many_it_takes():
    model = ckv_compile.optimize(tiny(), "10kB", lowering="eager")
    with pytest.raises(ValueError, match="33 entries: 16896 bytes"), torch.no_grad():
        model(input_ids=prompt(90))


def test_the_backend_counts_the_graphs_own_caches():
    """Without optimize nobody measures a call: the sites of the graph are what is known."""
    options = {"budget": "64kB", "lowering": "eager"}
    model = torch.compile(
        tiny(), backend="criticalkv", options=options, dynamic=True, isolate_recompiles=True
    )
    with torch.no_grad():
        out = model(input_ids=prompt(300, batch=2), use_cache=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [62, 62]


def test_a_model_without_such_a_cache_is_told():
    class Plain(torch.nn.Module):
        def forward(self, x):
            return x

    model = ckv_compile.optimize(Plain().eval(), "64kB", lowering="eager")
    with pytest.raises(ValueError, match="a Plain does not make"), torch.no_grad():
        model(torch.ones(1, 80).long())


def test_a_report_before_the_first_call_is_no_error():
    """Bytes are resolved when the caches are seen; until then the report is what was compiled."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    with torch.no_grad():
        model(input_ids=prompt(300), use_cache=True)
        ckv_compile.optimize(model, "64kB", lowering="eager")
        assert "evict" in str(ckv_compile.explain(model))
        model(input_ids=prompt(300), use_cache=True)
    site = ckv_compile.explain(model).sites[0]
    assert (site.kv_len, site.budget) == (300, 125)
