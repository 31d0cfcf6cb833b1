"""How far back each head looks: fixed shares of the budget for ``allocation="headkv"``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .probe import Seen, Watcher

# The first tokens take attention of every head, whatever stands there.
_SINKS = 4


def head_scores(model: nn.Module, input_ids: Tensor, window_size: int = 32) -> list[list[float]]:
    """Attention that a head's entries need a budget for, ``[layers][KV heads]``, each in [0, 1].

    The share of the last ``window_size`` queries' attention that falls on entries before them and
    behind the first four: what a cache of the window and of sinks alone would lose. Mean over the
    queries, the rows of the batch and the heads of a group. HeadKV (arXiv 2410.19258) scores heads
    by how well they retrieve needles; this definition is ours and needs no labels.

    Args:
        model: in eval mode; its attention has to be matched, see ``explain``.
        input_ids: ``[B, n]``, a text of the kind that will be read, longer than the window.

    Raises:
        ValueError: the text is too short, or no attention was matched.
    """
    if input_ids.shape[1] <= window_size + _SINKS:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens; it takes more than {window_size + _SINKS}"
        )
    found: list[list[float]] = []

    def visit(seen: Seen) -> None:
        attention = seen.inputs.window_attention(kernel_size=1)  # [B, Hkv, K], 0 in the window
        found.append(attention[:, :, _SINKS:].sum(-1).mean(0).tolist())

    watcher = Watcher(model)
    with torch.no_grad():
        watcher(visit, input_ids=input_ids, use_cache=True)
    if not found:
        raise ValueError("no attention was matched; ckv_compile.explain(model, ...) tells why")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save", type=Path, metavar="JSON", help='file for optimize(..., head_scores="FILE")'
    )


def show(scores: list[list[float]], args: Any) -> None:
    """Print the scores, and write them where ``EvictionConfig(head_scores=...)`` reads them."""
    if args.json:
        print(json.dumps(scores))
    else:
        for i, row in enumerate(scores):
            print(f"{i:3d}  " + "  ".join(f"{score:.3f}" for score in row))
    if args.save is not None:
        args.save.write_text(json.dumps(scores) + "\n")
