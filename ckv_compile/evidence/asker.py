"""A model that reads a text once and answers over many caches.

One uncompiled pass serves every method and budget: it shows each attention to them, and their
caches are cut out of the full one. A test holds these against what ``optimize`` leaves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .caches import cut, fresh_cache, layers_of, uncut_layers
from .candidates import Candidate, Spec
from .probe import Seen, Watcher
from .tasks import Prompt

REGULAR, CONTEXT_ONLY = "regular", "context-only"
# A budget and a method; None is the full cache.
Cache = tuple[Spec, Candidate | None]
# Positions kept, [1, Hkv, b], by layer.
Kept = dict[int, Tensor]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said over a cache of ``kept`` entries per KV head.

    ``loss``: nats per token that it gives to a right answer in place of its own; a finer measure
    than right or wrong.
    """

    cache: Cache
    text: str
    loss: float
    kept: int


class Asker:
    """A model and its tokenizer; the model is traced once and stays as it is."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        fresh_cache(model)  # says what is wrong with the model before anything is read
        self.model, self.tokenizer = model, tokenizer
        self.watcher = Watcher(model)

    @torch.no_grad()
    def answers(
        self, prompt: Prompt, setting: str, caches: Sequence[Cache], max_new_tokens: int
    ) -> Iterator[Reply]:
        """What the model answers over each cache, greedily.

        Args:
            setting: "regular", the whole prompt is read and then cut, and the first token of the
                answer is that of the full cache, as it is for an optimised model; or
                "context-only", the question follows behind what is left of the context.
            caches: those of one budget stand together; they answer as one batch.
        """
        context, question = torch.tensor([prompt.context_ids]), torch.tensor([prompt.question_ids])
        regular = setting == REGULAR
        ids = torch.cat([context, question], dim=1) if regular else context
        full, kept, logits = self._read(ids, caches)
        right = torch.tensor([prompt.right_ids])
        room = question.shape[1] + max(right.shape[1], max_new_tokens)
        for _, group in itertools.groupby(caches, key=lambda one: str(one[0])):
            rows = list(group)
            keep = {i: torch.cat([kept[_name(one)][i] for one in rows]) for i in kept[_FULL]}
            held, last = next(iter(keep.values())).shape[2], logits.expand(len(rows), -1)
            cache = cut(full, keep, ids.shape[1], room)
            if not regular:
                last = self._logits(cache, question.expand(len(rows), -1), 1)[:, -1]
            texts, fed = self._generate(cache, last, max_new_tokens)
            if fed:
                cache.crop(-fed)  # the answer must not be there for the right one
            losses = self._losses(cache, last, right)
            for one, text, loss in zip(rows, texts, losses, strict=True):
                yield Reply(one, text, loss, held)

    def _read(self, ids: Tensor, caches: Sequence[Cache]) -> tuple[Any, Mapping[str, Kept], Tensor]:
        """The full cache, what each of ``caches`` keeps of it, and the last logits ``[1, V]``."""
        cache, length = fresh_cache(self.model), ids.shape[1]
        found: dict[str, dict[str, Tensor]] = {}
        addresses: dict[str, int] = {}

        def visit(seen: Seen) -> None:
            addresses[seen.name] = seen.cached[0].data_ptr()
            heads = seen.cached[0].shape[1]
            found[seen.name] = {_FULL: torch.arange(length).expand(1, heads, -1)}
            for budget, one in caches:
                if one is not None:
                    config = one.at(budget)
                    positions = one.keeps(seen, config, config.entries(length))
                    found[seen.name][_name((budget, one))] = positions

        inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        done = self.watcher(visit, input_ids=ids, **inputs)
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
        return cache, kept, done.logits[:, -1]

    def _logits(self, cache: Any, ids: Tensor, count: int) -> Tensor:
        """Of the last ``count`` of ``ids`` ``[M, t]`` behind ``cache``, ``[M, count, V]``."""
        inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": count}
        return self.model._call_impl(input_ids=ids, **inputs).logits

    def _losses(self, cache: Any, logits: Tensor, right: Tensor) -> list[float]:
        """Nats per token of the ``right`` answer ``[1, t]``; ``logits`` ``[M, V]`` of its first."""
        right = right.expand(len(logits), -1)
        every = logits[:, None]
        if right.shape[1] > 1:
            later = self._logits(cache, right[:, :-1], right.shape[1] - 1)
            every = torch.cat([every, later], dim=1)
        each = every.float().log_softmax(-1).gather(2, right[..., None])
        return (-each[..., 0].mean(1)).tolist()

    def _generate(self, cache: Any, logits: Tensor, most: int) -> tuple[list[str], int]:
        """One greedy answer for each row, up to an end-of-text token; tokens now in the cache."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends).reshape(-1)
        tokens = [logits.argmax(-1)]
        over = torch.isin(tokens[0], ends)
        while len(tokens) < most and not bool(over.all()):
            tokens.append(self._logits(cache, tokens[-1][:, None], 1)[:, -1].argmax(-1))
            over |= torch.isin(tokens[-1], ends)
        texts = []
        for row in torch.stack(tokens, dim=1):
            stop = torch.isin(row, ends).nonzero()
            answer = row[: int(stop[0])] if len(stop) else row
            texts.append(self.tokenizer.decode(answer, skip_special_tokens=True).strip())
        return texts, len(tokens) - 1


_FULL = "full"


def _name(one: Cache) -> str:
    budget, candidate = one
    return _FULL if candidate is None else f"{candidate.label} at {budget}"
