"""How far eviction moves each head's output, and how close the bound comes (arXiv 2502.03805)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bounds import LastQueries
from .caches import cut, fresh_cache, layers_of, uncut_layers
from .candidates import Candidate, Methods, Spec, candidates_of
from .probe import Seen, Watcher

BUDGETS = (0.025, 0.05, 0.1, 0.2, 0.4)
METHODS = ("snapkv", "criticalkv")


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One attention, one method, one budget; means over the queries and sequences, by query head.

    ``perturbation`` is ``||o - o_N||_1`` of a head's output seen through its slice of ``W_O``,
    ``theta`` its bound, ``sigma_first`` the attention on what stage 1 and the window hold,
    ``sigma`` that on all that is kept. ``group`` is the perturbation of the heads of a KV head
    together, and ``layer`` of all heads together, which is what the next layer sees. ``output`` is
    ``||o||_1`` of all heads together, to compare with.
    """

    site: str
    method: str
    budget: Spec
    kept: int
    perturbation: tuple[float, ...]
    theta: tuple[float, ...]
    sigma_first: tuple[float, ...]
    sigma: tuple[float, ...]
    group: tuple[float, ...]
    layer: float
    output: float

    @property
    def tightness(self) -> tuple[float, ...]:
        """``L / theta``, by query head; 1 where the bound is reached, 0 where nothing is lost."""
        pairs = zip(self.perturbation, self.theta, strict=True)
        return tuple(low / high if high > 0 else 0.0 for low, high in pairs)


@dataclasses.dataclass(frozen=True)
class HiddenRow:
    """By how much the hidden states behind each layer differ from those over the full cache.

    ``distance``: relative L2 of the last queries' states, the embeddings' first.
    """

    method: str
    budget: Spec
    distance: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class PerturbationReport:
    """What each method does at each budget; ``print`` it, ``save`` it.

    ``kept`` holds, for each site, method and budget, the positions kept of the first sequence,
    ``[Hkv, b]``. ``note`` says why there are no hidden states, if there are none.
    """

    methods: tuple[str, ...]
    budgets: tuple[Spec, ...]
    tokens: int
    queries: int
    later: int
    rows: tuple[LayerRow, ...]
    hidden: tuple[HiddenRow, ...] = ()
    note: str = ""
    texts: tuple[str, ...] = ()
    kept: dict[tuple[str, str, Spec], Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def of(self, method: str, budget: Spec) -> list[LayerRow]:
        """The rows of one method and budget, layer by layer."""
        return [row for row in self.rows if row.method == method and row.budget == budget]

    def share_better(
        self, method: str, than: str, budget: Spec, what: str = "perturbation"
    ) -> tuple[int, int]:
        """How many heads ``method`` moves strictly less than ``than``, and of how many.

        Args:
            what: "perturbation" or "theta", by query head; or "group", by KV head.
        """
        pairs = [
            pair
            for mine, other in zip(self.of(method, budget), self.of(than, budget), strict=True)
            for pair in zip(getattr(mine, what), getattr(other, what), strict=True)
        ]
        return sum(low < high for low, high in pairs), len(pairs)

    def summary(self) -> list[dict[str, Any]]:
        """One row for each method and budget, as plain data; means over heads or layers."""
        first = self.methods[0]
        found = []
        for budget in self.budgets:
            for method in self.methods:
                rows = self.of(method, budget)
                better, heads = self.share_better(method, first, budget)
                hidden = [h for h in self.hidden if (h.method, h.budget) == (method, budget)]
                found.append({
                    "budget": budget,
                    "method": method,
                    "kept": rows[0].kept,
                    "perturbation": _mean(rows, "perturbation"),
                    "theta": _mean(rows, "theta"),
                    "tightness": _mean(rows, "tightness"),
                    "sigma_first": _mean(rows, "sigma_first"),
                    "sigma": _mean(rows, "sigma"),
                    "layer": sum(row.layer for row in rows) / len(rows),
                    f"better_than_{first}": None if method == first else better / heads,
                    "hidden": hidden[0].distance[-1] if hidden else None,
                })  # fmt: skip
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for ``json.dumps``; without the positions kept."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del data["kept"], data["texts"]
        data["rows"] = [dataclasses.asdict(row) for row in self.rows]
        data["hidden"] = [dataclasses.asdict(row) for row in self.hidden]
        return data | {"summary": self.summary()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PerturbationReport:
        """What ``to_dict`` made, from JSON as well."""
        given = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        for name, kind in (("rows", LayerRow), ("hidden", HiddenRow)):
            given[name] = tuple(kind(**_with_tuples(row)) for row in given[name])
        return cls(**_with_tuples(given))

    def save(self, path: str | Path) -> Path:
        """Write ``.html`` (one file with pictures), ``.json`` or a picture, ``.png``.

        Raises:
            ValueError: for another ending.
            ModuleNotFoundError: for a picture without matplotlib.
        """
        from .html import save_perturbation

        return save_perturbation(self, Path(path))

    def __str__(self) -> str:
        from .text import perturbation_table

        return perturbation_table(self)


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists alone."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _mean(rows: Sequence[LayerRow], name: str) -> float:
    values = [value for row in rows for value in getattr(row, name)]
    return sum(values) / len(values)


@torch.no_grad()
def perturbation(
    model: nn.Module,
    input_ids: Tensor,
    budgets: Sequence[Spec] = BUDGETS,
    methods: Methods = METHODS,
    *,
    queries: int | None = None,
    later: int = 0,
    hidden: bool = True,
    progress: bool = False,
    watcher: Watcher | None = None,
    on_layer: Callable[[list[LayerRow]], None] | None = None,
    **options: Any,
) -> PerturbationReport:
    """Read a text once, uncompiled, and measure what each method's cut does to every head.

    Only one layer's attention is held at a time, one KV head of it, beside the model's own cache.

    Args:
        model: in eval mode; it stays as it is.
        input_ids: ``[B, n]`` without padding.
        budgets: as :func:`ckv_compile.optimize` takes them.
        methods: names; or labels with options, ``{"no epsilon": {"epsilon": 0.0}}``. The first one
            is what the others are compared with.
        queries: measure on the last so many; by default ``window_size``, those that the methods
            score by.
        later: if given, the last so many tokens are no part of the prompt that is cut, and their
            queries, which no method has seen, are those measured.
        hidden: whether to run the last queries over each cut cache as well.
        progress: whether to show a bar.
        watcher: of the model, to trace it once for many texts.
        on_layer: is called with a layer's rows as soon as they are there.
        **options: the other fields of :class:`ckv_compile.EvictionConfig`, for all methods.

    Raises:
        TypeError, ValueError: naming the argument and what it takes; or if no attention is matched.
    """
    chosen = tuple(one.uniform() for one in candidates_of(methods, **options))
    wanted = _Wanted(chosen, tuple(budgets), *_lengths(input_ids, chosen, queries, later))
    for one in chosen:
        if later and one.config.reads_rotation:
            raise ValueError(
                f"later={later} with {one.label!r}, which reads the rotation of the whole text; it "
                f"takes 0"
            )
    watcher = watcher or Watcher(model)
    cache = _cache_of(model)
    rows: list[LayerRow] = []
    kept: dict[tuple[str, str, Spec], Tensor] = {}
    addresses: dict[str, int] = {}

    def visit(seen: Seen) -> None:
        found, keep = _measured(seen, wanted)
        rows.extend(found)
        kept.update(keep)
        addresses[seen.name] = seen.cached[0].data_ptr()
        advance(seen.name)
        if on_layer is not None:
            on_layer(found)

    inputs: dict[str, Any] = {"input_ids": input_ids}
    if cache is not None:
        inputs |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    with _bar(watcher, progress) as advance:
        watcher(visit, **inputs)
    if not rows:
        why = "; ".join(sorted({f"{r.reason.name}: {r.detail}" for r in watcher.rejections}))
        raise ValueError(f"no attention of the model was matched: {why or 'it has none'}")
    layers = {} if cache is None else layers_of(cache, addresses)
    distances, note = _hidden(model, input_ids, cache, layers, kept, wanted, hidden)
    labels = tuple(one.label for one in chosen)
    first = {name: keep[0] for name, keep in kept.items()}
    return PerturbationReport(
        labels, wanted.budgets, wanted.length, wanted.queries, later, tuple(rows), distances, note,
        kept=first,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What to measure: the prompt is the first ``length`` tokens."""

    candidates: tuple[Candidate, ...]
    budgets: tuple[Spec, ...]
    length: int
    queries: int


def _lengths(
    input_ids: Tensor, chosen: Sequence[Candidate], queries: int | None, later: int
) -> tuple[int, int]:
    """Tokens of the prompt, and queries to measure."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise TypeError("input_ids takes a tensor of token ids, [B, n]")
    windows = [one.config.window_size for one in chosen]
    if isinstance(later, bool) or not isinstance(later, int) or later < 0:
        raise ValueError(f"later={later!r}; it takes a number of tokens >= 0")
    if queries is None:
        queries = later or max(windows)
    most = later or input_ids.shape[1]
    if isinstance(queries, bool) or not isinstance(queries, int) or not 1 <= queries <= most:
        raise ValueError(f"queries={queries!r}; it takes 1 to {most} of the last queries")
    length = input_ids.shape[1] - later
    if length <= max(windows):
        raise ValueError(
            f"input_ids has {length} tokens to cut; it takes more than window_size={max(windows)}"
        )
    return length, queries


def _cache_of(model: Any) -> Any:
    """A cache whose layers can be told apart; None for a model of another kind."""
    try:
        return fresh_cache(model)
    except ValueError:
        return None


def _measured(
    seen: Seen, wanted: _Wanted
) -> tuple[list[LayerRow], dict[tuple[str, str, Spec], Tensor]]:
    """The rows of one site, and what each method keeps, ``[B, Hkv, b]``."""
    prompt, length = seen.prompt(wanted.length), seen.kv_len
    tail = torch.arange(wanted.length, length)
    whole = LastQueries(seen, wanted.queries)
    rows, kept = [], {}
    for budget in wanted.budgets:
        for one in wanted.candidates:
            config = one.at(budget)
            entries = config.entries(wanted.length)
            keep = one.keeps(prompt, config, entries)
            first = prompt.first_stage(config, entries)
            sums = whole.kept(_with(keep, tail), _with(first, tail))
            rows.append(LayerRow(seen.name, one.label, budget, keep.shape[2], **sums))
            kept[seen.name, one.label, budget] = keep
    return rows, kept


def _with(keep: Tensor, tail: Tensor) -> Tensor:
    return torch.cat([keep, tail.expand(*keep.shape[:2], -1)], dim=2)


def _hidden(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    layers: Mapping[str, int],
    kept: Mapping[tuple[str, str, Spec], Tensor],
    wanted: _Wanted,
    asked: bool,
) -> tuple[tuple[HiddenRow, ...], str]:
    """The last queries' hidden states over each cut cache, against those over the full one."""
    if not asked:
        return (), "hidden states were not asked for"
    if cache is None or input_ids.shape[0] > 1:
        return (), "hidden states take a transformers model and a batch of one"
    if uncut_layers(cache, dict.fromkeys(layers.values(), input_ids)):
        return (), "hidden states take a model of which every full-attention layer is cut"
    if len(layers) < len(cache.layers):
        return (), "hidden states take a model without sliding-window layers"
    length = input_ids.shape[1] - wanted.queries
    tail = input_ids[:, length:]
    everything = torch.arange(length).expand(1, next(iter(kept.values())).shape[1], -1)
    states = _states(model, cut(cache, dict.fromkeys(layers.values(), everything), length), tail)
    rows = []
    for budget in wanted.budgets:
        for one in wanted.candidates:
            keep, ragged = {}, False
            for site, i in layers.items():
                positions = kept[site, one.label, budget]
                # Those of the last queries themselves come in again.
                before = positions < length
                counts = before.sum(-1)
                ragged |= bool((counts != counts.flatten()[0]).any())
                keep[i] = positions[..., : int(counts.min())]
            if ragged:
                return (), f"hidden states take queries <= window_size, not {wanted.queries}"
            others = _states(model, cut(cache, keep, length), tail)
            pairs = zip(others, states, strict=True)
            distance = tuple(float((a - b).norm() / b.norm()) for a, b in pairs)
            rows.append(HiddenRow(one.label, budget, distance))
    return tuple(rows), ""


def _states(model: Any, cache: Any, tail: Tensor) -> list[Tensor]:
    """Hidden states of the ``tail`` tokens behind ``cache``, embeddings first, float32."""
    done = model._call_impl(
        input_ids=tail, past_key_values=cache, use_cache=True, output_hidden_states=True
    )
    return [state.float() for state in done.hidden_states]


@contextlib.contextmanager
def _bar(watcher: Watcher, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function to call after each layer, with its name."""
    if not shown:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tracing", total=None)

        def advance(name: str) -> None:
            progress.update(task, description=name, total=len(watcher.sites), advance=1)

        yield advance
