"""The methods by name: what ``EvictionConfig(method=...)`` takes, and a user's own beside ours."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

# Asked for by name as well; they score nothing, see ``methods/fastgen.py``.
POLICY_METHODS = ("fastgen",)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, and what must be known of it before anything is traced.

    Args:
        function: ``ScoreInputs`` to ``Scores``, see :mod:`ckv_compile.methods.base`.
        reads_projection: whether it calls ``projected_norm`` or ``projected_norms``, so that the
            output projection has to be found.
        base: whether its scores are never negative and grow with what an entry is worth, so that
            CriticalKV may multiply them by a norm.
        reads_rotation: whether it calls ``expected_query``, so that the rotary embedding has to be
            read.
        by_head: whether it scores a head's entries by that head alone, so that heads that hold
            different entries can be scored again.
        key: what its code is known by in the compile cache; empty for methods of this package,
            whose every source file is part of that key in any case.
    """

    function: Callable[[Any], Any]
    reads_projection: bool = False
    base: bool = False
    reads_rotation: bool = False
    by_head: bool = False
    key: str = ""


METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    function: Callable[[Any], Any],
    *,
    reads_projection: bool = False,
    base: bool = False,
    reads_rotation: bool = False,
    by_head: bool = False,
) -> None:
    """Make ``EvictionConfig(method=name)``, and so ``optimize(..., method=name)``, take a method.

    Args:
        name: a new name.
        function: takes one :class:`ckv_compile.ScoreInputs` and returns
            :class:`ckv_compile.Scores`. It is traced with symbolic lengths: tensor ops only, no
            branch on a value or a length. The file it stands in and the numbers it reads from
            there are part of the compile cache's key; code that it calls from other files is not.
        reads_projection: whether it asks the inputs for projected norms.
        base: whether ``EvictionConfig(method="criticalkv", base=name)`` takes it: its scores are
            never negative and grow with what an entry is worth.
        reads_rotation: whether it asks the inputs for expected queries.
        by_head: whether it looks at each KV head, and the query heads of its group, alone. Only
            then can it cut again what an allocation has left: heads that hold different entries.
            It then sees of the config what names scores (method, base, window_size, kernel_size,
            norm, lowering); the other fields have their defaults.

    Raises:
        TypeError, ValueError: naming the argument and what it takes.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} is a {type(name).__name__}; it takes a new name, a str")
    if not name.isidentifier():
        raise ValueError(f"name={name!r} is not a name; it takes letters, digits and _")
    if name in METHODS or name in POLICY_METHODS:
        raise ValueError(f"name={name!r} is taken; the names are {', '.join(METHODS)}")
    flags = {
        "reads_projection": reads_projection,
        "base": base,
        "reads_rotation": reads_rotation,
        "by_head": by_head,
    }
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{flag}={value!r}; it takes True or False")
    takes = "it takes a function of one argument, the ScoreInputs, that returns Scores"
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"function={function!r} is not a function; {takes}")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise TypeError(f"function={function!r}: {error}; {takes}") from None
    key = key_of(function)
    METHODS[name] = Method(function, reads_projection, base, reads_rotation, by_head, key)


def bases() -> tuple[str, ...]:
    """The methods that CriticalKV can stand on."""
    return tuple(name for name, method in METHODS.items() if method.base)


def identity_of(name: str) -> str:
    """The name and, of a user's method, the key of its code: what compiled code depends on."""
    key = METHODS[name].key
    return f"{name}@{key}" if key else name


def key_of(function: Callable[[Any], Any]) -> str:
    """A hash that differs wherever the function may compute something else; empty for our own.

    Of a function in a file: that file, and the numbers and texts that the function reads from
    outside of itself. What has no such content, a callable object or a line typed into an
    interpreter, gets another key in each process: compiled again, and never wrong.
    """
    if getattr(function, "__module__", "").startswith(__name__.rpartition(".")[0] + ".methods."):
        return ""
    unknown = uuid.uuid4().hex
    file = inspect.getsourcefile(function) if isinstance(function, FunctionType) else None
    if not isinstance(function, FunctionType) or file is None or not Path(file).is_file():
        return unknown
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is filled later
        return unknown
    bound = [*cells, function.__defaults__, function.__kwdefaults__]
    if not all(map(_is_plain, bound)):
        return unknown
    read = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    plain = {name: value for name, value in read.items() if _is_plain(value)}
    text = repr((function.__qualname__, bound, plain)).encode()
    return hashlib.sha256(text + Path(file).read_bytes()).hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether ``repr`` says all of it."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in (*value, *value.values()))
    return value is None or isinstance(value, (bool, int, float, str))
