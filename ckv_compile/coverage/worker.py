"""One architecture in this process: ``python -m ckv_compile.coverage.worker causal llama``."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings

import torch
import transformers

from .check import check

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(json.dumps(dataclasses.asdict(check(sys.argv[1], sys.argv[2]))))
