"""Positions, padding and later turns over a cut cache: the oracle's tokens, row by row."""

from __future__ import annotations

import copy

import eager
import pytest
import torch
from capture import captured
from families import generated, prompt, tiny
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
)

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig
from ckv_compile.passes.pipeline import rewrite

# A test that silently runs uncompiled proves nothing about eviction.
pytestmark = pytest.mark.filterwarnings("error:ckv_compile. the recompile limit")


def oracle(ids, budget=0.5, steps=8):
    return eager.generate(tiny(), ids, EvictionConfig(budget=budget), steps)


# --- positions


@torch.no_grad()
def loop(model, ids, steps, cache=None):
    """A hand-written loop that thinks of no positions."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), out.past_key_values


@pytest.mark.parametrize("given", [None, DynamicCache, EvictedCache], ids=["none", "own", "ours"])
def test_a_loop_without_position_ids_is_right(half, given):
    """A cache that reports what it holds restarts RoPE there: fluent and wrong."""
    ids = prompt(90, batch=2)
    logits, cache = loop(half, ids, 6, given() if given else None)
    torch.testing.assert_close(logits, oracle(ids, steps=6)[1])
    assert cache.get_seq_length() == 95
    assert cache.layers[0].keys.shape[2] == 45 + 5


def test_nbytes_counts_what_is_held(half):
    cache = EvictedCache(config=half.config)
    with torch.no_grad():
        half(input_ids=prompt(100), past_key_values=cache)
    assert (
        cache.nbytes == 2 * 2 * (2 * 50 * 16) * 4
    )  # layers, K and V, heads x entries x D, float32


def test_mask_sizes_place_what_is_held(half):
    cache = EvictedCache(config=half.config)
    with torch.no_grad():
        half(input_ids=prompt(100), past_key_values=cache)
    assert cache.get_seq_length() == cache.get_query_offset() == 100
    assert cache.get_mask_sizes(3, 0) == (53, 50)


# --- padding


def padded(lengths, n, side, seed=0):
    ids, mask = prompt(n, batch=len(lengths), seed=seed), torch.zeros(len(lengths), n).long()
    for row, length in enumerate(lengths):
        mask[row, n - length :] = 1 if side == "left" else mask[row, n - length :]
        if side == "right":
            mask[row, :length] = 1
    return ids * mask, mask


@pytest.mark.parametrize(
    "lengths",
    [
        *(pytest.param(row, marks=pytest.mark.slow) for row in ((50, 83, 90), (90, 1))),
        (90, 20),
        (34, 33, 90),
    ],
)
@pytest.mark.parametrize("budget", [0.5, 40, 1.0])
def test_a_padded_row_generates_what_it_generates_alone(model, lengths, budget):
    """Others keep pads in place of tokens (31 of 64 entries of a left-padded batch)."""
    ckv_compile.optimize(model, budget, lowering="eager")
    ids, mask = padded(lengths, 90, "left")
    out = generated(model, ids, 8, attention_mask=mask)
    for row, length in enumerate(lengths):
        tokens, _ = oracle(ids[row : row + 1, 90 - length :], budget)
        assert torch.equal(out.sequences[row, 90:], tokens[0]), (row, length)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_a_compiled_padded_batch_generates_the_same(lowering):
    """Masks, row budgets and the cache's gap as inputs of generated code; two turns."""
    model = ckv_compile.optimize(tiny(), 0.5, lowering=lowering)
    ids, mask = padded((50, 90), 90, "left")
    cache = EvictedCache()
    out = generated(model, ids, 8, attention_mask=mask, past_key_values=cache)
    for row, length in enumerate((50, 90)):
        tokens, _ = oracle(ids[row : row + 1, 90 - length :])
        assert torch.equal(out.sequences[row, 90:], tokens[0])
    longer = torch.cat([out.sequences, prompt(11, batch=2, seed=5)], 1)
    mask = torch.cat([mask, mask.new_ones(2, longer.shape[1] - 90)], 1)
    turns = [
        generated(one, longer, 4, attention_mask=mask, past_key_values=copy.deepcopy(cache))
        for one in (model, ckv_compile.optimize(tiny(), 0.5, lowering="eager"))
    ]
    assert torch.equal(turns[0].sequences, turns[1].sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_keeps_the_tokens_it_keeps_alone(half, side):
    """The kept entries, not only the tokens that follow: each is found in the row's own prefill."""
    lengths = (50, 83, 90)
    ids, mask = padded(lengths, 90, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    with torch.no_grad():
        half(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        _, alone = eager.prefill(tiny(), ids[row : row + 1, real], EvictionConfig(budget=0.5))
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            kept = EvictionConfig(budget=0.5).entries(length)
            torch.testing.assert_close(layer.keys[row, :, -kept:], expected.keys[0])
            torch.testing.assert_close(layer.values[row, :, -kept:], expected.values[0])


def test_hostile_values_in_unused_slots_are_never_attended_to(half):
    """A shorter row leaves slots over: what lies in them must not reach a softmax."""
    ids, mask = padded((40, 90), 90, "left")
    clean, dirty = DynamicCache(), DynamicCache()
    step = torch.cat([mask, mask.new_ones(2, 1)], 1)
    logits = []
    with torch.no_grad():
        for cache in (clean, dirty):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            half(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            if cache is dirty:
                for layer in cache.layers:
                    layer.keys[0, :, :10] = layer.values[0, :, :10] = 1e4
            at = mask.sum(-1, keepdim=True)
            out = half(
                input_ids=ids[:, -1:], attention_mask=step, position_ids=at, past_key_values=cache
            )
            logits.append(out.logits)
    assert torch.equal(*logits)


def test_a_mask_with_holes_runs_uncompiled_and_says_so(half):
    """Tokens that are hidden in the middle of a row are no padding; nobody said what they are."""
    ids = prompt(90, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 30:40] = 0
    with pytest.warns(UserWarning, match="holes"), torch.no_grad():
        out = half(input_ids=ids, attention_mask=mask, use_cache=True)
        expected = tiny()(input_ids=ids, attention_mask=mask, use_cache=True)
    assert torch.equal(out.logits, expected.logits)
    assert out.past_key_values.get_seq_length() == out.past_key_values.layers[0].keys.shape[2] == 90


def test_arguments_by_position_are_understood(half):
    """forward(ids, mask) must not pass for a call without a mask."""
    ids, mask = padded((50, 90), 90, "left")
    with torch.no_grad():
        by_name = half(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        by_place = half(ids, mask, use_cache=True).past_key_values
    assert by_place.layers[0].keys.shape[2] == 45
    assert all(
        torch.equal(a.keys, b.keys) for a, b in zip(by_name.layers, by_place.layers, strict=True)
    )


@pytest.mark.parametrize("counted_on", ["another mask", "another prompt"])
def test_rows_counted_elsewhere_are_refused(counted_on):
    """Rows counted on one mask or prompt and padded by another would keep the wrong entries."""
    model, ids, short = tiny(), prompt(60, 2), prompt(50, 2)
    mask, other = torch.ones(2, 60).long(), torch.ones(2, 60).long()
    marked = (ids, other) if counted_on == "another mask" else (short, mask)

    def forward():
        capacity = torch.empty(40)
        torch.ops.ckv_compile.capacity(capacity, *marked, torch.tensor([40, 40]))
        return model(input_ids=ids, attention_mask=mask, use_cache=True)

    found = rewrite(captured(forward), EvictionConfig(budget=0.5))
    assert found.inserted == ()
    assert {r.reason.name for r in found.rejections} == {"PADDING_MASK"}


def test_padding_costs_two_graphs_for_all_lengths():
    model = ckv_compile.optimize(tiny(), 0.5, lowering="eager")
    for n in (70, 90, 120, 100):
        ids, mask = padded((n // 2 + 10, n), n, "left", seed=n)
        generated(model, ids, steps=3, attention_mask=mask)
    assert ckv_compile.explain(model).graphs == 2


# --- turns


@pytest.mark.parametrize(
    "given", [pytest.param(DynamicCache, marks=pytest.mark.slow), EvictedCache]
)
def test_second_turn_with_full_budget(model, given):
    """generate slices a longer prompt by the cache's length: the logical one, or tokens repeat."""
    ckv_compile.optimize(model, 1.0, lowering="eager")
    sequences = []
    for one in (tiny(), model):
        cache = DynamicCache() if one is not model else given()
        first = generated(one, prompt(60), 5, past_key_values=cache).sequences
        longer = torch.cat([first, prompt(11, seed=5)], 1)
        sequences.append(generated(one, longer, 5, past_key_values=cache).sequences)
    assert torch.equal(*sequences)


def test_second_turn_over_a_cut_cache(half):
    """The cut cache, then eleven tokens at once: as the unmodified model over the same entries."""
    ids, turn = prompt(90), prompt(11, seed=5)
    _, cut = eager.prefill(tiny(), ids, EvictionConfig(budget=0.5))
    positions = torch.arange(90, 101)[None]
    # Positions of the held entries are lost to a plain cache: its mask is written out.
    allowed = torch.ones(11, 45 + 11, dtype=torch.bool).tril(45)[None, None]
    cache = ckv_compile.compress(half, ids)
    with torch.no_grad():
        expected = tiny()(
            input_ids=turn, past_key_values=cut, position_ids=positions, attention_mask=allowed
        )
        out = half(input_ids=turn, past_key_values=cache)
    torch.testing.assert_close(out.logits, expected.logits)
    assert cache.get_seq_length() == 101 and cache.layers[0].keys.shape[2] == 56


def test_several_questions_on_copies_of_one_context(half):
    """A question must not spoil the cache for the next one."""
    context, questions = prompt(90), [prompt(9, seed=s) for s in (1, 2, 1)]
    cache = EvictedCache()
    with torch.no_grad():
        half(input_ids=context, past_key_values=cache)
    answers = [
        generated(half, torch.cat([context, q], 1), 5, past_key_values=copy.deepcopy(cache))
        for q in questions
    ]
    first, second, again = (answer.sequences[:, 99:] for answer in answers)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert cache.get_seq_length() == 90 and cache.layers[0].keys.shape[2] == 45


# --- compressing a context, keeping it


@pytest.fixture(scope="module")
def compressed(model):
    ckv_compile.optimize(model, 0.5, lowering="eager")
    return ckv_compile.compress(model, prompt(90))


def answer(model, cache):
    ids = torch.cat([prompt(90), prompt(9, seed=1)], 1)
    return generated(model, ids, 5, past_key_values=copy.deepcopy(cache)).sequences


def test_compress_keeps_what_the_oracle_keeps(compressed):
    _, expected = eager.prefill(tiny(), prompt(90), EvictionConfig(budget=0.5))
    for layer, oracle in zip(compressed.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, oracle.keys)
    assert compressed.get_seq_length() == 90


def test_a_saved_cache_answers_as_before(half, compressed, tmp_path):
    compressed.save(tmp_path / "context.safetensors")
    loaded = EvictedCache.load(tmp_path / "context.safetensors", model=half)
    assert torch.equal(answer(half, loaded), answer(half, compressed))
    assert loaded.nbytes == compressed.nbytes and loaded.get_seq_length() == 90
    with pytest.raises(ValueError, match="only the last 32 tokens"):
        loaded.crop(-33)


def test_a_padded_cache_is_saved_with_its_rows(half, tmp_path):
    ids, mask = padded((40, 90), 90, "left")
    cache = ckv_compile.compress(half, ids, mask)
    cache.save(tmp_path / "rows.safetensors")
    loaded = EvictedCache.load(tmp_path / "rows.safetensors")
    assert all(
        torch.equal(a.valid, b.valid) for a, b in zip(loaded.layers, cache.layers, strict=True)
    )


def test_bad_cache_files_say_what_is_wrong(half, compressed, tmp_path):
    """A foreign cache answers fluently and wrong; it must not load."""
    path = tmp_path / "context.safetensors"
    compressed.save(path)
    other = tiny()
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="another model"):
        EvictedCache.load(path, model=other)
    with pytest.raises(FileNotFoundError, match="no such cache file"):
        EvictedCache.load(tmp_path / "missing")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        EvictedCache.load(tmp_path / "cut")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not a cache of ckv_compile"):
        EvictedCache.load(tmp_path / "foreign")
    tensors, states = {"0.keys": torch.ones(1, 2, 3, 4)}, "[[5, 0, 8]]"
    marks = {"format": "ckv_compile.EvictedCache", "fingerprint": "", "layers": states}
    save_file(tensors, tmp_path / "future", {**marks, "version": "99"})
    with pytest.raises(ValueError, match="cache format 99"):
        EvictedCache.load(tmp_path / "future")
    save_file(tensors, tmp_path / "half", {**marks, "version": "1"})
    with pytest.raises(ValueError, match="layer 0 has no matching keys and values"):
        EvictedCache.load(tmp_path / "half")
    with pytest.raises(ValueError, match="empty"):
        EvictedCache().save(tmp_path / "empty")


def test_compress_needs_an_optimised_model():
    with pytest.raises(ValueError, match="optimize"):
        ckv_compile.compress(tiny(), prompt(40))


# --- the cache's own methods


def test_crop_takes_back_the_tail_and_no_more(half):
    """Behind the window tokens are missing: a crop there would not be the earlier state."""
    cache = ckv_compile.compress(half, prompt(90))
    before = [layer.keys.clone() for layer in cache.layers]
    with torch.no_grad():
        half(input_ids=prompt(7, seed=1), past_key_values=cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 90
    assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, before, strict=True))
    with pytest.raises(ValueError, match="only the last 32 tokens"):
        cache.crop(-33)
    cache.crop(-10)
    assert cache.get_seq_length() == 80 and cache.layers[0].keys.shape[2] == 35


def test_reset_forgets_the_eviction(half):
    cache, ids = EvictedCache(), prompt(90)
    with torch.no_grad():
        expected = half(input_ids=ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(half(input_ids=ids, past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == 90 and cache.layers[0].keys.shape[2] == 45


def test_beams_of_a_padded_batch(model):
    """Beams reorder the rows of the cache; with full budget they are the untouched model's."""
    ckv_compile.optimize(model, 1.0, lowering="eager")
    ids, mask = padded((50, 90), 90, "left")
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    expected = generated(tiny(), ids, **options).sequences
    assert torch.equal(generated(model, ids, **options).sequences, expected)


def test_rows_follow_the_batch(half):
    ids, mask = padded((40, 90), 90, "left")
    cache = EvictedCache()
    with torch.no_grad():
        half(input_ids=ids, attention_mask=mask, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.valid.sum(-1).tolist() == [33, 45]  # max(window + 1, 20) and 45
    cache.reorder_cache(torch.tensor([1, 0]))
    assert layer.valid.sum(-1).tolist() == [45, 33]
    cache.batch_repeat_interleave(2)
    assert layer.valid.sum(-1).tolist() == [45, 45, 33, 33]
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert layer.valid.sum(-1).tolist() == [33, 45] and layer.keys.shape[0] == 2


# --- ways to generate


def test_assisted_decoding_gives_the_greedy_tokens(model):
    """Candidates are verified on the cache and cropped again, into the window of the first call."""
    ckv_compile.optimize(model, 1.0, lowering="eager")
    ids = prompt(30).repeat(1, 2)  # repetitions, so that the look-up finds candidates
    expected = generated(tiny(), ids, 12).sequences
    out = generated(model, ids, 12, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, expected)


def test_assisted_decoding_over_a_cut_cache_runs(half):
    out = generated(half, prompt(45).repeat(1, 2), 12, prompt_lookup_num_tokens=4)
    held = out.past_key_values.layers[0].keys.shape[2]
    assert out.past_key_values.get_seq_length() - held in range(45, 48)


def test_streaming_sees_every_token(half):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streamer = Streamer()
    out = generated(half, prompt(90), 6, streamer=streamer)
    assert streamer.tokens == out.sequences[0].tolist()


def test_static_cache_is_left_whole(half):
    """Its empty slots are no tokens; compressing them is a known bug elsewhere."""
    ids = prompt(60)
    expected = generated(tiny(), ids, 5, cache_implementation="static").sequences
    half._compiled_call_impl.warned.discard("cache")
    with pytest.warns(UserWarning, match="a StaticCache cannot be cut"):
        out = generated(half, ids, 5, cache_implementation="static")
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("given", [False, True], ids=["none", "own"])
def test_encoder_decoder_positions_count_what_the_decoder_has_seen(given):
    """BART takes its positions from the cache: after a cut they must not start over."""
    config = BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=96,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(config).eval()
    plain = copy.deepcopy(bart)
    ckv_compile.optimize(bart, 0.5, lowering="eager")
    encoded = plain.get_encoder()(prompt(20))
    start, token = prompt(80, seed=1), prompt(1, seed=2)
    with torch.no_grad():
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if given else None
        # The encoder's own mask is padded, as long as no decoder's would be.
        mask = torch.ones(1, 20).long()
        mask[0, 12:] = 0
        inputs = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}
        out = bart(decoder_input_ids=start, past_key_values=cache, **inputs)
        cache = out.past_key_values
        held = [layer.keys.clone() for layer in cache.self_attention_cache.layers]
        assert {k.shape[2] for k in held} == {40} and cache.get_seq_length() == 80
        assert cache.cross_attention_cache.layers[0].keys.shape[2] == 20
        logits = bart(decoder_input_ids=token, past_key_values=cache, **inputs).logits

        # The same step by hand: the kept entries are found in the plain model's own prefill.
        oracle = EncoderDecoderCache(DynamicCache(), DynamicCache())
        plain(decoder_input_ids=start, past_key_values=oracle, **inputs)
        for layer, keys in zip(oracle.self_attention_cache.layers, held, strict=True):
            same = (layer.keys[:, :, None] == keys[:, :, :, None]).all(-1)
            index = same.int().argmax(-1)[..., None].expand_as(keys)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        # BART's own arithmetic would take position 40; its table is shifted to where 80 is.
        table = plain.model.decoder.embed_positions.weight
        table.data = table.data.roll(-40, 0)
        expected = plain(decoder_input_ids=token, past_key_values=oracle, **inputs).logits
    torch.testing.assert_close(logits, expected)
