"""`ReducedModel`: a vision-language model that runs a policy, called like the model itself."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.cost.amounts import CostReport
from deos_fx.cost.model import CostModel
from deos_fx.data.chat import say_once
from deos_fx.data.scale import check_scale, scaled_processor
from deos_fx.inputs.batch import Part, join_outputs, join_spaces, parts_of_batch
from deos_fx.inputs.call import Call, normal_inputs
from deos_fx.inputs.complete import completed
from deos_fx.inputs.media import are_written_alike
from deos_fx.inputs.turns import without_known_images
from deos_fx.models.facts import facts_of
from deos_fx.models.sharded import gather_own
from deos_fx.models.upstream import CACHE
from deos_fx.passes.lower.lower_decode import decode_spaces
from deos_fx.policy.policy import Policy
from deos_fx.results.explanation import Explanation
from deos_fx.runtime import saved
from deos_fx.runtime.explain import explain
from deos_fx.runtime.generation import generation_host
from deos_fx.runtime.graphs import Graphs
from deos_fx.tokens.cache import ReducedCache, SpaceFields, TokenSpace
from deos_fx.tokens.layout import PromptLayout
from deos_fx.tokens.turn import TurnCache, append_turn

__all__ = ["ReducedModel"]


class ReducedModel(nn.Module):
    """An unmodified model and a policy, compiled on first use.

    The graphs are captured at the first call of each structure (a prefill with images, a decode
    step) and share every weight with the model.

    Args:
        model: A transformers vision-language model. It is put in eval mode and not changed
            otherwise.
        policy: The reductions and their sites.

    Attributes:
        model: The model, untouched.
        policy: The policy.
        signature: The facts of the model by which policies recognise it.
        graphs: The graphs made so far.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If it is refused (`deos_fx.models.facts.facts_of` says why), the policy does not
            fit it, or its image scale can change nothing.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        super().__init__()
        # The policy is checked before anything is changed or captured.
        self.signature = facts_of(model).signature
        policy.check(self.signature)
        check_scale(policy.image_scale, self.signature.model_type, self.signature.visual_tokens)
        self.model = model.eval()
        self.policy = policy
        self._spaces = decode_spaces(policy)
        # Whether images may come at any scale, or `processor` was asked for the one that scales.
        self._is_scaled = policy.image_scale == 1
        self.graphs = Graphs(model, policy)

    def processor(self, processor: Any) -> Any:
        """Return the processor that goes with this model: images enter at the policy's scale.

        This is the one place where a scale is applied. Pixels do not tell at which scale they
        entered, so inputs have to be made by this processor.

        Args:
            processor: The processor of the unreduced model, which is not changed.

        Returns:
            A processor that is used in the same way; see `deos_fx.data.scaled_processor`.

        Raises:
            ValueError: If the model takes images of one size only, so that a scale has no effect.
        """
        scaled = scaled_processor(processor, self.policy.image_scale)
        self._is_scaled = True
        return scaled

    # *** calling ***

    # `compile` compiles the graphs; tracing the bookkeeping around them would gain nothing.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput | tuple[Any, ...]:
        """Run the reduced model.

        torch.compile leaves this call as it is; `compile` compiles what it runs.

        Args:
            *args: Arguments of the model's own forward.
            **kwargs: Keyword arguments of the model's own forward.

        Returns:
            The model's own output class, or a tuple with ``return_dict=False``. After reductions,
            ``logits`` cover the M prompt positions that are left, in order (`explain` says which).
            Text always stays. So does the last token of a prompt that ends in an image, as one of
            the K tokens kept: the last logits always belong to the last token of the prompt.

        Raises:
            ValueError: If images and placeholders do not match, or the cache is not a
                `ReducedCache`.
        """
        call = self._bind(*args, **kwargs)
        gather_own(self.model)
        output = self._run(completed(call))
        return output if call.inputs.get("return_dict", True) else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' own `generate` on the reduced model.

        The prompt is reduced once and decoding continues on what is left. Only with
        ``use_cache=False`` is the whole text reduced anew for every token, and scores that read the
        text may then keep other tokens.

        The next turn of a conversation continues on the cache of the previous one: give the whole
        conversation as ``input_ids``, and the cache (``past_key_values``, since transformers 5.24
        ``cache``) of the output that ``return_dict_in_generate=True`` returned. Images that are in
        the cache may be given again, as a processor does; they are not encoded again. New images
        are reduced as those of the first turn were, and their tokens see what is left of it.

        Args:
            *args: Arguments of the model's `generate`.
            **kwargs: Keyword arguments of the model's `generate`.

        Returns:
            The result of the model's `generate`.

        Raises:
            ValueError: If the arguments ask for something that a reduced model cannot do: a cache
                of fixed or equal lengths (``cache_implementation``), attention weights, or drafting
                with layers of the model itself.
        """
        host = generation_host(self, self.model, self._new_cache)
        # The ids may come by position, too.
        ids = {"input_ids": args[0]} if args else {}
        given = without_known_images(facts_of(self.model), normal_inputs(kwargs | ids))
        return host.generate(*args, **{name: given[name] for name in given if name not in ids})

    @property
    def graph_module(self) -> fx.GraphModule:
        """Return the lowered prefill graph that was used last.

        Raises:
            RuntimeError: Before the first call.
        """
        latest = self.graphs.latest
        if latest is None:
            raise RuntimeError(
                "Nothing is captured yet: call the model once, or give example_inputs to transform."
            )
        return latest

    # *** attributes that transformers' pipelines read ***

    @property
    def config(self) -> PreTrainedConfig:
        """Return the model's config."""
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        """Return the defaults of `generate`."""
        return facts_of(self.model).text_model.generation_config

    @property
    def device(self) -> torch.device:
        """Return the device of the model's inputs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the model's weights."""
        return self.model.dtype

    def can_generate(self) -> bool:
        """Return True."""
        return True

    # *** inspecting ***

    def cost(self, **inputs: Any) -> CostReport:
        """Compute the cost of a prefill of these inputs, without running it.

        Args:
            **inputs: Arguments of the model's forward: prompts with images, as `processor` makes
                them.

        Returns:
            Visual tokens per layer, FLOPs and KV bytes of these inputs, without and with the
            reductions.

        Raises:
            ValueError: If the inputs have no image.
        """
        costs = CostModel.of_call(self._bind(**inputs))
        return CostReport(before=costs.predict(Policy()), after=costs.predict(self.policy))

    def explain(self, **inputs: Any) -> Explanation:
        """Find which tokens each reduction keeps, and where the others go; runs one prefill.

        Args:
            **inputs: Arguments of the model's forward: prompts with images. A cache is ignored.

        Returns:
            An explanation of each reduction, from input to output of the model; its `draw` draws
            them on the images.

        Raises:
            ValueError: If the inputs have no image.
        """
        call = completed(self._bind(**inputs | {CACHE: None}))
        graph_module = self.graphs.prefill(call, call.layout)
        return explain(graph_module, self.policy, call.layout, call.inputs)

    def __repr__(self) -> str:
        return f"ReducedModel of {type(self.model).__name__}, {self.signature}\n{self.policy}"

    # *** saving ***

    def save_pretrained(self, dir: str | os.PathLike[str]) -> None:
        """Write the model, as transformers does, and the policy; whole or not at all.

        Args:
            dir: A folder, made if it does not exist; other files in it stay, except weights of an
                earlier model that transformers would read.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If loading would give another model, see `deos_fx.runtime.saved.save`.
        """
        saved.save(self.model, self.policy, dir)

    @classmethod
    def from_pretrained(cls, dir: str | os.PathLike[str], **options: Any) -> ReducedModel:
        """Load what `save_pretrained` wrote.

        Args:
            dir: The folder.
            **options: Options of transformers' `from_pretrained`, such as ``dtype`` and
                ``device_map``.

        Raises:
            ValueError: If there is no reduced model in the folder, or it is incomplete or damaged.
        """
        found = saved.SavedModel(dir)
        return cls(found.model(**options), found.policy)

    # *** compiling ***

    def compile(self, **options: Any) -> None:
        """Run the graphs of prefill and decode under torch.compile, each as one graph.

        Every graph is compiled at its first calls: once for the sizes it sees first, then for any.
        An image encoder that reads the sizes of images runs as it is.

        Args:
            **options: Arguments of torch.compile, such as ``mode``; ``fullgraph`` is True unless
                it is given.
        """
        self.graphs.compile({"fullgraph": True, **options})

    def capture(self, **inputs: Any) -> None:
        """Capture and lower the prefill of these inputs now, instead of at the first call.

        Args:
            **inputs: Arguments of the model's forward: prompts with images.

        Raises:
            ValueError: If the inputs have no image, or the model cannot be captured.
        """
        call = completed(self._bind(**inputs))
        call.check_images()
        for part in self._parts(call):
            if part.layout is not None:
                self.graphs.prefill(part.call, part.layout)

    def _bind(self, *args: Any, **kwargs: Any) -> Call:
        return Call.bind(facts_of(self.model), *args, **kwargs)

    def _run(self, call: Call) -> ModelOutput:
        """Run a completed call.

        1. A later turn of text, or a decode step: the decode graph runs on the cache.
        2. A later turn with images: a prefill whose layers also see the turns before.
        3. A first prefill.
        """
        cache: Any = call.inputs.get(CACHE)
        # Case 1.
        if cache is not None and cache.get_seq_length():
            return self._continue(call, cache)
        output = self._prefill(call, cache)
        # Case 2.
        if isinstance(cache, TurnCache):
            append_turn(cache.earlier, cache)
            output[CACHE] = cache.earlier
        return output

    def _prefill(self, call: Call, cache: Any) -> ModelOutput:
        """Run a prefill.

        Each part of the batch runs its own graph, with a cache of its own if there are several
        parts; then outputs, spaces and caches are joined.
        """
        inputs = call.inputs
        if call.has_images and not self._is_scaled:
            say_once(
                f"The policy lets images enter at {self.policy.image_scale:.3g} of their size, "
                "which the processor does: make inputs with reduced.processor(processor)."
            )
        # A prefill that a guard stops resets the cache before it is captured anew, so what
        # `completed` wrote into it is kept here.
        deltas = None if cache is None else cache.rope_deltas
        parts = self._parts(call)
        outputs, spaces = [], []
        for part in parts:
            if len(parts) > 1 and cache is not None:
                part.call.inputs[CACHE] = cache.part(part.rows)
            fields, output_class = self._prefill_part(part)
            spaces.append(
                self._spaces_of(fields.pop("spaces", None), part.call.inputs["input_ids"])
            )
            outputs.append(fields)
        (fields, left) = outputs[0], spaces[0]
        length = inputs["input_ids"].shape[1]
        if len(parts) > 1:
            fields, left = join_outputs(parts, outputs), join_spaces(parts, spaces, length)
        if cache is not None:
            if len(parts) > 1:
                rows = [row for part in parts for row in part.rows]
                cache.join([part.call.inputs[CACHE] for part in parts], rows)
                fields[CACHE] = cache
            # Later turns continue from here.
            cache.rope_deltas = deltas
            cache.record(length, left, call.images)
        return _output(output_class, fields)

    def _continue(self, call: Call, cache: ReducedCache) -> ModelOutput:
        """Run new tokens after those that the cache holds."""
        mask, positions = call.inputs.get("attention_mask"), call.inputs["position_ids"]
        call = call.having(**cache.decode_inputs(mask, positions))
        fields, output_class = self.graphs.run(call, None)
        return _output(output_class, fields)

    def _parts(self, call: Call) -> list[Part]:
        """Group the prompts that are alike; if nothing is reduced, all are one part."""
        # Without reductions a graph has no counts, so it serves all prompts at once.
        if self.policy.is_empty and not are_written_alike(call.facts, call.inputs):
            if call.has_images:
                # The graph lacks the model's own checks of images and placeholders: check here.
                call.check_images()
            layout = PromptLayout(call.facts.image_token, 0, (0, 0))
            return [Part(tuple(range(len(call.inputs["input_ids"]))), layout, call)]
        return parts_of_batch(call)

    def _prefill_part(self, part: Part) -> tuple[dict[str, Any], type[ModelOutput]]:
        """Return output fields, with ``spaces`` if anything was reduced, and the output's class."""
        if part.layout is None:
            # Case: text alone, with nothing to reduce.
            if isinstance(part.call.inputs.get(CACHE), TurnCache):
                raise ValueError(
                    f"Rows {list(part.rows)} of this later turn have no images, and others have. "
                    "Continue conversations with new images in calls of their own."
                )
            output = part.call.facts.text_model(**part.call.inputs)
            return dict(output.items()), type(output)
        return self.graphs.run(part.call, part.layout)

    def _spaces_of(self, left: Sequence[SpaceFields] | None, input_ids: Tensor) -> list[TokenSpace]:
        """Return the token spaces after the reductions."""
        if left is None:
            # Case: text alone, of which nothing was dropped.
            whole = torch.arange(input_ids.shape[1], device=input_ids.device)
            whole = whole.expand(input_ids.shape)
            unbiased = torch.zeros(input_ids.shape, device=input_ids.device)
            return [
                TokenSpace(space.first_layer, whole, unbiased if space.biased else None)
                for space in self._spaces
            ]
        return [
            TokenSpace(known.first_layer, **space)
            for known, space in zip(self._spaces, left, strict=True)
        ]

    def _new_cache(self) -> ReducedCache:
        return ReducedCache(self.model.config.get_text_config())


def _output(output_class: type[ModelOutput], fields: Mapping[str, Any]) -> ModelOutput:
    """Return the fields in an output of a class that need not declare all of them."""
    declared = inspect.signature(output_class).parameters
    output = output_class(**{name: x for name, x in fields.items() if name in declared})
    for name in fields.keys() - declared.keys():
        # Case: fields of a language model that has an output of its own in that of the model.
        output[name] = fields[name]
    return output
