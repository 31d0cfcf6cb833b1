"""``method="fastgen"`` from the option to the cache: policies by head, entries, tokens, memory."""

from __future__ import annotations

import pytest
import torch
from eager_packed import Kept
from families import generated, prompt, tiny
from loops_fastgen import attention_had, chosen, kept_by
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ckv_compile
from ckv_compile import EvictedCache, EvictionConfig, TokenKinds
from ckv_compile.policies import POLICIES, kinds_of

INTERVAL, RECOVERY = 8, 0.7
KINDS = TokenKinds(special=(3, 7), punctuation=tuple(range(10, 30)))
OPTIONS = {"method": "fastgen", "recovery": RECOVERY, "interval": INTERVAL, "lowering": "eager"}


def small(layers: int = 1):
    return tiny(num_hidden_layers=layers)


def optimized(layers: int = 1, **options: object):
    return ckv_compile.optimize(small(layers), tokenizer=KINDS, **{**OPTIONS, **options})


class Policed(Kept):
    """An uncompiled model that does not see what the policies, in plain loops, let go."""

    def __init__(self, model) -> None:
        super().__init__(model, EvictionConfig())
        self.policies: dict[tuple[int, int, int], int] = {}
        self.had: dict[tuple[int, int, int], Tensor] = {}

    def apply(self, ids: Tensor, queries: int) -> None:
        """Choose policies, the first time, and apply them; ``ids`` are all tokens so far."""
        for layer, (_, key, _, _) in self.calls.items():
            query, n = self.queries[layer][:, :, -queries:], key.shape[2]
            groups, kept = query.shape[1] // key.shape[1], torch.zeros_like(self.seen[layer])
            for b, h in torch.cartesian_prod(*map(torch.arange, key.shape[:2])).tolist():
                slot, places = (layer, b, h), self.seen[layer][b, h].nonzero()[:, 0]
                members = query[b, h * groups : (h + 1) * groups]
                had = torch.zeros(n, dtype=torch.float64)
                old = self.had.get(slot, had[:0])
                had[: len(old)] = old
                had[places] += torch.tensor(attention_had(members, key[b, h, places], groups))
                self.had[slot] = had
                marks = [self._kind(ids[b, i]) for i in places]
                mass = had[places].tolist()
                if slot not in self.policies:
                    self.policies[slot] = chosen(mass, marks, n, RECOVERY)
                held = kept_by(self.policies[slot], mass, marks, places.tolist(), n)
                kept[b, h, places[sorted(held)]] = True
            self.seen[layer] = kept

    @staticmethod
    def _kind(token: Tensor) -> int:
        return 1 if int(token) in KINDS.special else 2 if int(token) in KINDS.punctuation else 0


def names(policed: Policed, heads: int = 2) -> list[list[list[str]]]:
    layers, rows = ({slot[i] for slot in policed.policies} for i in (0, 1))
    return [
        [[POLICIES[policed.policies[i, b, h]] for h in range(heads)] for b in sorted(rows)]
        for i in sorted(layers)
    ]


@torch.no_grad()
def test_policies_entries_and_logits_are_the_oracles(tmp_path):
    """On a prompt and after every block of tokens; bytes are those of what stays; three graphs.

    In the middle of a block the cache goes through a file.
    """
    counters.clear()
    model, plain, cache = optimized(2), Policed(small(2)), EvictedCache()
    ids = prompt(70, batch=2)
    for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 70))):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        expected = plain.feed(ids[:, start:stop])
        torch.testing.assert_close(out.logits[:, -1], expected, rtol=1e-4, atol=1e-4)
        if start == 0 or (stop - 40) % INTERVAL == 0:
            plain.apply(ids[:, :stop], stop - start if start == 0 else INTERVAL)
        plain.assert_held_by(cache)
        if stop == 40 + INTERVAL + 3:
            cache.save(tmp_path / "cache")
            cache = EvictedCache.load(tmp_path / "cache")
    found = ckv_compile.policies(cache)
    assert found.to_dict()["heads"] == names(plain)
    assert len({name for layer in found.heads for row in layer for name in row}) > 1
    counted = [line.split() for line in str(found).splitlines()]
    assert counted[0][1:] == list(POLICIES) and sum(map(int, counted[1][1:])) == 4
    assert cache.get_seq_length() == 70
    for layer in cache.layers:
        entries = int(layer.packed.cu_kv_lens[-1])
        assert layer.packed.keys.untyped_storage().nbytes() == entries * 16 * 4 < 4 * 60 * 16 * 4
    report = ckv_compile.explain(model)
    assert report.graphs == 3 and not report.rejections and not counters["graph_break"]


@pytest.mark.slow
@torch.no_grad()
def test_padded_rows_are_the_rows_alone():
    """Profiles, shares of n and blocks of each row's own tokens."""
    model, cache = optimized(), EvictedCache()
    ids, lengths, mask = prompt(80, batch=3), (50, 41, 30), torch.zeros(3, 50).long()
    alone = [Policed(small()) for _ in lengths]
    for row, (n, one) in enumerate(zip(lengths, alone, strict=True)):
        mask[row, 50 - n :] = 1
        one.feed(ids[row : row + 1, 50 - n : 50])
        one.apply(ids[row : row + 1, 50 - n : 50], n)
    for start, stop in ((0, 50), *((i, i + 1) for i in range(50, 80))):
        if start:
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        for row, one in enumerate(alone):
            if start:
                own = one.feed(ids[row : row + 1, start:stop])
                torch.testing.assert_close(out.logits[row : row + 1, -1], own, rtol=1e-4, atol=1e-4)
                if (stop - 50) % INTERVAL == 0:
                    one.apply(ids[row : row + 1, 50 - lengths[row] : stop], INTERVAL)
            one.assert_held_by(cache, row)
    (heads,) = ckv_compile.policies(cache).to_dict()["heads"]
    assert heads == [names(one)[0][0] for one in alone]


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_lowered_graphs_agree(lowering):
    tokens = []
    for one in ("eager", lowering):
        model = optimized(2, lowering=one)
        tokens.append([generated(model, prompt(n, batch=2), 30).sequences for n in (50, 77)])
        assert ckv_compile.explain(model).graphs == 3
    assert all(torch.equal(a, b) for a, b in zip(*tokens, strict=True))


@pytest.mark.slow
def test_full_recovery_gives_the_untouched_models_tokens():
    """In pieces, in a second turn and by beams; a caller's own cache has policies as well."""
    model, plain = optimized(2, recovery=1.0), small(2)
    ids, more = prompt(60, batch=2), prompt(5, batch=2, seed=1)
    answers = []
    with pytest.warns(UserWarning, match="policies are chosen on its first piece"):
        for one in (model, plain):
            cache = DynamicCache()
            first = generated(one, ids, 20, past_key_values=cache, prefill_chunk_size=40).sequences
            if one is model:
                assert {"full"} >= {
                    name
                    for layer in ckv_compile.policies(cache).heads
                    for row in layer
                    for name in row
                } - set(POLICIES[:4])
            answers.append(
                generated(one, torch.cat([first, more], 1), 20, past_key_values=cache).sequences
            )
    assert torch.equal(*answers)


@pytest.mark.slow
def test_beams_follow_their_rows():
    """Policies and what is remembered of entries move with them."""
    model, ids = optimized(), prompt(40, batch=2)
    both = generated(model, ids, 24, num_beams=2).sequences
    alone = [generated(model, ids[b : b + 1], 24, num_beams=2).sequences for b in range(2)]
    assert torch.equal(both, torch.cat(alone))


class Tokenizer:
    """As transformers' tokenizers look from outside."""

    all_special_ids = (0, 1)
    texts = ("<s>", "</s>", "a", ".", " ,", "a.", "  ", "\u3002", "<|im_start|>", "...")

    def __len__(self) -> int:
        return len(self.texts)

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]]

    @property
    def added_tokens_decoder(self) -> dict:
        marker = type("Added", (), {"special": True})()
        return {8: marker, 2: type("Added", (), {"special": False})()}


def test_kinds_are_read_from_a_tokenizer():
    """Chat markers are special, whatever they look like; a word with a stop is no punctuation."""
    kinds = kinds_of(Tokenizer())
    assert kinds == TokenKinds(special=(0, 1, 8), punctuation=(3, 4, 7, 9))
    assert kinds.table().tolist() == [1, 1, 0, 2, 2, 0, 0, 2, 1, 2, 0]
    assert repr(kinds) != repr(TokenKinds(special=(0, 1, 2), punctuation=(3, 4, 7, 9)))
    with pytest.raises(TypeError, match="tokenizer is a str"):
        kinds_of("gpt2")


def test_options_are_checked():
    """What would mean nothing is an error, and so is what is missing."""
    model = small()
    with pytest.raises(ValueError, match="tokenizer="):
        ckv_compile.optimize(model, method="fastgen")
    for options, match in (
        ({"budget": 0.5}, "takes none: recovery="),
        ({"allocation": "adakv"}, "allocation='adakv' with method='fastgen'"),
        ({"max_entries": 400}, "max_entries=400"),
        ({"recovery": 1.5}, "recovery=1.5 is out of range"),
    ):
        with pytest.raises(ValueError, match=match):
            ckv_compile.optimize(model, **{**OPTIONS, "tokenizer": KINDS, **options})
    with pytest.raises(ValueError, match="recovery is an option of method='fastgen'"):
        ckv_compile.optimize(model, 0.5, recovery=0.9)
    with pytest.raises(ValueError, match="token_kinds is an option"):
        ckv_compile.optimize(model, 0.5, tokenizer=KINDS)
    with pytest.raises(ValueError, match="has a policy"):
        ckv_compile.policies(DynamicCache())


def test_a_model_changes_from_a_budget_to_policies_and_back():
    """Seen: an error about a mixture of two configs that nobody had asked for."""
    model = small()
    kinds = TokenKinds(special=[1], punctuation=[2])
    assert kinds == TokenKinds((1,), (2,)) and hash(kinds)
    for options in ({"budget": 0.5}, {"later_turns": "evict"}, {"budget": 40, "window_size": 8}):
        ckv_compile.optimize(model, **options, lowering="eager")
        ckv_compile.optimize(model, method="fastgen", token_kinds=kinds, lowering="eager")
    ckv_compile.optimize(model, budget=0.5, window_size=64, lowering="eager")
    with pytest.raises(ValueError, match="ints >= 0"):
        TokenKinds((-1,))


def test_tokens_that_policies_have_not_seen_are_named():
    """Seen: an IndexError in a compiled graph, of tokens whose kinds nobody had noted."""
    model = optimized()
    cache = generated(model, prompt(60), steps=4).past_key_values
    ckv_compile.optimize(model, 0.5, lowering="eager")
    with torch.no_grad():
        model(input_ids=prompt(1), past_key_values=cache)
        ckv_compile.optimize(model, tokenizer=KINDS, **OPTIONS)
        seen = cache.get_seq_length()
        with pytest.raises(ValueError, match=r"of its last 1 tokens .* Go on without it"):
            model(input_ids=prompt(1), past_key_values=cache)
    assert cache.get_seq_length() == seen
