"""A plugin for vLLM: LLaVA whose visual tokens are reduced before the decoder.

The reductions are in ``vision.onnx``, a graph that `deos_fx.export_genai` wrote; see docs/vllm.md.
"""

__all__ = ["register"]

ARCHITECTURE = "LlavaForConditionalGeneration"


def register() -> None:
    """Let vLLM run models of this architecture by `ReducedLlava`.

    vLLM calls this in each of its processes, through the entry point ``vllm.general_plugins``.
    """
    from vllm import ModelRegistry

    # A name, so that CUDA is not touched before vLLM starts its workers.
    ModelRegistry.register_model(ARCHITECTURE, "deos_fx_vllm.model:ReducedLlava")
