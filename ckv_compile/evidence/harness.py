"""lm-evaluation-harness with an optimised model, ``--model ckv``.

``python -m ckv_compile.evidence.harness`` is the harness's own command, which then knows it::

    python -m ckv_compile.evidence.harness --model ckv --tasks ruler_vt --limit 20 \\
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,budget=0.2 \\
        --metadata '{"max_seq_lengths": [2048]}'

In a program ``HFLM(pretrained=optimize(model, budget=0.2), tokenizer=tokenizer)`` does the same.
The question is part of the prompt that is cut.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..api import optimize
from ..config import EvictionConfig

_OPTIONS = tuple(field.name for field in dataclasses.fields(EvictionConfig))


@register_model("ckv")
class OptimizedLM(HFLM):
    """The harness's ``hf`` model, optimised.

    Args:
        pretrained: a model, or its folder or hub name.
        kwargs: the fields of :class:`ckv_compile.EvictionConfig`, and what ``hf`` takes beside.
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        EvictionConfig.from_options(options)  # a typo must not cost the loading of a model
        super().__init__(pretrained=pretrained, **kwargs)
        optimize(self.model, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
