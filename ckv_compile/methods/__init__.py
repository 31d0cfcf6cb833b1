"""Scoring methods, one file each. Registered here, in the order in which errors list them."""

from __future__ import annotations

from ..registry import register_method
from .caote import caote
from .criticalkv import criticalkv
from .defensive import defensive
from .expected_attention import expected_attention
from .h2o import h2o
from .keydiff import keydiff
from .knorm import knorm
from .laprox import laprox
from .snapkv import snapkv
from .streaming_llm import streaming_llm
from .tova import tova
from .vatp import vatp

register_method("criticalkv", criticalkv, reads_projection=True, by_head=True)
register_method("snapkv", snapkv, base=True, by_head=True)
register_method("h2o", h2o, base=True, by_head=True)
register_method("tova", tova, base=True)
register_method("streaming_llm", streaming_llm, by_head=True)
register_method("knorm", knorm, by_head=True)
register_method("keydiff", keydiff, by_head=True)
register_method("vatp", vatp, base=True, by_head=True)
register_method("caote", caote, base=True, by_head=True)
register_method("defensive", defensive, reads_projection=True, base=True)
register_method("laprox", laprox, reads_projection=True, base=True, by_head=True)
register_method("expected_attention", expected_attention, base=True, reads_rotation=True)
