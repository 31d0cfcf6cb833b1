"""Heads that compete for a budget are measured as the library cuts and reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from wordy import save_model

import ckv_compile
from ckv_compile import EvictedCache
from ckv_compile.cli import main
from ckv_compile.evidence.asker import CONTEXT_ONLY, REGULAR, Asker, _name
from ckv_compile.evidence.caches import cut_packed
from ckv_compile.evidence.candidates import candidates_of, every_candidate
from ckv_compile.evidence.evaluate import read
from ckv_compile.evidence.models import load
from ckv_compile.evidence.ragged import check_packable
from ckv_compile.evidence.shell import Parser, methods_from
from ckv_compile.evidence.tasks import sample_of

LENGTH = 900  # characters: one is a token here
ALLOCATIONS = ("adakv", "pyramid", "headkv", "global", "cake")
TABLE = ((1.0, 3.0), (0.5, 2.5))


def options_of(allocation: str) -> dict:
    if allocation == "expected":  # queries from before their rotation
        return {"allocation": "adakv", "method": "expected_attention"}
    scores = {"head_scores": TABLE} if allocation == "headkv" else {}
    return {"allocation": allocation, "method": "criticalkv", **scores}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asker(folder):
    return Asker(*load(str(folder)))


@pytest.fixture(scope="module")
def prompt(asker):
    return sample_of("single", asker.tokenizer, LENGTH, 0)[1]


@pytest.fixture(scope="module")
def candidates():
    return candidates_of({name: options_of(name) for name in (*ALLOCATIONS, "uniform", "expected")})


def generated_text(model, tokenizer, ids, cache):
    """Eight tokens of an optimised model, over a cache that has seen some of them."""
    mask, options = torch.ones_like(ids), {"max_new_tokens": 8, "do_sample": False}
    output = model.generate(ids, past_key_values=cache, attention_mask=mask, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def over(allocation: str):
    return pytest.param(allocation, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "allocation", ["adakv", "cake", "expected", *map(over, ("global", "pyramid", "headkv"))]
)
def test_entries_are_those_that_optimize_keeps(asker, folder, prompt, candidates, allocation):
    """Entry by entry: one other budget, or rank, would be another method."""
    caches = [(budget, one) for budget in (0.1, 0.4) for one in candidates]
    ids = torch.tensor([prompt.context_ids])
    with torch.no_grad():
        full, kept, _ = asker._read(ids, caches)
    model = load(str(folder))[0]
    for budget, one in caches:
        if one.label != allocation:
            continue
        ckv_compile.optimize(model, budget, **options_of(allocation), lowering="eager")
        left = ckv_compile.compress(model, ids)
        made = cut_packed(full, kept[_name((budget, one))], ids.shape[1])
        lengths = set()
        for mine, theirs in zip(made.layers, left.layers, strict=True):
            assert mine.get_seq_length() == theirs.get_seq_length() == ids.shape[1]
            assert torch.equal(mine.packed.lengths, theirs.packed.lengths)
            lengths |= set(mine.packed.lengths.tolist())
            alone = theirs.packed.alone()
            for a, b in (
                (mine.keys, theirs.keys),
                (mine.values, theirs.values),
                (mine.packed.keys, alone.keys),
                (mine.packed.values, alone.values),
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert len(lengths) > 1, "the heads must differ here"


def test_uniform_heads_are_the_same_packed_or_not(asker, prompt, candidates):
    """In one batch with others they are read in packed form: the same entries, the same answers."""
    uniform, adakv = ((0.2, candidates[i]) for i in (5, 0))
    (alone,) = asker.answers(prompt, REGULAR, [uniform], 8)
    packed, other = asker.answers(prompt, REGULAR, [uniform, adakv], 8)
    sizes = (alone.kept, alone.cache_bytes)
    assert (packed.kept, packed.cache_bytes) == (other.kept, other.cache_bytes) == sizes
    assert packed.text == alone.text
    assert packed.loss == pytest.approx(alone.loss, rel=1e-5)
    assert other.loss != pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [REGULAR, CONTEXT_ONLY])
def test_answers_and_bytes_are_the_optimised_models(asker, folder, prompt, candidates, setting):
    caches = [(0.3, candidates[0]), (0.3, candidates[3])]
    model = load(str(folder))[0]
    context, ids = (
        torch.tensor([prompt.context_ids]),
        torch.tensor([prompt.context_ids + prompt.question_ids]),
    )
    for reply in asker.answers(prompt, setting, caches, 8):
        label = reply.cache[1].label
        ckv_compile.optimize(model, 0.3, **options_of(label), lowering="eager")
        cache = EvictedCache() if setting == REGULAR else ckv_compile.compress(model, context)
        if setting == REGULAR:
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert reply.cache_bytes == cache.nbytes
        given = None if setting == REGULAR else cache
        assert reply.text == generated_text(model, asker.tokenizer, ids, given)


@pytest.mark.slow
def test_answers_that_are_over_leave_the_batch(asker, prompt, candidates, monkeypatch):
    """Rows are dropped while others go on: each must keep its own cache and its own answer."""
    caches = [(budget, one) for budget in (0.1, 0.3) for one in candidates]
    texts = {r.cache: r.text for r in asker.answers(prompt, REGULAR, caches, 12)}
    # End at what some of the answers have in the middle of them.
    letters = sorted({letter for text in texts.values() for letter in text[1:6]})
    ends = asker.tokenizer.convert_tokens_to_ids(letters[: len(letters) // 2 + 1])
    monkeypatch.setattr(asker.model.generation_config, "eos_token_id", ends)
    together = list(asker.answers(prompt, REGULAR, caches, 12))
    assert len({len(reply.text) for reply in together}) > 1, "they must end at different steps"
    for reply in together:
        (alone,) = asker.answers(prompt, REGULAR, [reply.cache], 12)
        assert reply.text == alone.text


def test_what_cannot_be_packed_is_refused_with_the_reason(asker, prompt, candidates):
    """Soft-capped logits would be read without their cap, silently."""
    list(asker.answers(prompt, REGULAR, [(1.0, None)], 1))
    sites = asker.watcher.sites
    check_packable(sites)
    capped = dataclasses.replace(sites[1], softcap=30.0)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn takes allocation='uniform' alone"):
        check_packable([sites[0], capped])
    with pytest.raises(ValueError, match="cannot share one budget"):
        check_packable([sites[0], dataclasses.replace(sites[1], head_dim=32)])


@pytest.mark.slow
def test_every_method_from_a_shell(folder, tmp_path, capsys):
    """More rows than one batch takes, and a run that is cut short and goes on."""
    results = tmp_path / "all.jsonl"
    argv = ["eval", "--model", folder, "--all-methods", "--lengths", LENGTH, "--samples", 1]
    argv += ["--budgets", "0.15", "0.3", "0.5", "--results", results]
    wide = [*argv, "--settings", REGULAR, CONTEXT_ONLY, "--wide"]
    assert main([str(arg) for arg in [*argv, "--settings", REGULAR]]) == 0
    capsys.readouterr()
    assert main([str(arg) for arg in wide]) == 0
    answers = read(results)
    methods = len(every_candidate()) - 1  # and FastGen, which takes no budget
    assert len(answers) == 1 + 2 * (3 * methods + 1) == len({a.key for a in answers})
    counted = [answer for answer in answers if answer.method != "fastgen"]
    kept = {(a.setting, a.budget): set() for a in counted}
    for answer in counted:
        kept[answer.setting, answer.budget].add((answer.kept, answer.cache_bytes))
    assert all(len(sizes) == 1 for sizes in kept.values()), "totals are the same for all"
    tables = capsys.readouterr().out
    assert all(label.replace(":allocation=", ", ") in tables for label in every_candidate())


@pytest.mark.slow
@pytest.mark.parametrize("setting", [REGULAR, CONTEXT_ONLY])
def test_policies_answer_as_the_optimised_model(asker, folder, prompt, setting):
    """They are applied again while tokens follow; and no budget is asked of them."""
    policies = {"method": "fastgen", "recovery": 0.7, "interval": 4}
    (one,) = candidates_of({"fastgen": policies})
    caches = [(one.own_budget, one), (0.3, *candidates_of(["snapkv"]))]
    answers = {reply.cache[0]: reply for reply in asker.answers(prompt, setting, caches, 8)}
    assert set(answers) == {"recovery 0.7", 0.3}
    model = load(str(folder))[0]
    ckv_compile.optimize(model, **policies, tokenizer=asker.tokenizer, lowering="eager")
    context = torch.tensor([prompt.context_ids])
    ids = torch.tensor([prompt.context_ids + prompt.question_ids])
    cache = ckv_compile.compress(model, ids if setting == REGULAR else context)
    reply = answers["recovery 0.7"]
    assert reply.cache_bytes == cache.nbytes
    given = None if setting == REGULAR else cache
    assert reply.text == generated_text(model, asker.tokenizer, ids, given)


def test_methods_that_a_model_cannot_be_measured_under_are_named(asker, prompt, monkeypatch):
    """Of every method they are left out; asked for by name they are an error with the reason."""
    plain, expected = candidates_of(["snapkv", "expected_attention"])
    assert asker.refusal(plain) == asker.refusal(expected) == ""
    monkeypatch.setattr(
        asker.watcher, "unread", {"layers.0": "q is not seen to be made of cosines"}
    )
    assert asker.refusal(plain) == ""
    with pytest.raises(
        ValueError, match=r"expected_attention: layers\.0: q is not seen to be made"
    ):
        list(asker.answers(prompt, REGULAR, [(0.3, expected)], 1))


def test_variants_are_uniform():
    with pytest.raises(SystemExit):
        methods_from(Parser(), ["window-apart:allocation=adakv"])


def test_every_method_stands_in_every_allocation_that_it_takes():
    """A list of names that no longer make options would end a long run at its first sample."""
    found = methods_from(Parser(), list(every_candidate()))
    measured = {*ckv_compile.registry.METHODS, *ckv_compile.registry.POLICY_METHODS}
    assert {one.config.method for one in found} == measured
    labels = [one.label for one in found]
    assert "laprox:allocation=global" in labels and "knorm:allocation=global" not in labels
    assert "streaming_llm:allocation=adakv" in labels
