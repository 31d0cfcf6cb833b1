"""What is compared: a method, its options, and the name that it goes by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import EvictionConfig
from ..policies import TokenKinds
from ..registry import METHODS, POLICY_METHODS
from .probe import Seen

Spec = float | int | str
# Those of the tokenizer, once there is one: see Asker.
NO_KINDS = TokenKinds(())
# Positions kept of an attention with these options, [B, Hkv, budget].
Keeps = Callable[[Seen, EvictionConfig, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method under a label, with whatever allocation its options name.

    ``keeps`` is for selections that are no option of the library; all heads then keep as many.
    """

    label: str
    config: EvictionConfig
    keeps: Keeps = Seen.kept

    def __post_init__(self) -> None:
        if self.config.max_entries is not None:
            self._refuse("max_entries", None)
        if self.config.packs and self.keeps is not Seen.kept:
            self._refuse("allocation", "uniform")

    def _refuse(self, name: str, taken: Any) -> None:
        given = getattr(self.config, name)
        raise ValueError(f"{self.label}: {name}={given!r} is not measured here; it takes {taken!r}")

    def without_policies(self) -> Candidate:
        """The same; for measurements at given budgets.

        Raises:
            ValueError: it takes none.
        """
        if self.config.chooses_policies:
            self._refuse("method", "one with a budget")
        return self

    def uniform(self) -> Candidate:
        """The same; for measurements of one layer at a time.

        Raises:
            ValueError: heads compete for the budget.
        """
        if self.without_policies().config.packs:
            self._refuse("allocation", "uniform")
        return self

    def at(self, budget: Spec) -> EvictionConfig:
        if self.config.chooses_policies:
            return self.config
        return dataclasses.replace(self.config, budget=budget)

    @property
    def own_budget(self) -> Spec | None:
        """What stands for the budget of policies, which take none; None for all others."""
        config = self.config
        return f"recovery {config.recovery:g}" if config.chooses_policies else None

    @property
    def options(self) -> str:
        """All that decides what is kept, but for the budget."""
        skipped = {"budget", "lowering", "mode", "later_turns"}
        skipped |= {"rewrite_gqa", "rewrite_products", "share_regions"}
        skipped |= {"token_kinds"} if self.config.chooses_policies else {"recovery", "token_kinds"}
        fields = [f.name for f in dataclasses.fields(self.config) if f.name not in skipped]
        parts = [f"{name}={getattr(self.config, name)}" for name in fields]
        return ", ".join(parts)


def config_of(options: Mapping[str, Any]) -> EvictionConfig:
    """The options of a candidate; of policies that tell tokens apart by a tokenizer to come."""
    kinds = {"token_kinds": NO_KINDS} if options.get("method") in POLICY_METHODS else {}
    return EvictionConfig.from_options({**kinds, **options, "lowering": "eager"})


def every_candidate() -> tuple[str, ...]:
    """Every registered method with "uniform", "adakv" and, where it applies, "global" shares."""
    found = []
    for name, method in METHODS.items():
        # Only scores that are shares of a layer's compare between layers, see EvictionConfig.
        globally = method.base or name == "criticalkv"
        found += [name, f"{name}:allocation=adakv"]
        found += [f"{name}:allocation=global"] if globally else []
    return (*found, *POLICY_METHODS)


Methods = Sequence[str] | Sequence[Candidate] | Mapping[str, Mapping[str, Any]]


def candidates_of(methods: Methods, **options: Any) -> tuple[Candidate, ...]:
    """Names, or labels with options, as candidates; ``options`` are for all of them.

    Raises:
        TypeError, ValueError: naming the option and what it takes.
    """
    if isinstance(methods, str):
        raise TypeError(f"methods={methods!r} is a str; it takes a sequence of names")
    found: list[Candidate] = []
    for one in methods:
        if isinstance(one, Candidate):
            found.append(one)
            continue
        given = methods[one] if isinstance(methods, Mapping) else {"method": one}
        found.append(Candidate(one, config_of({**options, **given})))
    if not found:
        raise ValueError("methods is empty; it takes at least one name")
    if len({one.label for one in found}) < len(found):
        raise ValueError(f"methods={[one.label for one in found]} names one twice")
    return tuple(found)
