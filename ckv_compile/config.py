"""What the user asks for: the options of the pass and the budget, validated once and frozen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import torch

from .budget import Budget, CacheBytes
from .policies import TokenKinds
from .registry import METHODS, POLICY_METHODS, bases

ALLOCATIONS = ("uniform", "adakv", "headkv", "pyramid", "cake", "global")
NORMS = ("l1", "l2", "value")
LOWERINGS = ("auto", "inductor", "aot_eager", "eager")
LATER_TURNS = ("keep", "evict")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class EvictionConfig:
    """Options of the eviction pass; ``optimize`` and ``options={...}`` take the same names.

    Args:
        budget: see :class:`Budget`.
        method: "criticalkv" (arXiv 2502.03805), "snapkv" (attention alone, arXiv 2404.14469),
            "h2o", "tova", "streaming_llm", "knorm", "keydiff", "vatp", "caote", "defensive",
            "laprox", "expected_attention", "fastgen", or what
            :func:`ckv_compile.register_method` was given; each has a file in
            ``ckv_compile/methods``.
        window_size: observation window, the last queries; used for scoring and always kept.
        kernel_size: width of the pooling of attention scores, odd: the largest of the neighbours
            for "snapkv", their mean for "laprox".
        first_stage_ratio: CriticalKV's alpha, the share of the budget filled by attention alone.
        epsilon: CriticalKV's eps, added to the attention before it is multiplied by the norm.
        norm: "l1" or "l2" norm of the projected value; or "value", the L1 norm of the value alone,
            for models whose output projection cannot be read, or whose output is normed before it
            (Theorem 3 of the paper, which bounds the change of the output, does not hold for it).
            LaProx takes "l1" for "l2", its own.
        base: the method whose scores stand for the attention in both stages of CriticalKV: any
            whose scores are never negative. Those of "knorm" and "keydiff" are, and those of
            "streaming_llm" are positions: times a norm they would rank nothing. Over "snapkv",
            "h2o" and "tova" it is the paper's; over one that has weighed the values already they
            count twice.
        allocation: how the budget is shared out; the total is the same for all. "uniform": every
            head of every layer has the same; "adakv": heads of a layer compete (arXiv 2407.11550);
            "headkv": shares from ``head_scores`` (arXiv 2410.19258); "pyramid": fewer from layer to
            layer (arXiv 2406.02069); "cake": layers share by the spread and the change of their
            attention (arXiv 2503.12491); "global": all heads of all layers compete. All but
            "uniform" keep the cut prompt in packed form and need a transformers cache. What follows
            is cut again by methods that score each head alone: all but "tova", "defensive" and
            "expected_attention"; and not with "cake".
        safeguard: of "adakv", the share of a head's uniform budget that no other head can take.
        head_scores: of "headkv", a number >= 0 for each layer and KV head: nested sequences, a
            tensor ``[layers, heads]``, or the path of a JSON file with nested lists.
        recovery: of "fastgen" (arXiv 2310.01801), which takes no budget: each head keeps what the
            cheapest policy keeps that recovers this share of the prompt's attention in that head;
            0.95 if None. Each ``interval`` new tokens the policies are applied again.
        token_kinds: of "fastgen", which tokens are special and which are punctuation;
            ``optimize(..., tokenizer=...)`` reads them from a tokenizer.
        later_turns: "keep" all tokens that follow a prompt, or "evict" again whenever several come
            at once, to the budget of all tokens seen. A prompt fed in pieces is one prompt.
        max_entries: bound of the entries per KV head, on average where heads differ, while tokens
            are generated; None for none.
            When one more would not fit, the cache is cut to ``max_entries - interval``, scored by
            the last ``window_size`` queries. A prompt's budget is at most that as well.
        interval: tokens between two such cuts; at least ``window_size``.
        cross_attention: whether the entries of an encoder are evicted as well, once, at the first
            call of the decoder: its last ``window_size`` queries score them, and none is exempt.
            Batches that pad the encoder's input keep theirs.
        rewrite_gqa: whether a decode step reads grouped K and V as they are, where the model would
            repeat them for every query head; the same numbers without a copy of the cache.
        rewrite_products: whether decode steps on a CPU read weights and cache in loops of our own,
            where libraries read slowly; sums in another order. Inductor generates those over the
            weights, for one sequence in float32 and in the default mode alone.
        share_regions: whether Inductor compiles once what layers repeat between their attentions,
            and calls it for each; without it every layer is compiled for itself, which takes
            minutes longer for many layers.
        lowering: "inductor" (generated C++ or Triton), "aot_eager" (ATen), "eager" (the FX graph as
            it is) or "auto".
        mode: of ``torch.compile``, for the "inductor" lowering. "reduce-overhead" replays decode
            steps as CUDA graphs; give it an ``EvictedCache(max_new_tokens=...)``. A prefill, whose
            length changes, is never replayed.

    Raises:
        TypeError, ValueError: naming the option and what it takes.
    """

    budget: Budget | float | int | str = 0.2
    method: str = "criticalkv"
    window_size: int = 32
    kernel_size: int = 7
    first_stage_ratio: float = 0.5
    epsilon: float = 1e-4
    norm: str = "l1"
    base: str = "snapkv"
    allocation: str = "uniform"
    safeguard: float = 0.2
    head_scores: Any = None
    recovery: float | None = None
    token_kinds: TokenKinds | None = None
    later_turns: str = "keep"
    max_entries: int | None = None
    interval: int = 128
    cross_attention: bool = False
    rewrite_gqa: bool = True
    rewrite_products: bool = True
    share_regions: bool = True
    lowering: str = "auto"
    mode: str = "default"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, (*METHODS, *POLICY_METHODS))
        if isinstance(self.base, str) and self.base in METHODS and not METHODS[self.base].base:
            raise ValueError(
                f"base={self.base!r} is not registered as a base, whose scores are never negative "
                f"and no positions; it takes one of {', '.join(map(repr, bases()))}"
            )
        _check_choice("base", self.base, bases())
        if self.base != "snapkv" and self.method != "criticalkv":
            raise ValueError(
                f"base={self.base!r} is what method='criticalkv' stands on; "
                f"method={self.method!r} has none"
            )
        _check_choice("norm", self.norm, NORMS)
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        _check_choice("later_turns", self.later_turns, LATER_TURNS)
        _check_choice("lowering", self.lowering, LOWERINGS)
        _check_choice("mode", self.mode, MODES)
        if self.mode != "default" and self.lowering not in ("auto", "inductor"):
            raise ValueError(
                f"mode={self.mode!r} is one of Inductor's; lowering={self.lowering!r} takes "
                f"mode='default'"
            )
        _check_int("window_size", self.window_size, "an int >= 1", self.window_size, 1)
        _check_int("kernel_size", self.kernel_size, "an odd int >= 1", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is even; it takes an odd int >= 1")
        _check_float("first_stage_ratio", self.first_stage_ratio, 0.0, 1.0, "a float in [0, 1]")
        _check_float("epsilon", self.epsilon, 0.0, math.inf, "a finite float >= 0")
        _check_float("safeguard", self.safeguard, 0.0, 1.0, "a float in [0, 1]")
        if self.head_scores is not None:
            object.__setattr__(self, "head_scores", _head_scores(self.head_scores))
        if (self.allocation == "headkv") != (self.head_scores is not None):
            raise ValueError(
                f"allocation={self.allocation!r} with head_scores={self.head_scores!r}; "
                f"'headkv' takes head_scores, and nothing else does"
            )
        if self.allocation == "global" and self.method not in ("criticalkv", *bases()):
            raise ValueError(
                f"allocation='global' with method={self.method!r}, whose scores are no shares of a "
                f"layer's; it takes one of {', '.join(map(repr, ('criticalkv', *bases())))}"
            )
        self._check_policies()
        self._check_bound()
        for name in ("cross_attention", "rewrite_gqa", "rewrite_products", "share_regions"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}; it takes True or False")
        if not isinstance(self.budget, Budget):
            object.__setattr__(self, "budget", Budget(self.budget))
        if self.cross_attention and self.counts_bytes:
            raise ValueError(
                "cross_attention=True takes a budget in shares, entries or an expression in n: "
                "bytes are counted on the decoder's own cache alone"
            )
        spec = self.budget.spec  # type: ignore[union-attr]
        if isinstance(spec, int) and spec <= self.window_size:
            raise ValueError(
                f"budget={spec} does not exceed window_size={self.window_size}, which is always "
                f"kept; an int budget counts tokens and takes at least window_size + 1"
            )

    def _check_policies(self) -> None:
        """Whether the options of FastGen are there, and no others that would mean nothing."""
        if not self.chooses_policies:
            for name in ("recovery", "token_kinds"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is an option of method='fastgen'")
            return
        if not isinstance(self.token_kinds, TokenKinds):
            raise ValueError(
                "method='fastgen' tells special tokens and punctuation apart; give "
                "optimize(..., tokenizer=...), or token_kinds=TokenKinds(...)"
            )
        recovery = 0.95 if self.recovery is None else self.recovery
        _check_float("recovery", recovery, 0.0, 1.0, "a float in [0, 1]")
        object.__setattr__(self, "recovery", float(recovery))
        left: dict[str, Any] = {"allocation": "uniform", "later_turns": "keep"}
        left |= {"max_entries": None, "cross_attention": False}
        for name, only in left.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with method='fastgen', whose policies say "
                    f"what each head keeps; it takes {only!r}"
                )
        given = self.budget if isinstance(self.budget, Budget) else Budget(self.budget)
        if given not in (Budget(0.2), Budget(1.0)):  # the default, and what stands for none
            raise ValueError(
                f"budget={self.budget!r} with method='fastgen', which takes none: recovery= says "
                f"how much attention each head is to keep"
            )
        object.__setattr__(self, "budget", Budget(1.0))
        takes = "an int >= 2"
        _check_int("interval", self.interval, takes, self.interval, 2)

    def _check_bound(self) -> None:
        """Whether ``max_entries`` and ``interval`` leave room for the window and something more."""
        if self.max_entries is None:
            return _check_int("interval", self.interval, "an int >= 1", self.interval, 1)
        takes = f"an int >= window_size = {self.window_size}"
        _check_int("interval", self.interval, takes, self.interval, self.window_size)
        least = self.window_size + self.interval + 1
        takes = f"an int >= window_size + interval + 1 = {least}, or None"
        _check_int("max_entries", self.max_entries, takes, self.max_entries, least)
        if self.reads_rotation:
            raise ValueError(
                f"max_entries={self.max_entries} with method={self.method!r} and "
                f"base={self.base!r}: the queries that are kept while tokens are generated are "
                f"rotated already; it takes a method that reads those"
            )
        if self.weighs_layers:
            raise ValueError(
                f"max_entries={self.max_entries} with allocation='cake', which weighs layers by "
                f"the attention of a prompt; it takes another allocation"
            )
        if self.packs and not self.cuts_packed:
            raise ValueError(
                f"max_entries={self.max_entries} with allocation={self.allocation!r} and "
                f"{self.scored_by}, which looks at several heads at once: heads that hold "
                f"different entries are cut again by scores of each head alone"
            )

    @classmethod
    def from_options(cls, options: dict[str, Any] | None) -> EvictionConfig:
        """Build from ``torch.compile(..., options=...)``; unknown names are a TypeError."""
        options = dict(options or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"unknown option {name!r}; the options are {', '.join(names)}")
        return cls(**options)

    @property
    def counts_bytes(self) -> bool:
        """Whether the budget can only be resolved where the caches are known."""
        assert isinstance(self.budget, Budget)
        return self.budget.nbytes is not None

    @property
    def packs(self) -> bool:
        """Whether heads keep different numbers of entries, in packed form."""
        return self.allocation != "uniform" or self.chooses_policies

    @property
    def packed_by(self) -> str:
        """The option that makes heads differ."""
        name = "method" if self.chooses_policies else "allocation"
        return f"{name}={getattr(self, name)!r}"

    @property
    def chooses_policies(self) -> bool:
        """Whether heads keep what policies say, not what a budget says."""
        return self.method in POLICY_METHODS

    @property
    def queries_kept(self) -> int:
        """How many of the last queries a cut in mid-generation reads."""
        return self.interval if self.chooses_policies else self.window_size

    @property
    def scored_by(self) -> str:
        """The option that names the scores."""
        based = self.method == "criticalkv"
        return f"base={self.base!r}" if based else f"method={self.method!r}"

    @property
    def cuts_packed(self) -> bool:
        """Whether heads that hold different entries can be cut again."""
        if self.chooses_policies or self.weighs_layers or self.reads_rotation:
            return False
        names = (self.method, self.base) if self.method == "criticalkv" else (self.method,)
        return all(METHODS[name].by_head for name in names)

    @property
    def weighs_layers(self) -> bool:
        """Whether the allocation wants to know what each layer asks for."""
        return self.allocation == "cake"

    @property
    def reads_projection(self) -> bool:
        """Whether the scores see values through the output projection."""
        if self.chooses_policies:
            return False
        return METHODS[self.method].reads_projection and self.norm != "value"

    @property
    def reads_rotation(self) -> bool:
        """Whether the scores see the queries as later positions would turn them."""
        if self.chooses_policies:
            return False
        return any(METHODS[name].reads_rotation for name in (self.method, self.base))

    def entries(self, n: int | torch.SymInt, size: CacheBytes | None = None) -> Any:
        """Entries kept per KV head of a prompt of ``n`` tokens; see :meth:`Budget.entries`."""
        assert isinstance(self.budget, Budget)
        entries = self.budget.entries(n, self.window_size, size)
        if self.max_entries is None:
            return entries
        return torch.sym_min(entries, self.max_entries - self.interval)

    @property
    def bounded(self) -> EvictionConfig:
        """The same for a cut in mid-generation, which knows the bound alone."""
        assert self.max_entries is not None
        return dataclasses.replace(self, budget=self.max_entries - self.interval)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    takes = f"it takes one of {', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; {takes}")
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; {takes}")


def _check_int(name: str, value: object, takes: str, number: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it takes {takes}")
    if number < low:
        raise ValueError(f"{name}={value!r} is too small; it takes {takes}")


def _check_float(name: str, value: object, low: float, high: float, takes: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it takes {takes}")
    if not (low <= value <= high and value < math.inf):  # NaN fails the first
        raise ValueError(f"{name}={value!r} is out of range; it takes {takes}")


def _head_scores(given: Any) -> tuple[tuple[float, ...], ...]:
    """Numbers for each layer and head, from whatever holds them."""
    takes = "it takes a number >= 0 for each layer and KV head, as nested sequences or a JSON file"
    table = given
    if isinstance(given, (str, os.PathLike)):
        with open(given) as file:
            table = json.load(file)
    if isinstance(table, torch.Tensor):
        table = table.tolist()
    try:
        rows = tuple(tuple(float(score) for score in row) for row in table)
    except (TypeError, ValueError):
        raise TypeError(f"head_scores={given!r}; {takes}") from None
    scores = [score for row in rows for score in row]
    if not all(0 <= score < math.inf for score in scores) or not sum(scores) > 0:
        raise ValueError(f"head_scores={given!r}; {takes}, not all of them 0")
    return rows
