"""Ways to generate and inputs around it, where no other test goes: none may be wrong unnoticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import eager
import pytest
import torch
from families import generated, prompt, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Cache, DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.cache_utils import QuantizedLayer
from transformers.pipelines import pipeline

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig

HALF = EvictionConfig(budget=0.5)
pytestmark = pytest.mark.filterwarnings("error:ckv_compile. the recompile limit")


@torch.no_grad()
def called(model, *args, **inputs):
    return model(*args, **inputs)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")


TEXTS = [" ".join(f"w{i}" for i in prompt(n, seed=n)[0].tolist()) for n in (90, 60)]


def texts(model, tokenizer, **options):
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return [out[0]["generated_text"] for out in run(TEXTS, max_new_tokens=6, **options)]


def test_a_pipeline_with_full_budget_says_what_the_untouched_model_says(model, tokenizer):
    """A pipeline pads, copies generation settings and passes masks of its own."""
    ckv_compile.optimize(model, 1.0, lowering="eager")
    for size in (1, 2):
        expected = texts(tiny(), tokenizer, batch_size=size, do_sample=False)
        assert texts(model, tokenizer, batch_size=size, do_sample=False) == expected


def test_a_pipeline_evicts_and_keeps_its_rows_apart(half, tokenizer):
    """A pipeline could reach the inner forward, past the region, or pad where nobody looks."""
    expected = []
    for text, n in zip(TEXTS, (90, 60), strict=True):
        tokens, _ = eager.generate(tiny(), prompt(n, seed=n), HALF, 6)
        expected.append(text + tokenizer.decode(tokens[0], skip_special_tokens=True))
    for size in (1, 2):
        assert texts(half, tokenizer, batch_size=size, do_sample=False) == expected
    cache = DynamicCache()
    run = pipeline("text-generation", model=half, tokenizer=tokenizer)
    run(TEXTS[0], max_new_tokens=6, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 45 + 5 and cache.get_seq_length() == 95


def test_a_text_streamer_in_a_thread(half, tokenizer):
    """The usual way to stream: no_grad is per thread, and with gradients on nothing is evicted."""
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(generated, half, prompt(90), 8, streamer=streamer)
        text = "".join(streamer)
    out = future.result()
    assert text == tokenizer.decode(out.sequences[0])
    assert out.past_key_values.layers[0].keys.shape[2] == 45 + 7


def test_without_a_cache_nothing_is_evicted_or_claimed():
    """Each step computes all anew: there is nothing to cut, and nothing may say that it was cut."""
    model, ids = ckv_compile.optimize(tiny(), 0.5, lowering="eager"), prompt(60, batch=2)
    with pytest.warns(UserWarning, match="no attention was matched.*CACHE_NOT_FOUND"):
        out = generated(model, ids, use_cache=False)
    assert torch.equal(out.sequences, generated(tiny(), ids, use_cache=False).sequences)
    report = ckv_compile.explain(model)
    assert report.evicted == 0 and {row.reason for row in report.rejections} == {"CACHE_NOT_FOUND"}


@pytest.mark.parametrize("kind, missing", [("offloaded", "(?i)cuda"), ("quantized", "optimum")])
def test_what_a_cache_needs_is_still_said(half, kind, missing):
    """The error that transformers has for a missing device or package must come through."""
    for one in (tiny(), half):
        with pytest.raises(Exception, match=missing):
            generated(one, prompt(60), cache_implementation=kind)


class Rounded(QuantizedLayer):
    """In place of a quantiser that is not installed: anything that is lossy will do."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, tensor):
        return tensor.float()


def test_a_quantized_cache_is_left_whole(half):
    """Its layers hold packed entries and a residual: nothing that could be gathered."""
    half._compiled_call_impl.warned.discard("cache")
    outs = []
    for one in (tiny(), half):
        cache = Cache(layers=[Rounded(residual_length=16), Rounded(residual_length=16)])
        outs.append(generated(one, prompt(60), past_key_values=cache).sequences)
        assert cache.get_seq_length() == 65
    assert torch.equal(*outs) and "cache" in half._compiled_call_impl.warned


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "fixed"])
def test_layers_that_moved_away_and_back_go_on(half, options):
    """Offloading takes the buffer from the layer between two calls; the room in it must survive."""
    stays, moves, token = EvictedCache(**options), EvictedCache(**options), prompt(1, seed=1)
    for piece in (prompt(90), token, token, token):
        expected = called(half, input_ids=piece, past_key_values=stays).logits
        assert torch.equal(called(half, input_ids=piece, past_key_values=moves).logits, expected)
        for layer in moves.layers:
            layer.offload()
            layer.device = torch.device("cpu", 0)  # not equal to "cpu": prefetch moves
            layer.prefetch()
    assert moves.get_seq_length() == 93 and moves.layers[0].held == 45 + 3


def followed(model, row, n):
    """Logits ``[steps, V]`` for what follows the first ``n`` tokens of a row, read on its own."""
    cache = EvictedCache()
    pieces = row[None].split([n] + [1] * (len(row) - n), dim=1)
    logits = [called(model, input_ids=p, past_key_values=cache).logits[0, -1] for p in pieces[:-1]]
    return torch.stack(logits)


ROWS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "samples": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_over_a_cut_cache_go_on_from_their_own_entries(half, kind):
    """Beams swap rows at every step: over another row's cache, a score is that of another text."""
    torch.manual_seed(0)
    ids, mask = prompt(90, batch=2), torch.ones(2, 90).long()
    mask[0, :30] = 0
    out = generated(half, ids, attention_mask=mask, output_scores=True, **ROWS[kind])
    assert out.past_key_values.layers[0].keys.shape[2] == 45 + 5
    for i, row in enumerate(out.sequences):
        n = 60 if i < len(out.sequences) / 2 else 90
        expected = followed(half, row[90 - n :], n).log_softmax(-1)
        if kind == "samples":
            scores = torch.stack([step[i] for step in out.scores])
            torch.testing.assert_close(scores.log_softmax(-1), expected)
        else:
            total = expected.gather(1, row[90:, None]).sum()
            torch.testing.assert_close(out.sequences_scores[i], total / 6)


def test_one_beam_is_greedy(half):
    """A beam search of width one goes another way through generate, to the oracle's tokens."""
    ids = prompt(90)
    tokens, _ = eager.generate(tiny(), ids, HALF, 6)
    assert torch.equal(generated(half, ids, num_beams=1).sequences[:, 90:], tokens)


CAUSAL = torch.ones(90, 90, dtype=torch.bool).tril()[None, None]
PREFIX, PACKED = CAUSAL.clone(), CAUSAL.clone()
PREFIX[..., :20, :20] = True
PACKED[..., 40:, :40] = False
RESTART = torch.cat([torch.arange(40), torch.arange(50)])[None]
MASKS = {
    "causal": {"attention_mask": CAUSAL},
    "additive": {"attention_mask": torch.zeros(90, 90).masked_fill(~CAUSAL, -torch.inf)},
    "prefix": {"attention_mask": PREFIX},
    "packed": {"attention_mask": PACKED, "position_ids": RESTART},
}


@pytest.mark.filterwarnings("ignore:ckv_compile. no attention was matched")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_ready_made_mask_leaves_the_cache_whole(attention, mask):
    """Taken for causal, a prefix or a second packed text would lose what it attends to."""
    model = ckv_compile.optimize(tiny(attn_implementation=attention), 0.5, lowering="eager")
    logits = []
    for one in (model, tiny(attn_implementation=attention)):
        cache = DynamicCache()
        out = called(one, input_ids=prompt(90), past_key_values=cache, **MASKS[mask])
        step = called(one, input_ids=prompt(1, seed=1), past_key_values=cache)
        logits.append(torch.cat([out.logits, step.logits], 1))
        assert cache.layers[0].keys.shape[2] == cache.get_seq_length() == 91
    torch.testing.assert_close(*logits)
    assert {row.reason for row in ckv_compile.explain(model).rejections} == {"MASK_UNREADABLE"}


@pytest.mark.filterwarnings("ignore:ckv_compile. no attention was matched")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_restart_mean_what_they_mean_to_the_model(use_cache, masked):
    """Packed texts must not see each other, and one text with odd positions must see itself."""
    inputs = {"input_ids": prompt(90), "position_ids": RESTART, "use_cache": use_cache}
    inputs["attention_mask"] = torch.ones(1, 90).long() if masked else None
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    torch.testing.assert_close(called(model, **inputs).logits, called(tiny(), **inputs).logits)


WAYS = {
    "by place": lambda ids, cache, at: ((ids, None, at, cache), {}),
    "positions": lambda ids, cache, at: ((ids,), {"past_key_values": cache, "position_ids": at}),
    "tuple": lambda ids, cache, at: ((ids, None, None, cache), {"return_dict": False}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_pass_inputs(half, way):
    """An input that is not found where it stands is taken for none: no budget, or a new cache."""
    ids, cache = prompt(90), DynamicCache()
    tokens, expected = eager.generate(tiny(), ids, HALF, 3)
    for i, piece in enumerate((ids, tokens[:, :1], tokens[:, 1:2])):
        at = torch.arange(piece.shape[1])[None] + cache.get_seq_length()
        args, inputs = WAYS[way](piece, cache, at)
        out = called(half, *args, **inputs)
        torch.testing.assert_close(out[0][:, -1], expected[:, i])
        assert out[1] is cache and cache.layers[0].held == 45 + i
        assert isinstance(out, tuple) == (way == "tuple")
