"""The callable that ``optimize`` puts in front of a model: prepare the inputs, run the region."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backend import Compiled, compile_graph, log_default_budget
from .config import CacheBytes, EvictionConfig
from .passes import insert  # noqa: F401  registers the capacity marker
from .plan import Plan, plan_for
from .report import NOTHING_MATCHED, Report, merged

# The tensors whose axis 1 counts tokens; the first one present says how long the prompt is.
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
_MASKS = ("attention_mask", "decoder_attention_mask")
# Prefill, decode, later turns, each with and without padding and positions, batches of one and of
# many: more kinds of calls than Dynamo's default of 8, and past the limit nothing is evicted.
_RECOMPILE_LIMIT = 32

_LENGTH_AXIS_1 = (*_TOKENS, *_MASKS, "position_ids", "token_type_ids")


class Region:
    """One model under ``torch.compile``, and the reports of the graphs it was compiled to."""

    def __init__(
        self, model: nn.Module, config: EvictionConfig, *, default_budget: bool = False
    ) -> None:
        self.config = config
        self.reports: list[Report] = []
        # Whether a running call's cache counts tokens: then only counted sites may be cut.
        self.counted = False

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Compiled:
            compiled, report = compile_graph(
                gm, example_inputs, config, training=model.training, counted=self.counted
            )
            if default_budget and report.evicted and not self.reports:
                log_default_budget()
            self.reports.append(report)
            return compiled

        self.call = torch.compile(
            _region(model), backend=backend, recompile_limit=_RECOMPILE_LIMIT
        )

    @property
    def bakes_budget(self) -> bool:
        """Whether some compiled graph holds the budget as a constant, not as an input."""
        rows = (row for report in self.reports for row in report.sites)
        return any(row.budget_from == "config" or row.action == "keep all" for row in rows)


def _region(self: nn.Module) -> Callable[..., Any]:
    # The closure holds the model as "self", so that the paths in a report start inside it.
    def forward(plan: Plan | None, args: Any, kwargs: Any) -> Any:
        if plan is not None:
            plan.mark()
        return self._call_impl(*args, **kwargs)

    # Dynamo keeps what it has compiled by code object: two models, or two configurations of one,
    # must share neither that nor a recompile limit. Not isolate_recompiles, whose identity is the
    # whole process's in torch 2.13: a compile in another thread would take it.
    forward.__code__ = forward.__code__.replace()
    return forward


class OptimizedForward:
    """What ``model(...)`` calls after ``optimize``.

    ``nn.Module.compile`` puts its callable in the same place, so ``generate`` finds it, and copies
    and pickles of the model leave it behind.
    """

    def __init__(self, model: nn.Module, config: EvictionConfig, region: Region) -> None:
        self.model, self.config, self.region = model, config, region
        self.warned: set[str] = set()
        # Of the last call's batch, for the report of a budget in bytes.
        self.size: CacheBytes | None = None
        # Reports of the region that have been checked for what a user must hear of.
        self.read = len(region.reports)
        self.row_bytes: dict[Any, tuple[int, list[tuple[int, int]]]] = {}

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
        # In somebody else's region. Not is_compiling, which is true in all threads while one is.
        if torch.compiler.is_dynamo_compiling():
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
        args, kwargs = _by_name(self.model, args, kwargs)
        tokens, room = _tokens_of(args, kwargs), _cache_room()
        cache = self._prepare_cache(kwargs)
        if cache is None:
            return self._run(tokens, None, True, args, kwargs)[0]
        if not isinstance(cache, room.DynamicCache):
            self._warn_once(
                "cache",
                f"a {type(cache).__name__} cannot be cut: its calls run uncompiled; "
                "pass an EvictedCache, a DynamicCache or none",
            )
            return self.model._call_impl(*args, **kwargs)
        q_len = 0 if tokens is None else tokens.shape[1]
        cutting = q_len > 1 and self._cuts(cache)
        with room.writing(cache, q_len, cutting=cutting):
            result, plan = self._run(tokens, cache, cutting, args, kwargs)
        if plan is not None:
            room.settle(cache, plan, self.config.window_size)
        elif q_len == 1:
            room.finish_prompt(cache)
        return result

    def _cuts(self, cache: Any) -> bool:
        """Whether several tokens behind ``cache`` leave it cut to the budget of all of them."""
        room = _cache_room()
        if room.tokens_seen(cache) == 0:
            return True
        turn = self.config.later_turns == "evict" and not room.takes_back(cache)
        return (turn or room.in_prompt(cache)) and room.can_cut_again(cache)

    def _run(
        self, tokens: Tensor | None, cache: Any, cutting: bool, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Plan | None]:
        """The call's result, and what it was to keep; None where nothing is cut."""
        fresh = cache is None or _cache_room().tokens_seen(cache) == 0
        seen_mask = kwargs.get(self._decoder_mask)
        # Without a cache transformers takes positions that start anew for packed texts, but
        # only where there is no mask.
        packs = cache is None and kwargs.get("position_ids") is not None
        mask = _prepare_mask(
            kwargs, self._decoder_mask, None if fresh else cache, tokens, drops=not packs
        )
        if mask is not None and fresh and not _is_contiguous(mask):
            self._warn_once(
                "holes",
                "attention_mask has holes between real tokens: this call runs uncompiled and "
                "evicts nothing",
            )
            return self.model._call_impl(*args, **kwargs), None
        size = None
        if cutting and tokens is not None and self.config.counts_bytes:
            size = self.size = self._cache_bytes(tokens, kwargs)
        plan = self._plan(tokens, cache, seen_mask, mask, size) if cutting else None
        _mark_dynamic(tokens, kwargs)
        if cache is not None:
            _cache_room().announce(cache, plan)
        try:
            self.region.counted = cache is not None
            with _compile_settings():
                return self.region.call(plan, args, kwargs), plan
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._warn_once(
                "limit",
                f"the recompile limit of {_RECOMPILE_LIMIT} is reached: calls of this shape run "
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
        room = _cache_room()
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
        tokens: Tensor | None,
        cache: Any,
        seen_mask: Tensor | None,
        mask: Tensor | None,
        size: CacheBytes | None,
    ) -> Plan | None:
        if tokens is None or tokens.shape[1] == 1:
            return None
        if cache is None or _cache_room().tokens_seen(cache) == 0:
            # Without layers that remember their rows, a padded batch must keep its whole cache.
            if cache is None or not _cache_room().follows_rows(cache):
                mask = None
            return plan_for(
                self.config,
                tokens,
                seen_mask=mask,
                held_mask=mask,
                size=size,
                strict=cache is not None,
            )
        layer = _cache_room().first_layer(cache)
        before = layer.get_seq_length()
        if mask is not None:
            kv_len = layer.held + tokens.shape[1]
            counted = seen_mask is not None and seen_mask.shape[1] == before + tokens.shape[1]
            # Who does not know how many tokens its rows have seen, or has pads between them, waits.
            if not counted or not _is_contiguous(mask[:, -kv_len:]):
                return None
        return plan_for(
            self.config,
            tokens,
            held=layer.held,
            gap=layer.gap,
            seen_mask=None if mask is None else seen_mask,
            held_mask=mask,
            before=before,
            size=size,
        )

    def _cache_bytes(self, tokens: Tensor, kwargs: dict[str, Any]) -> CacheBytes:
        """What an entry takes in the model's caches: two tokens are run uncompiled and measured.

        No configuration says it for every model: heads may be shared, layers bounded.
        """
        room = _cache_room()
        cache = None if room is None else room.cache_for(self.model)
        if cache is None:
            raise ValueError(
                f"{self.config.budget}: bytes are counted on a transformers DynamicCache, which a "
                f"{type(self.model).__name__} does not make; give a share or a number of entries"
            )
        dtype = next((p.dtype for p in self.model.parameters()), None)
        if dtype not in self.row_bytes:
            short = {name: _first_two(name, value) for name, value in kwargs.items()}
            short = {k: v for k, v in short.items() if k not in (*_MASKS, "position_ids")}
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
            self._warn_once("nothing", f"{NOTHING_MATCHED}" + (f" ({why})" if why else ""))
        elif any(row.reason == "PADDING_MASK" for row in refused):
            self._warn_once(
                "padding", "a padded batch (PADDING_MASK) is not evicted: it keeps its whole cache"
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(f"ckv_compile: {message}", UserWarning, stacklevel=4)


@contextlib.contextmanager
def _compile_settings() -> Iterator[None]:
    """Settings that must hold while Dynamo traces, and for our calls alone."""
    from torch.fx.experimental import _config as shape_config

    with (
        # Sizes that are equal by accident (prompt length == head_dim) would cost a recompile.
        shape_config.patch(use_duck_shape=False),
        # Past the limit Dynamo runs eager without a word, that is, it stops evicting.
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        yield


def _by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its positional arguments named, where the forward names them."""
    if not args:  # generate names everything; it need not be looked up at each token
        return (), dict(kwargs)
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(args)]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(named) < len(args) or set(named) & set(kwargs):
        return args, dict(kwargs)
    return (), {**dict(zip(named, args, strict=True)), **kwargs}


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input whose axis 1 counts tokens: by its name, or else the first tensor of the call."""
    named = [kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), Tensor)]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value if value.dim() >= 2 else None
    return None


def _cache_room() -> Any:
    """``ckv_compile.cache``, where transformers is in use; a model of another origin needs none."""
    if "transformers" not in sys.modules:
        return None
    from . import cache

    return cache


def _prepare_mask(
    kwargs: dict[str, Any],
    decoder_mask: str,
    cache: Any,
    tokens: Tensor | None,
    *,
    drops: bool = True,
) -> Tensor | None:
    """Drop masks that hide nothing, fit the decoder's to a filled cache; returns it if it hides.

    A 2-D mask of ones costs a ``[Q, K]`` tensor in the graph and says nothing.
    """
    kept = ""
    if cache is not None and tokens is not None:
        mask = kwargs.get(decoder_mask)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            fitted = _cache_room().physical_mask(cache, mask, tokens.shape[1])
            if fitted is not None:
                kwargs[decoder_mask] = fitted
            # One graph for all steps: the mask stays when the last slot is in use.
            kept = decoder_mask if _cache_room().is_fixed(cache) else ""
    for name in _MASKS if drops else ():
        mask = kwargs.get(name)
        if name == kept or not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        if bool((mask == 1).all()):
            kwargs[name] = None
    mask = kwargs.get(decoder_mask)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _first_two(name: str, value: Any) -> Any:
    """An input of a call, as it would be for a prompt of two tokens."""
    counts = name in _LENGTH_AXIS_1 and isinstance(value, Tensor) and value.dim() >= 2
    return value[:, :2] if counts else value


def _is_contiguous(mask: Tensor) -> bool:
    """Whether the real tokens of each row stand together."""
    real = mask.bool()
    starts = real[:, :1].sum(-1) + (real[:, 1:] & ~real[:, :-1]).sum(-1)
    return bool((starts <= 1).all())


def _mark_dynamic(tokens: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Tell Dynamo which sizes vary, so that the first prompt does not fix them."""
    if tokens is not None:
        _mark(tokens, 1)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            if name in _LENGTH_AXIS_1 and value.dim() >= 2:
                _mark(value, 1)
                if value.dim() == 4:  # a ready-made mask [B, 1, Q, K]
                    _mark(value, 2)
                    _mark(value, 3)
        else:
            _mark_cache(value)


def _mark(tensor: Tensor, dim: int) -> None:
    if tensor.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _mark_cache(value: Any) -> None:
    """The lengths of the ``[B, Hkv, K, D]`` tensors in a cache object or in nested tuples."""
    if isinstance(value, Tensor):
        if value.dim() == 4:
            _mark(value, 2)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _mark_cache(item)
    elif isinstance(getattr(value, "layers", None), list):
        for layer in value.layers:
            if hasattr(layer, "declare_sizes"):
                layer.declare_sizes()
            else:
                _mark_cache((getattr(layer, "keys", None), getattr(layer, "values", None)))
    else:
        for part in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(value, part):
                _mark_cache(getattr(value, part))
