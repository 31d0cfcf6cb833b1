"""What the perturbation report says, against the definitions written out for one head."""

from __future__ import annotations

import base64
import dataclasses
import json
import re

import pytest
import torch
from families import prompt, tiny

import ckv_compile
from ckv_compile.config import EvictionConfig
from ckv_compile.evidence import pictures, variants
from ckv_compile.evidence.probe import Seen, Watcher
from ckv_compile.kernels import reference
from ckv_compile.methods.evict import EvictKV

N, WINDOW = 120, 16
BUDGETS = (0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def watcher(model):
    return Watcher(model)


@pytest.fixture(scope="module")
def seen(watcher):
    """Every attention of one prompt."""
    found: list[Seen] = []
    watcher(found.append, input_ids=prompt(N), use_cache=True)
    return found


@pytest.fixture(scope="module")
def report(model, watcher):
    ids = prompt(N)
    found = ckv_compile.perturbation(model, ids, BUDGETS, window_size=WINDOW, watcher=watcher)
    return dataclasses.replace(found, texts=tuple(f"<{i}>" for i in range(N)))


def by_hand(seen: Seen, head: int, kept: list[int], queries: range) -> tuple[float, float, float]:
    """``L``, ``theta`` and ``sigma`` of one query head, query by query, in float64."""
    inputs = seen.inputs
    width = inputs.query.shape[3]
    group = head * inputs.key.shape[1] // inputs.query.shape[1]
    keys, values = inputs.key[0, group].double(), inputs.value[0, group].double()
    weight = inputs.o_proj_weight if inputs.in_out else inputs.o_proj_weight.T
    projected = values @ weight[head * width : (head + 1) * width].double()
    norms = projected.abs().sum(-1)
    sums = torch.zeros(3, dtype=torch.float64)
    for t in queries:
        logits = keys[: t + 1] @ inputs.query[0, head, t].double() / width**0.5
        attention = logits.softmax(-1)
        held = [i for i in kept if i <= t]
        sigma = attention[held].sum()
        whole, left = attention @ projected[: t + 1], attention[held] @ projected[held] / sigma
        terms = attention * norms[: t + 1]
        theta = terms.sum() - (2 - 1 / sigma) * terms[held].sum()
        sums += torch.stack([(whole - left).abs().sum(), theta, sigma])
    return tuple((sums / len(queries)).tolist())


@pytest.mark.parametrize("method", ["snapkv", "criticalkv"])
@pytest.mark.parametrize("head", [0, 3])
def test_numbers_are_those_of_the_definitions(report, seen, method, head):
    """Prevents the group, the renormalisation or the bound from being mixed up."""
    for row, one in zip(report.of(method, 0.2), seen, strict=True):
        kept = report.kept[row.site, method, 0.2][head // 2].tolist()
        found = (row.perturbation[head], row.theta[head], row.sigma[head])
        expected = by_hand(one, head, kept, range(N - WINDOW, N))
        assert found == pytest.approx(expected, rel=1e-4)
        assert row.tightness[head] == pytest.approx(expected[0] / expected[1], rel=1e-4)


def test_a_projection_that_is_laid_out_the_other_way():
    """GPT-2's Conv1D: [in, out], no groups."""
    model, seen = tiny("gpt2"), []
    watcher = Watcher(model)
    watcher(seen.append, input_ids=prompt(N), use_cache=True)
    found = ckv_compile.perturbation(
        model, prompt(N), (0.2,), window_size=WINDOW, watcher=watcher, hidden=False
    )
    row = found.of("criticalkv", 0.2)[1]
    kept = found.kept[row.site, "criticalkv", 0.2][3].tolist()
    expected = by_hand(seen[1], 3, kept, range(N - WINDOW, N))
    assert (row.perturbation[3], row.theta[3], row.sigma[3]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "falcon", "opt", "cohere", "phi3"])
def test_the_bound_holds_in_other_families(family):
    """Soft caps, parallel layers, biases in projections; Gemma's sliding layers are no sites."""
    found = ckv_compile.perturbation(tiny(family), prompt(N, batch=2), (0.3,), window_size=WINDOW)
    assert len(found.rows) == (2 if family == "gemma2" else 4)
    for row in found.rows:
        pairs = zip(row.perturbation, row.theta, strict=True)
        assert all(0 < low <= high * 1.001 for low, high in pairs)
    assert not found.hidden and "batch of one" in found.note


def test_queries_that_no_method_has_seen(model, watcher, seen):
    """Prevents scoring by the tokens that are to be predicted: the prompt ends before them."""
    later = 10
    found = ckv_compile.perturbation(
        model, prompt(N), (0.2,), window_size=WINDOW, later=later, watcher=watcher
    )
    shorter = ckv_compile.perturbation(
        model, prompt(N)[:, : N - later].contiguous(), (0.2,), window_size=WINDOW, watcher=watcher
    )
    assert found.queries == later and found.tokens == N - later
    for name, keep in found.kept.items():
        assert torch.equal(keep, shorter.kept[name])
    row = found.of("criticalkv", 0.2)[0]
    kept = [*found.kept[row.site, "criticalkv", 0.2][0].tolist(), *range(N - later, N)]
    expected = by_hand(seen[0], 1, kept, range(N - later, N))
    assert (row.perturbation[1], row.theta[1]) == pytest.approx(expected[:2], rel=1e-4)


def test_nothing_is_lost_where_everything_is_kept(report):
    assert max(max(row.perturbation) for row in report.of("criticalkv", 1.0)) < 1e-5
    (whole, *_) = (row for row in report.hidden if row.budget == 1.0)
    assert max(whole.distance) < 1e-5
    (half, *_) = (row for row in report.hidden if row.budget == 0.5)
    assert half.distance[0] == 0 and min(half.distance[1:]) > 1e-4
    for row in report.rows:
        pairs = zip(row.perturbation, row.theta, strict=True)
        assert all(low <= high + 1e-4 for low, high in pairs)


def test_hidden_states_are_those_of_a_cut_cache(model, report):
    """The library's own cache, its last queries taken off and fed again."""
    ids = prompt(N)
    states, optimised = [], tiny()
    options = {"method": "snapkv", "window_size": WINDOW, "lowering": "eager"}
    # At 1.0 first nothing would be traced that a second budget could use.
    for budget in (0.5, 1.0):
        ckv_compile.optimize(optimised, budget, **options)
        cache = ckv_compile.compress(optimised, ids)
        cache.crop(-WINDOW)
        with torch.no_grad():
            done = optimised._call_impl(
                ids[:, -WINDOW:], past_key_values=cache, use_cache=True, output_hidden_states=True
            )
        states.append(done.hidden_states[-1])
    distance = (states[0] - states[1]).norm() / states[1].norm()
    (row,) = (r for r in report.hidden if (r.method, r.budget) == ("snapkv", 0.5))
    assert row.distance[-1] == pytest.approx(float(distance), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"method": "snapkv"}, {"norm": "l2", "first_stage_ratio": 0.25}]
)
def test_what_is_kept_is_what_the_eviction_node_keeps(seen, options):
    config = EvictionConfig(budget=0.3, window_size=WINDOW, **options)
    node = EvictKV(config, in_out=False, from_config=True)
    for one in seen:
        inputs = one.inputs
        operands = (inputs.query, inputs.key, inputs.value, inputs.o_proj_weight, inputs.scale)
        assert torch.equal(one.kept(config, config.entries(N)), node(*operands)[2])


def test_the_share_of_heads_counts_strictly_lower_ones(report):
    better, heads = report.share_better("criticalkv", "snapkv", 0.2)
    pairs = zip(report.of("criticalkv", 0.2), report.of("snapkv", 0.2), strict=True)
    lower = [a.perturbation[h] < b.perturbation[h] for a, b in pairs for h in range(4)]
    assert (better, heads) == (sum(lower), 8)
    assert report.share_better("snapkv", "snapkv", 0.2) == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": "snapkv"}, TypeError, "methods='snapkv' is a str"),
        ({"methods": ()}, ValueError, "methods is empty"),
        ({"methods": ("h2o2",)}, ValueError, "method='h2o2' is unknown"),
        ({"methods": ("snapkv", "snapkv")}, ValueError, "names one twice"),
        ({"budgets": (2.0,)}, ValueError, "budget=2.0 is not a share"),
        ({"queries": 0}, ValueError, "queries=0; it takes 1 to 120"),
        ({"later": -1}, ValueError, "later=-1"),
        ({"later": 110}, ValueError, "input_ids has 10 tokens to cut"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids takes a tensor"),
    ],
)
def test_errors_name_the_argument(model, arguments, error, message):
    with pytest.raises(error, match=message):
        ckv_compile.perturbation(**{"model": model, "input_ids": prompt(N), **arguments})


def test_a_model_without_a_site_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match="TRAINING: the model is in training mode"):
        ckv_compile.perturbation(tiny().train(), prompt(N))


def test_layers_come_as_they_are_measured(model, watcher):
    """Prevents a report that holds everything back until the end."""
    got = []
    ckv_compile.perturbation(
        model, prompt(N), (0.4,), ("snapkv",), watcher=watcher, on_layer=got.append
    )
    assert [[row.site for row in rows] for rows in got] == [
        ["model.layers.0.self_attn"],
        ["model.layers.1.self_attn"],
    ]


def test_variants_select_as_they_say(seen):
    config = EvictionConfig(budget=0.3, window_size=WINDOW)
    one, entries = seen[0], config.entries(N)
    relative = variants.relative_epsilon(2.0)(one, config, entries)
    plain = dataclasses.replace(config, epsilon=2.0 / N)
    assert torch.equal(relative, one.kept(plain, entries))
    assert (variants.with_sink(one, config, entries)[..., :4] == torch.arange(4)).all()
    # Of 36 entries 16 are the window: half of the other 20 are chosen by attention alone.
    apart = variants.window_apart(one, config, 36)
    assert torch.equal(apart, one.kept(dataclasses.replace(config, first_stage_ratio=26 / 36), 36))
    ratios = {one.name: [0.0, 1.0]}
    by_head = variants.per_head_ratio(ratios)(one, config, entries)
    for head, ratio in enumerate(ratios[one.name]):
        alone = dataclasses.replace(config, first_stage_ratio=ratio)
        assert torch.equal(by_head[:, head], one.kept(alone, entries)[:, head])


def test_per_query_head_is_the_mean_of_products(seen):
    """Against attention and norms of each head alone, from the oracle."""
    config = EvictionConfig(budget=0.3, window_size=WINDOW, epsilon=0.0, first_stage_ratio=0.0)
    inputs = seen[0].inputs
    scores = []
    for head in range(4):
        query, group = inputs.query[:, head : head + 1], head // 2
        key, value = (x[:, group : group + 1] for x in (inputs.key, inputs.value))
        weight = inputs.o_proj_weight[:, head * 16 : (head + 1) * 16]
        attention = reference.window_attention(query, key, None, WINDOW, config.kernel_size)
        norm = reference.projected_norm(value, weight, False, 1, "l1")
        scores.append(attention * norm)
    mean = torch.cat(scores, 1).reshape(1, 2, 2, N).mean(2)
    expected = reference.select(mean, None, 36, WINDOW, 0.5, 0.0)
    assert torch.equal(variants.per_query_head(seen[0], config, 36), expected)


def test_norm_first_pools_the_product(seen):
    config = EvictionConfig(budget=0.3, window_size=WINDOW, first_stage_ratio=0.0)
    inputs, prefix = seen[0].inputs, N - WINDOW
    attention = reference.window_attention(inputs.query, inputs.key, None, WINDOW, 1)
    norm = reference.projected_norm(inputs.value, inputs.o_proj_weight, False, 4, "l1")
    products = ((attention + config.epsilon) * norm)[0, 0, :prefix].tolist()
    pooled = torch.zeros(1, 1, N)
    for i in range(prefix):
        pooled[0, 0, i] = max(products[max(i - 3, 0) : min(i + 4, prefix)])
    expected = reference.select(pooled, None, 36, WINDOW, 0.5, 0.0)
    assert torch.equal(variants.norm_first(seen[0], config, 36)[:, :1], expected)


def test_the_page_holds_every_entry_and_needs_no_other_file(report, tmp_path):
    # A token cannot end the page's script.
    texts = ("</script><b>", *report.texts[1:])
    path = dataclasses.replace(report, texts=texts).save(tmp_path / "new" / "report.html")
    text = path.read_text()
    assert text.count("</script>") == 1
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "https://" not in text
    data = json.loads(re.search(r"const data = (\{.*\});", text)[1])
    assert data["texts"][:2] == ["</script><b>", "<1>"] and len(data["heads"]) == 4
    (found,) = (one for one in data["maps"] if one["name"] == "criticalkv at 0.2")
    bits = base64.b64decode(found["bits"])
    for row, (layer, head) in enumerate(data["heads"]):
        held = [i for i in range(N) if bits[(row * N + i) >> 3] >> ((row * N + i) & 7) & 1]
        site = f"model.layers.{layer}.self_attn"
        assert held == report.kept[site, "criticalkv", 0.2][head].tolist()


def test_it_is_saved_as_data_and_as_a_picture(report, tmp_path):
    data = json.loads(report.save(tmp_path / "report.json").read_text())
    assert len(data["rows"]) == len(report.rows) == 12
    assert data["summary"][0]["better_than_snapkv"] is None
    assert report.save(tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"it takes a name that ends in \.html, \.json or \.png"):
        report.save(tmp_path / "report.pdf")


def test_pictures_name_their_axes_and_units(report):
    drawn = pictures.kept_map(report, "criticalkv", 0.2).axes[0]
    assert drawn.get_xlabel() == "position in the text (tokens)"
    # One row for each KV head, black where an entry is kept.
    assert drawn.images[0].get_array().sum() == 4 * report.of("criticalkv", 0.2)[0].kept
    heads = pictures.head_maps(report, 0.2, ("snapkv", "criticalkv"))
    assert [axes.get_xlabel() for axes in heads.axes[:3]] == ["query head"] * 3
    assert heads.axes[1].images[0].get_array().shape == (2, 4)
    curves = pictures.perturbation_curves(report).axes[0]
    assert "%" in curves.get_xlabel() and len(curves.lines) == 2


@pytest.mark.parametrize("options", [{"allocation": "adakv"}, {"max_entries": 400}])
def test_what_is_not_measured_is_no_candidate(options):
    """Numbers of uniform heads stood under the name of another allocation."""
    with pytest.raises(ValueError, match=next(iter(options))):
        ckv_compile.perturbation(tiny(), prompt(N), (0.2,), {"mine": options})
