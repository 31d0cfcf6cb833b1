"""FastGen's policies by name, the kinds of tokens they tell apart, and which head got which."""

from __future__ import annotations

import dataclasses
import hashlib
import string
import unicodedata
from typing import Any

import torch
from torch import Tensor

# In the order in which they are tried: each keeps what the one before it keeps, and more.
POLICIES = (
    "special",
    "special+punct",
    "special+punct+frequent",
    "special+punct+frequent+local",
    "full",
)
# Kinds of tokens, as the tables of ids hold them.
PLAIN, SPECIAL, PUNCTUATION = 0, 1, 2


@dataclasses.dataclass(frozen=True, repr=False)
class TokenKinds:
    """The ids of special tokens (BOS, chat markers) and of punctuation."""

    special: tuple[int, ...]
    punctuation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("special", "punctuation"):
            ids = tuple(getattr(self, name))
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise ValueError(f"{name}={ids!r}; it takes token ids, ints >= 0")
            object.__setattr__(self, name, ids)

    def __repr__(self) -> str:
        # Thousands of ids; a hash of them tells two tables apart.
        digest = hashlib.sha256(repr((self.special, self.punctuation)).encode()).hexdigest()[:12]
        counts = f"{len(self.special)} special, {len(self.punctuation)} punctuation"
        return f"TokenKinds({counts}, {digest})"

    def table(self) -> Tensor:
        """Kinds by id, ``[largest id + 2]`` int8; the last one stands for all ids beyond."""
        table = torch.zeros(max((*self.special, *self.punctuation), default=0) + 2).to(torch.int8)
        table[list(self.punctuation)] = PUNCTUATION
        table[list(self.special)] = SPECIAL
        return table


def kinds_of(tokenizer: Any) -> TokenKinds:
    """Read a tokenizer of transformers once; ``TokenKinds`` are taken as they are.

    Special are the ids that the tokenizer itself calls so. Punctuation is what decodes to nothing
    but punctuation marks and ASCII symbols, with spaces around them or not.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(tokenizer, TokenKinds):
        return tokenizer
    if not all(hasattr(tokenizer, name) for name in ("all_special_ids", "decode", "__len__")):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; it takes a transformers tokenizer or "
            f"TokenKinds(special=..., punctuation=...)"
        )
    special = {int(i) for i in tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    punctuation = (i for i in range(len(tokenizer)) if _is_punctuation(tokenizer.decode([i])))
    return TokenKinds(tuple(sorted(special)), tuple(i for i in punctuation if i not in special))


def _is_punctuation(text: str) -> bool:
    marks = text.strip()
    return bool(marks) and all(
        mark in string.punctuation or unicodedata.category(mark).startswith("P") for mark in marks
    )


@dataclasses.dataclass(frozen=True)
class Policies:
    """Which head of which layer and row got which policy: ``heads[layer][row][head]`` is a name.

    ``print`` shows for each layer how many heads have each.
    """

    heads: tuple[tuple[tuple[str, ...], ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for ``json.dumps``."""
        return {"heads": [[list(row) for row in layer] for layer in self.heads]}

    def __str__(self) -> str:
        lines = ["layer  " + "  ".join(POLICIES)]
        for i, layer in enumerate(self.heads):
            named = [name for row in layer for name in row]
            cells = (str(named.count(name)).rjust(len(name)) for name in POLICIES)
            lines.append(f"{i:5}  " + "  ".join(cells))
        return "\n".join(lines)
