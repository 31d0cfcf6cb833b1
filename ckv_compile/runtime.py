"""The callable that ``optimize`` puts in front of a model: prepare the inputs, run the region."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from .backend import COUNTS_BY_LENGTH
from .budget import CacheBytes
from .config import EvictionConfig
from .cuts import cuts, why_whole
from .inputs import (
    MASKS,
    by_name,
    cache_room,
    first_two,
    is_contiguous,
    mark_attributes,
    mark_dynamic,
    prepare_mask,
    tokens_of,
)
from .plan import Plan, plan_for
from .region import RECOMPILE_LIMIT, Region, WrongPositionsError, compile_settings
from .report import NOTHING_MATCHED, Report, merged
from .sizes import varies


class OptimizedForward:
    """What ``model(...)`` calls after ``optimize``.

    ``nn.Module.compile`` puts its callable in the same place, so ``generate`` finds it, and copies
    and pickles of the model leave it behind.
    """

    def __init__(
        self, model: nn.Module, config: EvictionConfig, region: Region, *, explains: bool = False
    ) -> None:
        self.model, self.config, self.region = model, config, region
        self.explains = explains  # what a real call would be refused for is in the report
        self.cuts = False  # whether a plain cache may have been cut by now
        self.warned: set[str] = set()
        # Of the last call's batch, for the report of a budget in bytes.
        self.size: CacheBytes | None = None
        # Reports of the region that have been checked for what a user must hear of.
        self.read = len(region.reports)
        self.row_bytes: dict[Any, tuple[int, list[tuple[int, int]]]] = {}
        # Of the tokens' kinds, where policies choose by them.
        self.table: Tensor | None = None

    @property
    def report(self) -> Report:
        """All graphs compiled so far, at the present budget."""
        report = merged(self.region.reports, self.config)
        unresolved = self.config.counts_bytes and self.size is None
        if unresolved or self.config.budget == self.region.config.budget:
            return report
        rows = tuple(
            row.at(self.config.entries(row.kv_len, self.size))
            if row.budget_from == "input"
            else row
            for row in report.sites
        )
        return dataclasses.replace(report, sites=rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In somebody else's region, or exported: the plain model is what they want. Not
        # is_compiling and is_exporting, which are true in all threads while one is.
        if torch.compiler.is_dynamo_compiling() or active_fake_mode() is not None:
            return self.model._call_impl(*args, **kwargs)
        if self.model.training or torch.is_grad_enabled():
            self._warn_once(
                "gradients",
                "the model was called in training mode or with gradients on: this call runs "
                "uncompiled and evicts nothing; use model.eval() and torch.no_grad()",
            )
            return self.model._call_impl(*args, **kwargs)
        try:
            return self.run(*args, **kwargs)
        finally:
            # After an error as well: a later call of the same kind compiles nothing to check.
            unread, self.read = self.region.reports[self.read :], len(self.region.reports)
            self._check(unread)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare cache, mask and budget of an inference call and run it in the region."""
        args, kwargs = by_name(self.model, args, kwargs)
        tokens, room = tokens_of(args, kwargs), cache_room()
        cache, q_len = self._prepare_cache(kwargs), 0 if tokens is None else tokens.shape[1]
        if cache is None:
            return self._run(tokens, None, True, q_len > 1, args, kwargs)[0]
        if not isinstance(cache, room.DynamicCache):
            self._warn_once(
                "cache",
                f"a {type(cache).__name__} cannot be cut: its calls run uncompiled; "
                "pass an EvictedCache, a DynamicCache or none",
            )
            return self.model._call_impl(*args, **kwargs)
        fresh = room.tokens_seen(cache) == 0
        if self.config.packs and fresh and room.has_fixed_layers(cache):
            raise ValueError(
                f"{self.config.packed_by} leaves heads of different lengths, which an "
                f"EvictedCache(max_new_tokens=...) cannot hold; take another, or a cache that grows"
            )
        if self.config.max_entries is not None and room.has_fixed_layers(cache):
            raise ValueError(
                f"max_entries={self.config.max_entries} bounds a cache that grows; an "
                f"EvictedCache(max_new_tokens=...) is bounded by that"
            )
        if self.config.max_entries is not None or self.config.chooses_policies:
            room.watch(cache, self.model)
        kinds = self._kinds(tokens, cache, fresh)
        cutting = cuts(self.config, cache, q_len, fresh=fresh)
        if not fresh and q_len > 1:
            why = why_whole(self.config, cache)
            if why:
                self._warn_once("packed", f"what follows this prompt is kept whole: {why}")
        with room.writing(cache, self.model, q_len, cutting=cutting):
            result, plan = self._run(tokens, cache, fresh, cutting, args, kwargs, kinds)
        if kinds is not None:
            room.note_kinds(cache, kinds, plan)
        if plan is not None:
            room.settle(cache, plan, self.config.window_size)
        elif q_len == 1:
            room.finish_prompt(cache)
        return result

    def _kinds(self, tokens: Any, cache: Any, fresh: bool) -> Tensor | None:
        """What policies choose by, of the tail's tokens and these; None without policies."""
        if not self.config.chooses_policies or not (fresh or cache_room().has_policies(cache)):
            return None
        if tokens is None or tokens.is_floating_point():
            raise ValueError("method='fastgen' tells tokens apart by their ids; pass input_ids")
        assert self.config.token_kinds is not None
        if self.table is None or self.table.device != tokens.device:
            self.table = self.config.token_kinds.table().to(tokens.device)
        kinds = self.table[tokens.clamp(max=len(self.table) - 1)]
        held: Tensor = cache_room().kinds_held(cache, kinds)
        return held

    def _run(
        self,
        tokens: Tensor | None,
        cache: Any,
        fresh: bool,
        cutting: bool,
        args: Any,
        kwargs: dict[str, Any],
        kinds: Tensor | None = None,
    ) -> tuple[Any, Plan | None]:
        """The call's result, and what it was to keep; None where nothing is cut."""
        seen_mask = kwargs.get(self._decoder_mask)
        # Without a cache transformers takes positions that start anew for packed texts, but
        # only where there is no mask.
        packs = cache is None and kwargs.get("position_ids") is not None
        mask = prepare_mask(
            kwargs, self._decoder_mask, None if fresh else cache, tokens, drops=not packs
        )
        if mask is not None and fresh and not is_contiguous(mask):
            self._warn_once(
                "holes",
                "attention_mask has holes between real tokens: this call runs uncompiled and "
                "evicts nothing",
            )
            return self.model._call_impl(*args, **kwargs), None
        plan = self._plan(tokens, cache, fresh, seen_mask, mask, kwargs) if cutting else None
        if plan is not None and kinds is not None:
            varies(kinds, 1)
            plan = dataclasses.replace(plan, kinds=kinds)
        mark_dynamic(tokens, kwargs)
        if cache is not None:
            cache_room().announce(cache, plan)
        region = self.region
        region.counted = cache is not None
        if cache is None and not self.config.budget.keeps_everything:  # type: ignore[union-attr]
            # Without a plan nobody knows what the graph itself makes of the budget.
            self.cuts |= tokens is None
            self.cuts |= plan is not None and plan.capacity.shape[0] < plan.seen
        region.cuts = cache is None and self.cuts and not self.explains
        if region.cuts and region.counts_by_length:
            raise WrongPositionsError(COUNTS_BY_LENGTH)
        try:
            with compile_settings():
                result = region.call(plan, args, kwargs)
            if cache is None and plan is not None:
                mark_attributes(self.model, {plan.capacity.shape[0], plan.seen})
            return result, plan
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, WrongPositionsError):
                raise error.inner_exception from None
            raise
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._warn_once(
                "limit",
                f"the recompile limit of {RECOMPILE_LIMIT} is reached: calls of this shape run "
                "uncompiled and evict nothing. TORCH_LOGS=recompiles tells what changes",
            )
            return self.model._call_impl(*args, **kwargs), None

    @property
    def _decoder_mask(self) -> str:
        """The mask over the tokens that are cached; an encoder's is none of ours."""
        config = getattr(self.model, "config", None)
        encodes = getattr(config, "is_encoder_decoder", False)
        return "decoder_attention_mask" if encodes else "attention_mask"

    def _prepare_cache(self, kwargs: dict[str, Any]) -> Any:
        """The caller's transformers cache, made to remember logical lengths; a new one for none."""
        room = cache_room()
        if room is None:
            return None
        cache = kwargs.get("past_key_values")
        if cache is None:
            config = getattr(self.model, "config", None)
            used = kwargs.get("use_cache")
            if used if used is not None else getattr(config, "use_cache", False):
                cache = kwargs["past_key_values"] = room.cache_for(self.model)
        cache = room.self_attention_of(cache)
        room.adopt(cache)
        return cache

    def _plan(
        self,
        tokens: Any,
        cache: Any,
        fresh: bool,
        seen_mask: Tensor | None,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Plan | None:
        size = None
        if self.config.counts_bytes:
            size = self.size = self._cache_bytes(tokens, kwargs)
        if fresh:
            # Without layers that remember their rows, a padded batch must keep its whole cache.
            if cache is None or not cache_room().follows_rows(cache):
                mask = None
            strict = cache is not None
            plan = plan_for(
                self.config, tokens, seen_mask=mask, held_mask=mask, size=size, strict=strict
            )
            if self._fits_all_layers(cache, mask, plan):
                return plan
            return plan_for(self.config, tokens, size=size, strict=strict)
        layer, packed = cache_room().first_layer(cache), None
        if not self.config.chooses_policies:
            packed = cache_room().packed_rows(cache)
        before = layer.get_seq_length()
        counted = seen_mask is not None and seen_mask.shape[1] == before + tokens.shape[1]
        if mask is not None:
            kv_len = layer.held + tokens.shape[1]
            # Who does not know how many tokens its rows have seen, or has pads between them, waits.
            if not counted or not is_contiguous(mask[:, -kv_len:]):
                return None
        # Rows that are packed to different lengths were padded: each counts its own tokens.
        differ = packed is not None and len(set(packed)) > 1
        if differ and not counted:
            return None
        seen_mask = None if mask is None and not differ else seen_mask
        plan = plan_for(
            self.config.bounded
            if self.config.max_entries and tokens.shape[1] == 1
            else self.config,
            tokens,
            held=layer.held,
            gap=layer.gap,
            seen_mask=seen_mask,
            held_mask=mask,
            before=before,
            packed=packed,
            size=size,
        )
        if self.config.packs and plan.total is None:
            return None
        return plan if self._fits_all_layers(cache, seen_mask, plan) else None

    def _fits_all_layers(self, cache: Any, mask: Tensor | None, plan: Plan) -> bool:
        """Whether layers that are never cut can do with the mask that the plan's rows leave."""
        if mask is None or plan.row_budgets is None or plan.real is None:
            return True
        room = cache_room()
        if plan.total is not None:
            return room.bounded_layers_agree(cache, self.model, mask, None)
        if plan.capacity.shape[0] == plan.real.shape[1]:  # nothing moves
            return True
        return room.bounded_layers_agree(cache, self.model, mask, plan.row_budgets)

    def _cache_bytes(self, tokens: Tensor, kwargs: dict[str, Any]) -> CacheBytes:
        """What an entry takes in the model's caches: two tokens are run uncompiled and measured.

        No configuration says it for every model: heads may be shared, layers bounded.
        """
        room = cache_room()
        cache = None if room is None else room.cache_for(self.model)
        if cache is None:
            raise ValueError(
                f"{self.config.budget}: bytes are counted on a transformers DynamicCache, which a "
                f"{type(self.model).__name__} does not make; give a share or a number of entries"
            )
        dtype = next((p.dtype for p in self.model.parameters()), None)
        if dtype not in self.row_bytes:
            short = {name: first_two(name, value) for name, value in kwargs.items()}
            short = {k: v for k, v in short.items() if k not in (*MASKS, "position_ids")}
            self.model._call_impl(**{**short, "past_key_values": cache, "use_cache": True})
            self.row_bytes[dtype] = room.row_bytes(room.self_attention_of(cache))
        entry, bounded = self.row_bytes[dtype]
        batch, n = tokens.shape[:2]
        other = sum(min(n, length) * each for each, length in bounded)
        return CacheBytes(batch * entry, batch * other)

    def _check(self, new: list[Report]) -> None:
        """Say loudly, once, that a compiled prefill found nothing to evict."""
        refused = [row for report in new for row in report.rejections]
        if new and not self.report.sites:
            why = "; ".join(sorted({f"{row.reason}: {row.detail}" for row in refused}))
            if not why and len(new) > 1:
                why = (
                    f"the call was traced as {len(new)} graphs, none of which holds an attention: "
                    "the model's own graph breaks may stand inside of it, TORCH_LOGS=graph_breaks "
                    "names them"
                )
            self._warn_once("nothing", f"{NOTHING_MATCHED}" + (f" ({why})" if why else ""))
        elif any(row.reason == "PADDING_MASK" for row in refused):
            self._warn_once(
                "padding", "a padded batch (PADDING_MASK) is not evicted: it keeps its whole cache"
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(f"ckv_compile: {message}", UserWarning, stacklevel=4)
