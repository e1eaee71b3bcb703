"""Run an exported model in ONNX Runtime, called like the model itself."""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deos_fx.contents import check_unchanged, stamp
from deos_fx.data.scale import scaled_processor
from deos_fx.exporters.elastic import counts_of_rows
from deos_fx.exporters.manifest import (
    IMAGES,
    check_policy,
    check_spaces,
    dropped_tokens,
    read_manifest,
    spaces_of,
)
from deos_fx.exporters.prompts import ExportedPrompts
from deos_fx.exporters.session import HOST, Session, as_tensor, open
from deos_fx.exporters.session_cache import SessionCache
from deos_fx.exporters.shared import SharedWeights
from deos_fx.inputs.call import Call, normal_inputs
from deos_fx.inputs.complete import completed
from deos_fx.models.config import read_config
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.rewrite.free_counts import KEEP
from deos_fx.passes.rewrite.select_logits import LOGITS
from deos_fx.policy.counts import with_counts
from deos_fx.policy.policy import Policy
from deos_fx.reading import blaming, read_tensors
from deos_fx.runtime.generation import generation_host
from deos_fx.tokens.cache import TokenSpace
from deos_fx.words import counted

__all__ = ["OnnxModel"]


class OnnxModel:
    """A model that `deos_fx.export_onnx` wrote, run in ONNX Runtime.

    Inputs and results are CPU tensors, whatever the device. Only the prompt, the new token and the
    logits are copied to and from the device; keys and values stay where they are computed. On the
    CPU, as many threads are used as `torch.get_num_threads()` returns when the model is loaded.

    Attributes:
        config: The model's config.
        generation_config: Defaults of `generate`, as for a transformers model.
        device: The device that the graphs run on.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        constants: Mapping[str, Tensor],
        policy: Policy,
        skeleton: PreTrainedModel,
        sessions: Mapping[str, Session],
        extend: Callable[[], Session],
    ) -> None:
        self.config = skeleton.config
        self.generation_config = skeleton.generation_config
        self.device = sessions["prefill"].device
        self._manifest = manifest
        self._constants = constants
        self._policy = policy
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._spaces = spaces_of(manifest)
        # Of a whole prompt, in the last space.
        self._dropped = manifest["spaces"][-1]["dropped"] if manifest["spaces"] else 0
        # The counts of the reductions, where they are inputs.
        self._counts = _counts(policy, manifest["elastic"] or ())
        self._prefill, self._decode = sessions["prefill"], sessions["decode"]
        self._encoder = sessions.get("image_encoder")
        self._prompts = ExportedPrompts(manifest, constants, self._prefill.inputs)
        # Opened when it is first needed, once for all threads.
        self._extend, self._lock = functools.cache(extend), threading.Lock()
        # The model without weights, for `generate` and for facts of its class.
        self._skeleton = skeleton
        self._facts = facts_of(skeleton)

    @classmethod
    def from_pretrained(
        cls,
        dir: str | os.PathLike[str],
        device: str | torch.device | None = None,
        *,
        low_memory: bool = False,
    ) -> OnnxModel:
        """Load a model from a folder that `deos_fx.export_onnx` wrote.

        Args:
            dir: The folder.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``. Left out: CUDA if ONNX Runtime can use it
                here, else the CPU.
            low_memory: Whether all graphs share one copy of the weights. On the CPU that is the
                file itself, mapped into memory. Products with it are slower than with copies that
                each graph rearranges: by a tenth in a prefill and for a new token, and nearly
                twice for new tokens of several rows.

        Returns:
            The model.

        Raises:
            FileNotFoundError: If the folder holds no export.
            ValueError: If it was written by a newer release, is incomplete or damaged, the device
                is none of the above, or memory is to be saved on the CPU with weights of 8 or 4
                bits.
            DeviceError: If CUDA is asked for and cannot be used.

        Warns:
            UserWarning: If an earlier version has written the folder, without the hashes of its
                files.
        """
        folder = Path(dir)
        before = stamp(folder)
        manifest = read_manifest(folder)
        policy = check_policy(folder, manifest)
        skeleton = _skeleton(folder)
        names = [name for name in manifest["graphs"] if name != "extend"]
        shared = SharedWeights(folder) if low_memory else None
        sessions = {name: open(folder / f"{name}.onnx", device, shared) for name in names}
        used = sessions["prefill"].device
        if low_memory and used == HOST and manifest["weights"]:
            raise ValueError(
                f"low_memory=True, but {folder} has {manifest['weights']} weights, whose products "
                "are only fast on the CPU in a copy that each graph rearranges. Leave it out."
            )
        if used.type != manifest["device"]:
            warnings.warn(
                f"{folder} was exported for {manifest['device']}, and on {used.type} its operators "
                f"are slow. Export it with device={used.type!r}.",
                stacklevel=2,
            )
        # Only an encoder for fixed sizes has such values.
        constants = read_tensors(folder / IMAGES) if "image_encoder" in sessions else {}
        check_spaces(folder, manifest, sessions["prefill"].outputs, sessions["decode"].inputs)
        check_unchanged(folder, before)

        def extend() -> Session:
            session = open(folder / "extend.onnx", used, shared)
            check_unchanged(folder, before)
            return session

        return cls(manifest, constants, policy, skeleton, sessions, extend)

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Run the prefill graph or, given the cache of an earlier call, the decode graph.

        Args:
            *args: Arguments of the model's own forward.
            **kwargs: Keyword arguments of the model's own forward. Those that choose which outputs
                it returns have no effect, except ``logits_to_keep``.

        Returns:
            ``logits`` in float32 at every prompt position that is left, and the cache
            (``past_key_values``, since transformers 5.24 ``cache``) for the next call.

        Raises:
            ValueError: If the images of the prompts or the inputs of the call are not exactly
                those that the graphs were exported for.
        """
        return self._run(Call.bind(self._facts, *args, **kwargs))

    def generate(self, **inputs: Any) -> Any:
        """Generate text with transformers' own `generate`.

        Greedy search, sampling, beams (on CUDA they need a torch with CUDA), streamers and stopping
        criteria work as they do there.

        Args:
            **inputs: Arguments of the model's `generate`, as CPU tensors.

        Returns:
            The same as the model's `generate`.

        Raises:
            ValueError: With ``use_cache=False``, or for prompts that do not fit the graphs.
        """
        if not inputs.get("use_cache", True):
            raise ValueError("use_cache=False, but exported graphs always use a cache; omit it")
        # Each call of `generate` has a host of its own: some families store positions on the model
        # object, which another thread must not see.
        host = generation_host(self, self._skeleton, self._new_cache, device=HOST)
        return host.generate(**normal_inputs(inputs))

    def processor(self, processor: Any) -> Any:
        """Return the processor that goes with this model; see `deos_fx.ReducedModel.processor`.

        Args:
            processor: The processor of the unreduced model.

        Raises:
            ValueError: If the policy scales images, and the model takes one size only.
        """
        return scaled_processor(processor, self._policy.image_scale)

    def keeping(self, *keep: int | float) -> OnnxModel:
        """Return the same model with other counts, if it was exported with ``elastic=True``.

        Both share all graphs and weights, so that a budget can be chosen for every call. A cache
        goes on in either.

        Args:
            *keep: Visual tokens of an image that stay after each reduction of the policy, in order
                of depth: ints, or fractions of an image as in `deos_fx.Reduction`.

        Raises:
            ValueError: If the counts are constants of the graphs, there are more or fewer
                reductions, or one drops nothing of what is left by the one before it.
        """
        sizes, reductions = self._manifest["elastic"], self._policy.reductions
        if sizes is None:
            raise ValueError(
                "The counts of this model are constants of its graphs. Export it with elastic=True."
            )
        if len(keep) != len(reductions):
            sites = ", ".join(reduction.site for reduction in reductions)
            raise ValueError(
                f"keep is {keep}; give {counted(len(reductions), 'count')}, for {sites}"
            )
        other = copy.copy(self)
        other._policy = with_counts(self._policy, keep)
        other._counts = _counts(other._policy, sizes)
        layers = self._manifest["model"]["decoder_layers"]
        other._dropped = dropped_tokens(other._policy, sizes, layers)[-1]
        return other

    # *** running ***

    def _run(self, call: Call) -> CausalLMOutputWithPast:
        """Run the prefill on an empty cache, or the decode graph on a filled one."""
        cache = call.inputs.setdefault(CACHE, self._new_cache())
        if not isinstance(cache, SessionCache):
            raise ValueError(
                f"{CACHE} is a {type(cache).__name__}; pass None, or what an earlier call "
                "of this model returned"
            )
        # Positions and masks become explicit, as for a reduced model in PyTorch.
        call = completed(call)
        if cache.get_seq_length() == 0 and call.images:
            logits = self._run_prefill(call, cache)
        else:
            logits = self._run_decode(call.inputs, cache)
        fields: dict[str, Any] = {"logits": logits.float(), CACHE: cache}
        return CausalLMOutputWithPast(**fields)

    def _run_prefill(self, call: Call, cache: SessionCache) -> Tensor:
        """Run the prefill graph, fill the cache and return the logits [B, L, vocabulary]."""
        inputs, ids = call.inputs, call.inputs["input_ids"]
        self._prompts.check(inputs)
        values = {
            **inputs,
            # The graphs always take a mask.
            "attention_mask": inputs.get("attention_mask", torch.ones_like(ids)),
            "position_ids": self._positions(ids, inputs["position_ids"]),
            LOGITS: _places(inputs, ids.shape[1] - self._dropped),
            **self._counts,
        }
        if self._encoder is not None:
            # The prefill graph takes features in place of the pixels.
            values |= self._encode(self._encoder, values, len(ids))
        # Values that the graph does not read are ignored.
        outputs = self._prefill(values)
        self._prompts.check_branches(outputs)
        cache.take_states(outputs, ids.shape[1], self._prefill)
        spaces = [
            TokenSpace(
                space.first_layer,
                as_tensor(outputs[f"origin_{k}"]),
                as_tensor(outputs[f"key_bias_{k}"]) if space.biased else None,
                as_tensor(outputs[f"shift_{k}"]) if space.position == "grid" else None,
            )
            for k, space in enumerate(self._spaces, start=1)
        ]
        cache.record(ids.shape[1], spaces, call.images)
        return as_tensor(outputs["logits"])

    def _run_decode(self, inputs: dict[str, Any], cache: SessionCache) -> Tensor:
        """Run a text of its own or new tokens, and return the logits [B, L, vocabulary]."""
        ids = inputs["input_ids"]
        session = self._decode
        if not cache.states:
            # Case: a text without images.
            self._begin_text(ids, cache)
        if not cache.get_seq_length() or ids.shape[1] > 1:
            # Case: more than the decode graph takes.
            with self._lock:
                session = self._extend()
        seen = cache.get_seq_length() + ids.shape[1]
        positions = self._positions(ids, inputs["position_ids"])
        mask = inputs.get("attention_mask")
        if mask is None:
            # Case: no mask. All tokens seen so far are real.
            mask = ids.new_ones(len(ids), seen)
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            LOGITS: _places(inputs, ids.shape[1]),
            # Masks, positions and biases of every space.
            **cache.decode_inputs(mask, positions),
        }
        outputs = session(values | cache.states_for(session))
        cache.take_states(outputs, seen, session)
        return as_tensor(outputs["logits"])

    def _begin_text(self, ids: Tensor, cache: SessionCache) -> None:
        """Fill a cache with no keys, as after a prompt of no tokens.

        Raises:
            ValueError: If the text has image placeholders.
        """
        if bool((ids == self._manifest["image_token"]).any()):
            self._prompts.refuse_half()
        rows = len(ids)
        cache.begin(self._decode.empty_states(rows))
        none = torch.zeros(rows, 0, dtype=torch.int64)
        spaces = [
            # Under every rule for positions, these are moved by the number of dropped tokens: none.
            TokenSpace(space.first_layer, none, none.to(self._dtype) if space.biased else None)
            for space in self._spaces
        ]
        cache.record(0, spaces, {})

    def _positions(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the positions in the shape of the graphs: [B, t], or [coordinates, B, t]."""
        coordinates = self._manifest["coordinates"]
        if not coordinates:
            return positions.expand(ids.shape)
        if positions.ndim == 3 and len(positions) == coordinates + 1:
            # Case: a row more. transformers' generate puts places in the text before the
            # coordinates.
            positions = positions[1:]
        return positions.expand(coordinates, *ids.shape)

    def _encode(
        self, encoder: Session, values: Mapping[str, Any], prompts: int
    ) -> dict[str, Tensor]:
        """Encode the images of all prompts, one prompt at a time.

        Raises:
            ValueError: If the encoder reads other values from the pixels than during the export.
        """
        parts: dict[str, list[Tensor]] = {}
        # The encoder was exported for the images of one prompt.
        for row in range(prompts):
            own = {name: values[name].chunk(prompts)[row] for name in encoder.inputs}
            for name, value in encoder(own).items():
                parts.setdefault(name, []).append(as_tensor(value))
        for name, found in parts.items():
            # The sizes of images were compared before; here it is what was read of the pixels.
            if name in self._constants and any(
                not torch.equal(value, self._constants[name]) for value in found
            ):
                raise ValueError(
                    "The image encoder of this model treats some images in another way than those "
                    "it was exported with: an image that is all zeros counts as none. Leave such "
                    "images out, or export again with example_inputs that have as many."
                )
        return {name: torch.cat(found) for name, found in parts.items()}

    def _new_cache(self) -> SessionCache:
        """Make an empty cache, with the layers of this model."""
        return SessionCache(self.config.get_text_config())


def _counts(policy: Policy, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return the counts of the reductions as inputs; none where no sizes say that they are."""
    counts = counts_of_rows(policy, sizes) if sizes else []
    return {f"{KEEP}{k}": torch.tensor([count]) for k, count in enumerate(counts, start=1)}


def _places(inputs: Mapping[str, Any], left: int) -> Tensor:
    """Return the places whose logits a call asks for, counted from the end: the last, or all."""
    # 0 asks for all.
    return torch.arange(-min(inputs.get(LOGITS) or left, left), 0)


def _skeleton(folder: Path) -> PreTrainedModel:
    """Make the model without weights: `generate` needs only its class and configs."""
    config: Any = read_config(folder)
    with blaming(folder):
        (name,) = config.architectures
        kind = getattr(transformers, name)
        if not issubclass(kind, PreTrainedModel):
            raise TypeError(f"{name} is no class of a model")
        # Tensors on the meta device take no memory.
        with torch.device("meta"):
            skeleton = kind._from_config(config)
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    return skeleton.eval()
