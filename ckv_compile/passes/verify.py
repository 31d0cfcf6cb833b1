"""The last pass: refuse to hand on a graph that is not what the earlier ones promised."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from .insert import Inserted
from .nodes import known, outputs_of, value_of


class VerificationError(RuntimeError):
    """A pass of ours broke its promise; the graph must not run."""


def verify(gm: GraphModule, before: Sequence[object], inserted: Sequence[Inserted]) -> None:
    """Check that only cache outputs changed, each to its own eviction node's K or V.

    Args:
        before: the graph's outputs before insertion.

    Raises:
        VerificationError: naming the output or the site.
    """
    gm.graph.lint()
    after = outputs_of(gm)
    expected: dict[int, tuple[Inserted, int]] = {}
    for eviction in inserted:
        expected |= {i: (eviction, part) for i, part in eviction.outputs.items()}
    if len(after) != len(before):
        raise VerificationError(f"the graph returned {len(before)} values, now {len(after)}")
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i not in expected:
            if new is not old:
                raise VerificationError(f"output {i} was {old} and is now {new}")
            continue
        eviction, part = expected[i]
        _verify_output(eviction, i, part, old, new)


def _verify_output(eviction: Inserted, i: int, part: int, old: object, new: object) -> None:
    name = eviction.site.name
    if not isinstance(new, Node) or new.target is not operator.getitem:
        raise VerificationError(f"{name}: cache output is {new}, not an eviction")
    if new.args != (eviction.node, part):
        raise VerificationError(f"{name}: cache output is {new.args}, not {eviction.node}[{part}]")
    if i not in (*eviction.site.key_outputs, *eviction.site.value_outputs):
        # Positions, or what is packed: in the traced call there were none.
        return
    before, after = value_of(old), value_of(new)
    same_rows = all(known(before.shape[i] == after.shape[i]) for i in (0, 1, 3))
    if not same_rows or before.dtype != after.dtype:
        raise VerificationError(f"{name}: cache of {before.shape} became {after.shape}")
