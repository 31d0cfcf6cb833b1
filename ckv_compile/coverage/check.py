"""One architecture, checked: what is cut, and whether the rest is what an uncut model computes.

The oracle knows nothing of our caches: the unmodified model generates over its full cache, and its
attention is made not to see what the optimised model has evicted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ..api import explain, optimize
from ..config import EvictionConfig
from ..kernels import reference
from ..report import SiteRow
from .tiny import build

N, SHORT, STEPS = 60, 40, 5
OPTIONS: dict[str, Any] = {"window_size": 8, "lowering": "eager"}
CONFIG = EvictionConfig(budget=0.5, **OPTIONS)

# Lower case: what a table shows. Only "wrong" is a bug of ours.
RIGHT, ALONE, WRONG, NOT_RUN = "right", "left alone", "wrong", "not run"


@dataclasses.dataclass
class Result:
    """What was seen of one architecture; ``status`` is one of the four above."""

    kind: str
    name: str
    status: str = NOT_RUN
    sites: int = 0
    evicted: int = 0
    layers: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    graphs: int = 0
    breaks_theirs: int = 0
    breaks_ours: int = 0
    recompiles: int = 0
    checks: dict[str, bool] = dataclasses.field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0


@torch.no_grad()
def check(kind: str, name: str, *, padded: bool = True) -> Result:
    """Build, optimise and compare one architecture; what goes wrong is in the result.

    Args:
        padded: whether padded batches are compared as well, which is two thirds of the time.
    """
    result, began = Result(kind, name), time.perf_counter()
    try:
        _check(result, padded)
    except _NotRun as reason:
        result.note = str(reason)
    except Exception as error:
        result.status, result.note = WRONG, f"{type(error).__name__}: {_first_line(error)}"
    result.seconds = round(time.perf_counter() - began, 1)
    return result


class _NotRun(Exception):
    """The unmodified model cannot be built or run here: nothing to compare with."""


def _check(result: Result, padded: bool) -> None:
    try:
        plain = build(result.kind, result.name)
        # All apart, so that each entry is known by its key; the first one begins a decoder's text.
        ids = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:N][None] + 3
        ids[0, 0] = 2
        full = _generate(plain, ids)
    except Exception as error:
        raise _NotRun(f"{type(error).__name__}: {_first_line(error)}") from None
    cache = _cache_of(full)
    if cache is None:
        raise _NotRun("generates without a cache of keys and values")
    result.layers = sum(_length(layer) == N + STEPS - 1 for layer in cache.layers)
    model = optimize(copy.deepcopy(plain), 1.0, **OPTIONS)
    checks = result.checks
    counters.clear()
    checks["budget 1.0"] = torch.equal(_generate(model, ids).sequences, full.sequences)
    result.breaks_ours, result.breaks_theirs = _breaks()

    optimize(model, CONFIG.budget, **OPTIONS)
    cut = _generate(model, ids)
    report = explain(model)
    rows = [row for row in report.sites if row.phase == "prefill" and row.action == "evict"]
    result.sites = sum(row.phase == "prefill" for row in report.sites)
    result.evicted, result.graphs = len(rows), report.graphs
    result.reasons = dict(Counter(row.reason for row in report.rejections))
    if not result.sites and not report.rejections and result.breaks_theirs:
        # They stand inside of its attention: no graph holds one that could be named.
        result.reasons = {"GRAPH_BREAK": result.breaks_theirs}
    kept = _kept(cache, _cache_of(cut))
    checks["sizes"] = len(kept) == result.evicted
    if kept:
        with _hiding(cache, kept):
            expected = _generate(plain, ids)
        checks["tokens"] = torch.equal(cut.sequences, expected.sequences)
        pairs = zip(cut.logits, expected.logits, strict=False)
        checks["logits"] = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
        selected = _selected(plain, ids, cache, kept, rows)
        if selected is not None:
            checks["selection"] = selected
    else:
        checks["tokens"] = torch.equal(cut.sequences, full.sequences)
    for n in (50, 44):
        _generate(model, ids[:, :n])
    result.recompiles = explain(model).graphs - result.graphs
    if padded:
        _check_padded(result, plain, model, ids)
    result.status = (RIGHT if kept else ALONE) if all(checks.values()) else WRONG


def _check_padded(result: Result, plain: nn.Module, model: nn.Module, ids: Tensor) -> None:
    """A batch of a short row, padded on the left, and a whole one."""
    rows = torch.cat([ids, ids.roll(7, dims=1)])
    rows[1, 0] = 2
    mask = torch.ones_like(rows)
    mask[0, : N - SHORT] = 0
    padded = rows * mask + (1 - mask)

    def alone(one: nn.Module) -> Tensor:
        real = (rows[:1, N - SHORT :], rows[1:])
        return torch.cat([_generate(one, row).sequences[:, -STEPS:] for row in real])

    try:
        expected = _generate(plain, padded, mask).sequences
    except Exception as error:
        result.note = f"no padded batches: {type(error).__name__}: {_first_line(error)}"
        return
    whole = _generate(optimize(model, 1.0, **OPTIONS), padded, mask).sequences
    result.checks["padded, 1.0"] = torch.equal(whole, expected)
    if not torch.equal(alone(plain), expected[:, -STEPS:]):
        result.note = "the unmodified model's padded rows differ from the rows alone"
        return
    optimize(model, CONFIG.budget, **OPTIONS)
    cut = _generate(model, padded, mask)
    held = [_length(layer) for layer in _cache_of(cut).layers]
    if held.count(N // 2 + STEPS - 1) < result.evicted:
        # Left whole, with its reason: then it is the unmodified batch.
        tokens = expected[:, -STEPS:]
        result.reasons = dict(Counter(row.reason for row in explain(model).rejections))
    else:
        tokens = alone(model)
    result.checks["padded, 0.5"] = torch.equal(cut.sequences[:, -STEPS:], tokens)


def _generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    """Greedy tokens behind ``ids``, which a decoder of an encoder-decoder model gets as its own."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        encoded = torch.arange(3, 15).expand(len(ids), -1)
        inputs = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        inputs[model.main_input_name] = encoded
    inputs = {name: value for name, value in inputs.items() if value is not None}
    config = model.generation_config
    config.eos_token_id = config.forced_eos_token_id = config.forced_bos_token_id = None
    config.pad_token_id, config.bos_token_id = 1, 2
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = 2
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
    return model.generate(
        **inputs, **options, use_cache=True, return_dict_in_generate=True, output_logits=True
    )


def _cache_of(generated: Any) -> Any:
    """The decoder's own cache."""
    cache = getattr(generated, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if hasattr(cache, "layers") else None


def _length(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def _kept(full: Any, cut: Any) -> dict[int, Tensor]:
    """Positions ``[B, Hkv, b]`` that each cut layer has kept, found by its keys and values."""
    kept = {}
    entries = CONFIG.entries(N)
    for i, (whole, left) in enumerate(zip(full.layers, cut.layers, strict=True)):
        if _length(whole) != N + STEPS - 1 or _length(left) != entries + STEPS - 1:
            continue
        keys, few = whole.keys[:, :, :N].float(), left.keys[:, :, :entries].float()
        values, few_values = whole.values[:, :, :N].float(), left.values[:, :, :entries].float()
        distance = torch.cdist(few, keys) + torch.cdist(few_values, values)
        positions = distance.argmin(-1)
        again = keys.gather(2, positions[..., None].expand_as(few))
        if torch.allclose(again, few, atol=1e-5) and bool((positions.diff(dim=-1) > 0).all()):
            kept[i] = positions
    return kept


@contextlib.contextmanager
def _hiding(full: Any, kept: dict[int, Tensor]) -> Iterator[None]:
    """Attention of one query does not see the prompt's entries that are not ``kept``."""
    hidden = {}
    for i, positions in kept.items():
        shape = (*positions.shape[:2], N)
        hidden[i] = torch.ones(shape, dtype=torch.bool).scatter(2, positions, False)
    sdpa, softmax, logsumexp = F.scaled_dot_product_attention, F.softmax, torch.logsumexp
    # Eager attention shows no keys, latent attention other ones than the cache holds: their layers
    # are told apart by their order within a step.
    order = [i for i, layer in enumerate(full.layers) if _length(layer) == N + STEPS - 1]
    steps = {"length": 0, "calls": 0}, {"length": 0, "calls": 0}

    def next_layer(length: int, step: dict[str, int] = steps[0]) -> int:
        if step["length"] != length:
            step.update(length=length, calls=0)
        step["calls"] += 1
        return order[(step["calls"] - 1) % len(order)]

    def hides(i: int, heads: int, length: int) -> Tensor:
        mask = hidden[i].repeat_interleave(heads // hidden[i].shape[1], dim=1)
        return F.pad(mask, (0, length - N))[:, :, None]

    def hiding_sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # One query, or those of a group behind each other.
        if query.shape[2] >= N or not N < key.shape[2] <= N + STEPS:
            return sdpa(query, key, value, *args, **kwargs)
        known, following = _layer_of(full, key), next_layer(key.shape[2])
        i = following if known is None else known
        if i not in hidden:
            return sdpa(query, key, value, *args, **kwargs)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = args[0] if args else kwargs.get("attn_mask")
        bias = torch.zeros(1, 1, 1, key.shape[2]) if mask is None else mask
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
        bias = bias.masked_fill(hides(i, query.shape[1], key.shape[2]), -torch.inf)
        return sdpa(query, key, value, attn_mask=bias, scale=kwargs.get("scale"))

    def without_hidden(logits: Tensor, step: dict[str, int]) -> Tensor:
        # [B, H, Q, K] or [B*H, Q, K]
        if logits.dim() in (3, 4) and logits.shape[-2] < N < logits.shape[-1] <= N + STEPS:
            i, length = next_layer(logits.shape[-1], step), logits.shape[-1]
            if i in hidden:
                heads = logits.shape[-3] // (len(hidden[i]) if logits.dim() == 3 else 1)
                hiding = hides(i, heads, length)
                hiding = hiding.flatten(0, 1) if logits.dim() == 3 else hiding
                logits = logits.masked_fill(hiding, -torch.inf)
        return logits

    def hiding_softmax(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(without_hidden(logits, steps[0]), *args, **kwargs)

    def hiding_logsumexp(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A sink as a factor of the output: Granite's.
        return logsumexp(without_hidden(logits, steps[1]), *args, **kwargs)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", hiding_sdpa),
        mock.patch.object(F, "softmax", hiding_softmax),
        mock.patch.object(torch, "softmax", hiding_softmax),
        mock.patch.object(torch, "logsumexp", hiding_logsumexp),
    ):
        yield


def _layer_of(full: Any, key: Tensor) -> int | None:
    """The cache layer whose prompt ``key`` attends to, repeated over groups or not.

    None where no layer holds it, or several do: a tiny model's layers may be alike.
    """
    found = []
    for i, layer in enumerate(full.layers):
        if _length(layer) != N + STEPS - 1 or key.shape[1] % layer.keys.shape[1]:
            continue
        whole = layer.keys[:, :, :N]
        groups = key.shape[1] // whole.shape[1]
        same = key.shape[-1] == whole.shape[-1] and key.shape[0] == whole.shape[0]
        if same and torch.allclose(key[:, ::groups, :N], whole, atol=1e-5):
            found.append(i)
    return found[0] if len(found) == 1 else None


def _selected(
    plain: nn.Module, ids: Tensor, full: Any, kept: dict[int, Tensor], rows: list[SiteRow]
) -> bool | None:
    """Whether the reference selects the same; None where the model does not call SDPA."""
    calls: dict[int, tuple[Tensor, Tensor, Tensor, Any, Tensor | None]] = {}
    order: list[Tensor] = []
    latent = all("latent" in row.cache for row in rows)
    sdpa = F.scaled_dot_product_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == N:
            i = _layer_of(full, key)
            order.append(key)
            i = len(order) - 1 if i is None and latent else i
            if i is not None:
                mask = args[0] if args else kwargs.get("attn_mask")
                bias = mask if mask is not None and mask.is_floating_point() else None
                calls[i] = (query, key, value, kwargs.get("scale"), bias)
        return sdpa(query, key, value, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", recording):
        _generate(plain, ids)
    if len(rows) != len(kept) or not set(kept) <= set(calls):
        return None
    same = True
    for row, i in zip(rows, sorted(kept), strict=True):
        path = row.weight.split(" ")[0]
        query, key, value, scale, bias = calls[i]
        groups = 1 if latent else key.shape[1] // kept[i].shape[1]
        key, value = key[:, ::groups], value[:, ::groups]
        try:
            weight = plain.get_parameter(path)
        except AttributeError:
            return None
        scores = reference.window_attention(query, key, scale, CONFIG.window_size, 7, bias=bias)
        if latent:
            scores = scores.mean(1, keepdim=True)
        # A model may use the transpose of what its parameter holds; a square one does not show it.
        shapes = {False: query.shape[1] * value.shape[3] == weight.shape[1]}
        shapes[True] = "[in, out]" in row.weight and weight.numel() % len(weight) == 0
        same = same and any(
            torch.equal(_reference(scores, value, weight, in_out, query.shape[1], latent), kept[i])
            for in_out, fits in shapes.items()
            if fits
        )
    return same


def _reference(
    scores: Tensor, value: Tensor, weight: Tensor, in_out: bool, heads: int, latent: bool
) -> Tensor:
    """Kept positions by the oracle."""
    norm = reference.projected_norm(value, weight, in_out, heads, "l1")
    norm = norm.mean(1, keepdim=True) if latent else norm
    return reference.select(scores, norm, CONFIG.entries(N), CONFIG.window_size, 0.5, 1e-4)


def _breaks() -> tuple[int, int]:
    """Graph breaks since the last clear: in our files, and in the model's."""
    reasons = counters["graph_break"]
    ours = sum(count for reason, count in reasons.items() if "ckv_compile" in str(reason))
    return ours, sum(reasons.values()) - ours


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "")[:200]
