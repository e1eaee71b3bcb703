"""`ReducedModel`: a vision-language model that runs a policy, called like the model itself."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.cache import ReducedCache, TokenSpace
from deos_fx.inputs import complete_inputs, prompt_layout
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.lower_decode import decode_spaces
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.policy import Policy
from deos_fx.signature import signature_of

__all__ = ["ReducedModel"]


class ReducedModel(nn.Module):
    """An unmodified model and a policy, compiled on first use.

    The graphs are captured at the first call of each structure (a prefill with images, a decode
    step) and share every weight with the model.

    Args:
        model: A transformers vision-language model. It is put in eval mode, nothing else.
        policy: What to reduce where.

    Attributes:
        model: The model, untouched.
        policy: The policy.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If it has no vision tower, or the policy does not fit it.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        super().__init__()
        self.model = model.eval()
        self.policy = policy
        self.signature = signature_of(model)
        policy.check(self.signature)
        self._arguments = inspect.signature(type(model).forward)
        self._spaces = decode_spaces(policy)
        # Not submodules: they share the model's weights.
        self._graphs: dict[str, dict[Hashable, fx.GraphModule]] = {"prefill": {}, "decode": {}}
        self.__dict__["_host"] = _generation_host(self, model)

    # *** calling ***

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Run the reduced model.

        Args:
            *args: Arguments of the model's own forward.
            **kwargs: Keyword arguments of the model's own forward.

        Returns:
            The model's own output class. After reductions, ``logits`` cover the M prompt
            positions that are left, in order (`explain` says which); the last one is always the
            last token of the prompt.

        Raises:
            ValueError: If the inputs have no image, rows with different numbers of image tokens,
                or a cache that is not a `ReducedCache`.
        """
        inputs = self._arguments.bind(self.model, *args, **kwargs).arguments
        inputs.pop("self", None)
        inputs |= inputs.pop("kwargs", {})
        return self._run({name: value for name, value in inputs.items() if value is not None})

    def generate(self, **inputs: Any) -> Any:
        """transformers' own `generate`, run on the reduced model.

        Args:
            **inputs: Arguments of the model's `generate`.

        Returns:
            What the model's `generate` returns.
        """
        if inputs.get("use_cache", True) and inputs.get("past_key_values") is None:
            inputs["past_key_values"] = self._new_cache()
        return self._host.generate(**inputs)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The lowered prefill graph of the latest structure that was called.

        Raises:
            RuntimeError: Before the first call.
        """
        if not self._graphs["prefill"]:
            raise RuntimeError(
                "Nothing is captured yet: call the model once, or give example_inputs to transform."
            )
        return list(self._graphs["prefill"].values())[-1]

    # *** compiling ***

    def _run(self, inputs: dict[str, Any]) -> ModelOutput:
        inputs = complete_inputs(self.model, inputs)
        cache = inputs.get("past_key_values")
        prefill = cache is None or cache.get_seq_length() == 0
        layout = prompt_layout(self.model, inputs) if prefill else None
        if not prefill:
            inputs |= cache.decode_inputs(inputs.get("attention_mask"), inputs["position_ids"])
        graph_module = self._graph(inputs, layout)
        names = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
        fields = graph_module(**{name: inputs[name] for name in names})
        spaces = fields.pop("spaces", [])
        if cache is not None and prefill:
            cache.record(
                inputs["input_ids"].shape[1],
                [
                    TokenSpace(known.first_layer, space["origin"], space.get("key_bias"))
                    for known, space in zip(self._spaces, spaces, strict=True)
                ],
            )
        return graph_module.meta["output_class"](**fields)

    def _graph(self, inputs: Mapping[str, Any], layout: PromptLayout | None) -> fx.GraphModule:
        kind = "decode" if layout is None else "prefill"
        key = (layout, *_structure(inputs))
        graphs = self._graphs[kind]
        if key not in graphs:
            cache = self._new_cache() if inputs.get("past_key_values") is not None else None
            example = {**inputs, "past_key_values": cache} if cache is not None else {**inputs}
            if layout is None:
                example = _decode_example(example, inputs["past_key_values"])
            graphs[key] = lower_call(capture_call(self.model, example), self.policy, layout)
        return graphs[key]

    def _new_cache(self) -> ReducedCache:
        return ReducedCache(self.model.config.get_text_config())



def _structure(inputs: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """What a captured graph depends on: which inputs there are, of what type, and all constants."""
    parts: list[Hashable] = []
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            parts.append((name, value.dtype, value.device, value.ndim))
        else:
            parts.append((name, type(value) if isinstance(value, ReducedCache) else value))
    return tuple(parts)


def _decode_example(inputs: Mapping[str, Any], cache: ReducedCache) -> dict[str, Any]:
    """A decode step on a short cache of equal lengths, which the original model can run.

    Only its structure matters: on the caches that reductions leave, the original model fails.
    """
    example = {
        name: value for name, value in inputs.items() if not name.rpartition("_")[2].isdigit()
    }
    for layer, held in enumerate(cache.layers):
        short = [states[:, :, :2].clone() for states in (held.keys, held.values)]
        example["past_key_values"].update(*short, layer)
    new = inputs["input_ids"].shape[1]
    if "attention_mask" in example:
        example["attention_mask"] = inputs["attention_mask"][:, -new - 2 :]
    return example


def _generation_host(reduced: ReducedModel, model: PreTrainedModel) -> Any:
    """A view of the model whose forward is the reduced one, so that `generate` is transformers'.

    It shares all weights and configs with the model and is of a subclass of the model's class.
    """

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        return reduced(*args, **kwargs)

    def keep_pixels(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # transformers would encode the images before the prefill; here that is the graph's part.
        return model_kwargs

    host = copy.copy(model)
    host.__class__ = type(
        f"Reduced{type(model).__name__}",
        (type(model),),
        {
            "forward": forward,
            "_prepare_multimodal_encoder_kwargs_for_generation": keep_pixels,
        },
    )
    return host
