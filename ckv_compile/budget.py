"""How many entries are kept of a prompt, as a function of its length."""

from __future__ import annotations

import ast
import dataclasses
import re
from fractions import Fraction
from typing import Any

import torch

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
            spec = number_in(spec)
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


def exact_share(share: float) -> Fraction:
    """0.1 as one tenth, not its binary neighbour, and 1/3 as one third.

    A denominator of seventeen digits would overflow the int64 arithmetic of generated code.
    """
    return Fraction(str(share)).limit_denominator(10**6)


def number_in(text: str) -> float | int | str:
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
