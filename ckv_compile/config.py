"""What the user asks for: the options of the pass and the budget, validated once and frozen."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import os
import re
from fractions import Fraction
from typing import Any

import torch

from .registry import METHODS, UNAVAILABLE, bases

ALLOCATIONS = ("uniform", "adakv", "headkv", "pyramid", "global")
NORMS = ("l1", "l2", "value")
LOWERINGS = ("auto", "inductor", "aot_eager", "eager")
LATER_TURNS = ("keep", "evict")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

_BUDGET_TAKES = (
    "a float in (0, 1] (share of the prompt), an int (tokens per KV head), "
    'an expression in n such as "max(128, n/10)", or bytes such as "64MB"'
)
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)
_EXPRESSION_CALLS = ("max", "min", "floor", "ceil")
_EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Load, ast.Constant,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of one ``entry`` in all caches that are cut, whole batch, and of all ``other`` caches.

    Ints or SymInts.
    """

    entry: Any
    other: Any = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """Entries kept per KV head, as a function of the prompt length ``n``.

    Args:
        spec: float in (0, 1], the share of the prompt; int >= 1, tokens per KV head; or str, an
            expression in ``n`` made of numbers, ``+ - * /``, ``max``, ``min``, ``floor`` and
            ``ceil``, or bytes of KV cache for the whole model and batch: "64MB" (10^6), "64MiB"
            (2^20). A str that is a plain number means that number. Everything kept counts, the
            observation window included.

    Raises:
        TypeError: ``spec`` is none of these types.
        ValueError: ``spec`` is out of range or not an expression in ``n``.
    """

    spec: float | int | str

    def __post_init__(self) -> None:
        spec = self.spec
        if isinstance(spec, bool) or not isinstance(spec, (float, int, str)):
            raise TypeError(f"budget={spec!r} is a {type(spec).__name__}; it takes {_BUDGET_TAKES}")
        if isinstance(spec, str):
            spec = _number(spec)
            object.__setattr__(self, "spec", spec)
        if isinstance(spec, float) and not 0 < spec <= 1:  # NaN fails this as well
            raise ValueError(f"budget={spec!r} is not a share in (0, 1]; it takes {_BUDGET_TAKES}")
        if isinstance(spec, int) and spec < 1:
            raise ValueError(f"budget={spec!r} keeps nothing; it takes {_BUDGET_TAKES}")
        if isinstance(spec, str) and self.nbytes is None:
            _ratio_of(_parsed(spec), 1024)
        if self.nbytes == 0:
            raise ValueError(f"budget={spec!r} keeps nothing; it takes {_BUDGET_TAKES}")

    def __eq__(self, other: object) -> bool:
        # 1 and 1.0 are equal numbers and opposite budgets: one token, everything.
        return isinstance(other, Budget) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[type, float | int | str]:
        return type(self.spec), self.spec

    @property
    def keeps_everything(self) -> bool:
        """Whether no prompt of any length loses an entry."""
        return isinstance(self.spec, float) and self.spec == 1.0

    @property
    def nbytes(self) -> int | None:
        """Bytes, if that is what the budget counts."""
        found = _BYTES.fullmatch(self.spec) if isinstance(self.spec, str) else None
        if found is None:
            return None
        number, prefix, binary = found.groups()
        base = 1024 if binary else 1000
        return int(Fraction(number) * base ** ("KMGT".find(prefix.upper() or "-") + 1))

    def entries(
        self, n: int | torch.SymInt, window_size: int, size: CacheBytes | None = None
    ) -> Any:
        """``min(n, max(window_size + 1, round_half_up(budget(n))))``, exact, for int or SymInt.

        Args:
            size: of the caches; a budget in bytes needs it, and is rounded down.

        Raises:
            ValueError: a budget in bytes has no ``size``, or too few bytes for the window.
        """
        if self.nbytes is not None:
            return self._entries_in_bytes(n, window_size, size)
        if isinstance(self.spec, float):
            share = exact_share(self.spec)
            num, den = share.numerator * n, share.denominator
        elif isinstance(self.spec, int):
            num, den = self.spec, 1
        else:
            num, den = _ratio_of(_parsed(self.spec), n)
        rounded = (2 * num + den) // (2 * den)
        return torch.sym_min(n, torch.sym_max(window_size + 1, rounded))

    def _entries_in_bytes(
        self, n: int | torch.SymInt, window_size: int, size: CacheBytes | None
    ) -> Any:
        if size is None:
            raise ValueError(f"budget={self.spec!r} counts bytes, and no cache has been seen yet")
        entries = (self.nbytes - size.other) // size.entry
        if isinstance(entries, int) and isinstance(n, int) and entries <= min(window_size, n - 1):
            least = min(n, window_size + 1) * size.entry + size.other
            raise ValueError(
                f"budget={self.spec!r} holds {max(entries, 0)} entries of this model and batch, "
                f"{size.entry} bytes each, beside {size.other} bytes of caches that are bounded; "
                f"it takes at least window_size + 1 = {window_size + 1} entries: {least} bytes"
            )
        return torch.sym_min(n, torch.sym_max(window_size + 1, entries))


@dataclasses.dataclass(frozen=True)
class EvictionConfig:
    """Options of the eviction pass; ``optimize`` and ``options={...}`` take the same names.

    Args:
        budget: see :class:`Budget`.
        method: "criticalkv" (arXiv 2502.03805), "snapkv" (attention alone, arXiv 2404.14469),
            "h2o", "tova", "streaming_llm", "knorm", "keydiff", "vatp", "caote", "defensive",
            "laprox", or what :func:`ckv_compile.register_method` was given; each has a file in
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
            layer (arXiv 2406.02069); "global": all heads of all layers compete. All but "uniform"
            keep the cut prompt in packed form and need a transformers cache.
        safeguard: of "adakv", the share of a head's uniform budget that no other head can take.
        head_scores: of "headkv", a number >= 0 for each layer and KV head: nested sequences, a
            tensor ``[layers, heads]``, or the path of a JSON file with nested lists.
        later_turns: "keep" all tokens that follow a prompt, or "evict" again whenever several come
            at once, to the budget of all tokens seen. A prompt fed in pieces is one prompt.
        max_entries: bound of the entries per KV head while tokens are generated; None for none.
            When one more would not fit, the cache is cut to ``max_entries - interval``, scored by
            the last ``window_size`` queries. A prompt's budget is at most that as well.
        interval: tokens between two such cuts; at least ``window_size``.
        cross_attention: whether the entries of an encoder are evicted as well, once, at the first
            call of the decoder: its last ``window_size`` queries score them, and none is exempt.
            Batches that pad the encoder's input keep theirs.
        rewrite_gqa: whether a decode step reads grouped K and V as they are, where the model would
            repeat them for every query head; the same numbers without a copy of the cache.
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
    later_turns: str = "keep"
    max_entries: int | None = None
    interval: int = 128
    cross_attention: bool = False
    rewrite_gqa: bool = True
    lowering: str = "auto"
    mode: str = "default"

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method in UNAVAILABLE:
            raise ValueError(f"method={self.method!r} is not offered: {UNAVAILABLE[self.method]}")
        _check_choice("method", self.method, tuple(METHODS))
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
        self._check_bound()
        for name in ("cross_attention", "rewrite_gqa"):
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

    def _check_bound(self) -> None:
        """Whether ``max_entries`` and ``interval`` leave room for the window and something more."""
        if self.max_entries is None:
            return _check_int("interval", self.interval, "an int >= 1", self.interval, 1)
        takes = f"an int >= window_size = {self.window_size}"
        _check_int("interval", self.interval, takes, self.interval, self.window_size)
        least = self.window_size + self.interval + 1
        takes = f"an int >= window_size + interval + 1 = {least}, or None"
        _check_int("max_entries", self.max_entries, takes, self.max_entries, least)
        if self.packs:
            raise ValueError(
                f"max_entries={self.max_entries} with allocation={self.allocation!r}; it takes "
                f"'uniform': heads of different lengths are cut once, behind the prompt"
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
        return self.allocation != "uniform"

    @property
    def reads_projection(self) -> bool:
        """Whether the scores see values through the output projection."""
        return METHODS[self.method].reads_projection and self.norm != "value"

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


def exact_share(share: float) -> Fraction:
    """0.1 as one tenth, not its binary neighbour, and 1/3 as one third.

    A denominator of seventeen digits would overflow the int64 arithmetic of generated code.
    """
    return Fraction(str(share)).limit_denominator(10**6)


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


def _number(text: str) -> float | int | str:
    """``"0.1"`` and ``"128"`` as numbers; anything else unchanged."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parsed(text: str) -> Any:
    """The sympy expression in ``n`` that ``text`` spells."""
    import sympy

    wrong = f"budget={text!r} is not understood; it takes {_BUDGET_TAKES}"
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(wrong) from None
    # sympy evaluates what it parses, so nothing but arithmetic may reach it.
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and (
            node.keywords
            or not isinstance(node.func, ast.Name)
            or node.func.id not in _EXPRESSION_CALLS
        )
        named = isinstance(node, ast.Name) and node.id not in ("n", *_EXPRESSION_CALLS)
        valued = isinstance(node, ast.Constant) and not _is_sane(node.value)
        if not isinstance(node, _EXPRESSION_NODES) or called or named or valued:
            raise ValueError(wrong)
    names = {
        "n": sympy.Symbol("n", integer=True, positive=True),
        "max": sympy.Max,
        "min": sympy.Min,
        "floor": sympy.floor,
        "ceil": sympy.ceiling,
    }
    try:
        # Decimals as rationals: 0.1 means one tenth. Unparsed, for 1e-999999999 is 0.0 to Python
        # and a number of a billion digits to sympy.
        return sympy.sympify(ast.unparse(tree), locals=names, rational=True)
    except (TypeError, ValueError, ArithmeticError, sympy.SympifyError):
        raise ValueError(wrong) from None


def _is_sane(value: object) -> bool:
    """A number of entries, or a factor of one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 10**12


def _ratio_of(expr: Any, n: Any) -> tuple[Any, int]:
    """``expr`` at ``n`` as an exact (numerator, denominator), in int or SymInt arithmetic.

    Fractions of integers keep a symbolic budget free of floating point: the graph then holds
    floor divisions only, which round alike in Python, C++ and Triton.
    """
    import sympy

    if expr.is_Rational:
        return int(expr.p), int(expr.q)
    if expr.is_Symbol:
        return n, 1
    if isinstance(expr, (sympy.floor, sympy.ceiling)):
        num, den = _ratio_of(expr.args[0], n)
        return (num // den if isinstance(expr, sympy.floor) else -(-num // den)), 1
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min)):
        num, den = _ratio_of(expr.args[0], n)
        for arg in expr.args[1:]:
            other_num, other_den = _ratio_of(arg, n)
            if isinstance(expr, sympy.Mul):
                num, den = num * other_num, den * other_den
                continue
            left, right, den = num * other_den, other_num * den, den * other_den
            if isinstance(expr, sympy.Add):
                num = left + right
            else:
                num = (torch.sym_max if isinstance(expr, sympy.Max) else torch.sym_min)(left, right)
        return num, den
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        num, den = _ratio_of(expr.base, n)
        return num ** int(expr.exp), den ** int(expr.exp)
    raise ValueError(f"budget: cannot take {expr} as a number of entries; it takes {_BUDGET_TAKES}")
