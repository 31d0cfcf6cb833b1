"""A model that reads a text once and answers over many caches.

One uncompiled pass serves every method, budget and allocation: it shows each attention to them, and
their caches are cut out of the full one. A test holds these against what ``optimize`` leaves. Heads
of different lengths are read as an optimised model reads them. Policies that are applied again
while tokens follow are left to the library as a whole: their text is read once more.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import has_policies
from ..config import EvictionConfig
from ..methods.base import Scores
from ..policies import kinds_of
from ..region import Region
from ..runtime import OptimizedForward
from .caches import cut, cut_packed, fresh_cache, held_by_policies, layers_of, uncut_layers
from .candidates import NO_KINDS, Candidate, Spec
from .probe import Seen, Watcher
from .ragged import check_packable, kept_masks
from .tasks import Prompt

REGULAR, CONTEXT_ONLY = "regular", "context-only"
# A budget and a method; None is the full cache.
Cache = tuple[Spec, Candidate | None]
Call = Callable[..., Any]
# What is kept by layer: positions [1, Hkv, b]; or [1, Hkv, K] bool, if heads differ.
Kept = dict[int, Tensor]
# Packed caches that answer as one batch: what they hold has to fit the memory.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said over a cache of ``kept`` entries per KV head, the mean of all heads.

    ``loss``: nats per token that it gives to a right answer in place of its own; a finer measure
    than right or wrong. ``cache_bytes``: of the entries kept, in all layers that are cut.
    """

    cache: Cache
    text: str
    loss: float
    kept: int
    cache_bytes: int


class Asker:
    """A model and its tokenizer; the model is traced once and stays as it is."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        fresh_cache(model)  # says what is wrong with the model before anything is read
        self.model, self.tokenizer = model, tokenizer
        self.watcher = Watcher(model)
        # What stands before an optimised model; here it reads packed caches and cuts none.
        self.packed = self._optimized(EvictionConfig(1.0, lowering="eager"))
        self.by_policies: dict[EvictionConfig, OptimizedForward] = {}

    def _optimized(self, config: EvictionConfig) -> OptimizedForward:
        return OptimizedForward(self.model, config, Region(self.model, config))

    @torch.no_grad()
    def answers(
        self, prompt: Prompt, setting: str, caches: Sequence[Cache], max_new_tokens: int
    ) -> Iterator[Reply]:
        """What the model answers over each cache, greedily.

        Args:
            setting: "regular", the whole prompt is read and then cut, and the first token of the
                answer is that of the full cache, as it is for an optimised model; or
                "context-only", the question follows behind what is left of the context.
            caches: those of one budget stand together; they answer as one batch. With one among
                them whose heads compete all are packed, and answer together.
        """
        context, question = torch.tensor([prompt.context_ids]), torch.tensor([prompt.question_ids])
        regular = setting == REGULAR
        ids = torch.cat([context, question], dim=1) if regular else context
        right = torch.tensor([prompt.right_ids])
        asked = (None if regular else question, right, max_new_tokens)
        shared = [one for one in caches if not _has_policies(one)]
        room = question.shape[1] + max(right.shape[1], max_new_tokens)
        packs = any(_packs(one) for one in shared)
        if shared:
            full, kept, logits = self._read(ids, shared)
        for rows in _batches(shared, packs):
            keep = {i: torch.cat([kept[_name(one)][i] for one in rows]) for i in kept[_FULL]}
            cache = (cut_packed if packs else cut)(full, keep, ids.shape[1], room)
            call = self.packed if packs else self.model._call_impl
            found = self._asked(call, cache, logits.expand(len(rows), -1), *asked)
            for one, size, reply in zip(rows, _sizes(full, keep), found, strict=True):
                yield Reply(one, *reply, *size)
        for one in caches:
            if one not in shared:
                call, cache = self._with_policies(one), fresh_cache(self.model)
                logits = self._logits(call, cache, ids, 1)[:, -1]
                size = held_by_policies(cache)
                ((text, loss),) = self._asked(call, cache, logits, *asked)
                yield Reply(one, text, loss, *size)

    @torch.no_grad()
    def refusal(self, one: Candidate) -> str:
        """Why a candidate cannot be measured on this model; "" if it can."""
        if not self.watcher.sites:
            # The same kind of call as a text's: what is traced here serves that too.
            inputs = {"past_key_values": fresh_cache(self.model), **_READ}
            self.watcher(lambda _: None, input_ids=torch.zeros(1, 8).long(), **inputs)
        unread = self.watcher.unread
        if one.config.reads_rotation and unread:
            name = next(iter(unread))
            return f"{name}: {unread[name]}"
        try:
            if one.config.packs:
                check_packable(self.watcher.sites)
        except ValueError as error:
            return str(error)
        return ""

    def _with_policies(self, cache: Cache) -> OptimizedForward:
        """The model under these policies, which knows its tokenizer's kinds of tokens."""
        assert cache[1] is not None
        config = cache[1].config
        if config not in self.by_policies:
            known = config
            if config.token_kinds == NO_KINDS:
                known = dataclasses.replace(config, token_kinds=kinds_of(self.tokenizer))
            forward = self.by_policies[config] = self._optimized(known)
            forward.warned.add("packed")  # questions are kept whole, as they are for all methods
        return self.by_policies[config]

    def _asked(
        self,
        call: Call,
        cache: Any,
        logits: Tensor,
        question: Tensor | None,
        right: Tensor,
        most: int,
    ) -> list[tuple[str, float]]:
        """What each row of ``cache`` answers, and its loss; the cache is used up.

        Args:
            logits: ``[M, V]`` behind what the cache has seen.
            question: ``[1, t]``, still to be read.
        """
        if question is not None:
            logits = self._logits(call, cache, question.expand(len(logits), -1), 1)[:, -1]
        # A call may have applied policies again, which nothing takes back.
        spare = copy.deepcopy(cache) if has_policies(cache) else cache
        losses = self._losses(call, spare, logits, right)
        return list(zip(self._generate(call, cache, logits, most), losses, strict=True))

    def _read(self, ids: Tensor, caches: Sequence[Cache]) -> tuple[Any, Mapping[str, Kept], Tensor]:
        """The full cache, what each of ``caches`` keeps of it, and the last logits ``[1, V]``."""
        for asked in {one for _, one in caches if one is not None and one.config.reads_rotation}:
            if why := self.refusal(asked):
                raise ValueError(f"{asked.label}: {why}")
        cache, length = fresh_cache(self.model), ids.shape[1]
        found: dict[str, dict[str, Tensor]] = {}
        competing: dict[Candidate, dict[str, tuple[Scores, list[Tensor]]]] = {
            one: {} for _, one in caches if one is not None and one.config.packs
        }
        addresses: dict[str, int] = {}

        def visit(seen: Seen) -> None:
            addresses[seen.name] = seen.cached[0].data_ptr()
            heads = seen.cached[0].shape[1]
            found[seen.name] = {_FULL: torch.arange(length).expand(1, heads, -1)}
            for budget, one in caches:
                if one is not None and not one.config.packs:
                    config = one.at(budget)
                    positions = one.keeps(seen, config, config.entries(length))
                    found[seen.name][_name((budget, one))] = positions
            for one, by_site in competing.items():
                weighed = [seen.preference(one.config)] if one.config.weighs_layers else []
                by_site[seen.name] = seen.scores(one.config), weighed

        done = self.watcher(visit, input_ids=ids, past_key_values=cache, **_READ)
        layers = layers_of(cache, addresses)
        whole = uncut_layers(cache, dict.fromkeys(layers.values(), ids))
        if whole or not layers:
            why = {f"{r.reason.name}: {r.detail}" for r in self.watcher.rejections}
            raise ValueError(
                f"{len(whole)} of the model's {len(cache.layers)} layers hold a full cache that "
                f"cannot be cut: {'; '.join(sorted(why))}"
            )
        kept: dict[str, Kept] = {}
        for site, i in layers.items():
            for name, positions in found[site].items():
                kept.setdefault(name, {})[i] = positions
        if competing:
            check_packable([site for site in self.watcher.sites if site.name in layers])
            kept = {name: _as_masks(one, length) for name, one in kept.items()}
        for budget, one in caches:
            if one is not None and one.config.packs:
                scores, weighed = zip(*(competing[one][site] for site in layers), strict=True)
                masks = kept_masks(scores, one.at(budget), list(itertools.chain(*weighed)))
                kept[_name((budget, one))] = dict(zip(layers.values(), masks, strict=True))
        return cache, kept, done.logits[:, -1]

    def _logits(self, call: Call, cache: Any, ids: Tensor, count: int) -> Tensor:
        """Of the last ``count`` of ``ids`` ``[M, t]`` behind ``cache``, or, for 0, of all."""
        inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": count}
        logits: Tensor = call(input_ids=ids, **inputs).logits
        return logits

    def _losses(self, call: Call, cache: Any, logits: Tensor, right: Tensor) -> list[float]:
        """Nats per token of the ``right`` answer ``[1, t]``; ``logits`` ``[M, V]`` of its first.

        The cache is left as it was.
        """
        right = right.expand(len(logits), -1)
        every, fed = logits[:, None], right.shape[1] - 1
        if fed:
            every = torch.cat([every, self._logits(call, cache, right[:, :-1], 0)], dim=1)
            cache.crop(-fed)
        each = every.float().log_softmax(-1).gather(2, right[..., None])
        return (-each[..., 0].mean(1)).tolist()

    def _generate(self, call: Call, cache: Any, logits: Tensor, most: int) -> list[str]:
        """One greedy answer for each row, up to an end-of-text token; the cache is used up."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends).reshape(-1)
        tokens: list[list[int]] = [[] for _ in logits]
        going = torch.arange(len(logits))  # the row of each answer that the cache still holds
        over = torch.zeros(len(logits), dtype=torch.bool)
        last = logits.argmax(-1)
        for step in range(most):
            if step:
                last = self._logits(call, cache, last[:, None], 1)[:, -1].argmax(-1)
            for row, token, ended in zip(going.tolist(), last.tolist(), over.tolist(), strict=True):
                if not ended:
                    tokens[row].append(token)
            over |= torch.isin(last, ends)
            if bool(over.all()):
                break
            if 2 * int(over.sum()) >= len(over):
                cache.batch_select_indices((~over).nonzero()[:, 0])
                last, going, over = last[~over], going[~over], over[~over]
        ended = set(ends.tolist())
        answers = [row[:-1] if row[-1] in ended else row for row in tokens]
        return [self.tokenizer.decode(one, skip_special_tokens=True).strip() for one in answers]


_FULL = "full"
# How a text is read.
_READ: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}


def _name(one: Cache) -> str:
    budget, candidate = one
    return _FULL if candidate is None else f"{candidate.label} at {budget}"


def _packs(cache: Cache) -> bool:
    return cache[1] is not None and cache[1].config.packs


def _has_policies(cache: Cache) -> bool:
    return cache[1] is not None and cache[1].config.chooses_policies


def _batches(caches: Sequence[Cache], packs: bool) -> Iterator[list[Cache]]:
    """Those that answer together: any, if they are packed, else those of one length."""
    if packs:
        for start in range(0, len(caches), _ROWS):
            yield list(caches[start : start + _ROWS])
        return
    for _, group in itertools.groupby(caches, key=lambda one: str(one[0])):
        yield list(group)


def _as_masks(kept: Kept, length: int) -> Kept:
    """Positions ``[1, Hkv, b]`` as ``[1, Hkv, K]`` bool."""
    return {
        i: torch.zeros(*keep.shape[:2], length, dtype=torch.bool).scatter_(2, keep, True)
        for i, keep in kept.items()
    }


def _sizes(full: Any, keep: Kept) -> list[tuple[int, int]]:
    """Entries per KV head, and bytes of all entries, of each row that ``keep`` makes."""
    rows = len(next(iter(keep.values())))
    entries, heads, nbytes = [0] * rows, 0, [0] * rows
    for i, one in keep.items():
        layer, each = full.layers[i], one.shape[1] * one.shape[2]
        counts = one.sum((1, 2)).tolist() if one.dtype == torch.bool else [each] * rows
        size = sum(cached[0, 0, 0].nbytes for cached in (layer.keys, layer.values))
        heads += one.shape[1]
        entries = [a + b for a, b in zip(entries, counts, strict=True)]
        nbytes = [a + b * size for a, b in zip(nbytes, counts, strict=True)]
    return [(count // heads, size) for count, size in zip(entries, nbytes, strict=True)]
