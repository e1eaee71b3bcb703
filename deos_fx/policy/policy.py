"""Policies as plain data: how large images enter, and where and how their tokens are reduced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deos_fx.files import check_file, tensors_writer, write_files
from deos_fx.policy.reduction import Reduction, Regime
from deos_fx.policy.site import site_order, split_site
from deos_fx.policy.tier import LEAST_SCALE, check_count, check_number, check_text
from deos_fx.reading import parse_json, read_json, read_tensors, validated
from deos_fx.words import counted

__all__ = ["ModelSignature", "Policy"]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelSignature:
    """The facts of a model by which a policy recognises the model it was searched for.

    Attributes:
        model_type: The model's family.
        vision_layers: Number of blocks in its vision tower.
        decoder_layers: Number of layers in its decoder.
        visual_tokens: Number of visual tokens of an image; 0 if it depends on the image's size.

    Raises:
        ValueError: On construction, if a number is negative, or something else.
        TypeError: If `model_type` is not a text.
    """

    model_type: str
    vision_layers: int
    decoder_layers: int
    visual_tokens: int

    def __post_init__(self) -> None:
        check_text("model: model_type", self.model_type)
        for name in ("vision_layers", "decoder_layers", "visual_tokens"):
            check_count(f"model: {name}", getattr(self, name))

    def __str__(self) -> str:
        vision = counted(self.vision_layers, "vision layer")
        decoder = counted(self.decoder_layers, "decoder layer")
        tokens = counted(self.visual_tokens or "any number of", "visual token")
        return f"{self.model_type} ({vision}, {decoder}, {tokens} per image)"


@dataclass(frozen=True, repr=False)
class Policy:
    """A list of reductions, from input to output of the model. ``Policy()`` reduces nothing.

    Attributes:
        reductions: At most one per site; sorted by depth on construction.
        name: A name for people, which says where the policy comes from.
        model: The model it was searched for; None for a policy that fits any.
        image_scale: Linear scale in (0, 1] at which images enter, by
            `deos_fx.data.scaled_processor`: at 0.5, each has at most a quarter of its pixels.

    Raises:
        ValueError: On construction, if reductions do not go together, the name is too long, or the
            scale is out of range.
        TypeError: If a field is something else.
    """

    reductions: tuple[Reduction, ...] = ()
    name: str = ""
    model: ModelSignature | None = None
    image_scale: float = 1.0

    def __post_init__(self) -> None:
        check_text("the name of a policy", self.name)
        check_number("image_scale", self.image_scale, LEAST_SCALE, 1)
        object.__setattr__(self, "image_scale", float(self.image_scale))
        if not isinstance(self.model, ModelSignature | None):
            raise TypeError(f"model is {self.model!r}; give a ModelSignature or None")
        if not isinstance(self.reductions, Iterable) or isinstance(self.reductions, str):
            raise TypeError(f"reductions is {self.reductions!r}; give a tuple of Reductions")
        given = tuple(self.reductions)
        for reduction in given:
            if not isinstance(reduction, Reduction):
                raise TypeError(f"reductions has {reduction!r}; give Reduction(site, keep)")
        # Sorted, so that the order in which reductions are written makes no other policy.
        ordered = tuple(sorted(given, key=lambda reduction: site_order(reduction.site)))
        for earlier, later in zip(ordered, ordered[1:], strict=False):
            if earlier.site == later.site:
                raise ValueError(f"two reductions at {later.site}; a site takes one")
            # Windows and pools need neighbours to be there.
            if later.whole_grid and not earlier.leaves_grid:
                raise ValueError(
                    f"{later.site} needs complete images to select from, but {earlier.site} before "
                    f"it does not leave a complete grid; put the grid first or choose another "
                    f"selector"
                )
        # The dataclass is frozen, so the sorted reductions are set in this way.
        object.__setattr__(self, "reductions", ordered)

    @property
    def is_empty(self) -> bool:
        """Return whether the policy leaves the model as it is, at whatever scale images enter."""
        return not self.reductions

    def regime(self, reduction: Reduction) -> Regime:
        """Return the regime of one of the reductions."""
        return reduction.regime

    def count(self, reduction: Reduction, visual_tokens: int) -> int:
        """Return how many tokens ``reduction`` keeps of an image; see ``Reduction.count``."""
        return reduction.count(visual_tokens)

    def counts(self, visual_tokens: int) -> list[int]:
        """Return the number of tokens kept per image after each reduction, in order.

        Raises:
            ValueError: If a reduction keeps more tokens than the one before it leaves, or than an
                image has.
        """
        counts = [reduction.count(visual_tokens) for reduction in self.reductions]
        for i in range(1, len(counts)):
            if counts[i] > counts[i - 1]:
                raise ValueError(
                    f"{self.reductions[i].site} keeps {counts[i]} visual tokens, but "
                    f"{self.reductions[i - 1].site} leaves only {counts[i - 1]}; keep fewer tokens "
                    f"the deeper the site"
                )
        return counts

    def check(self, model: ModelSignature) -> None:
        """Check that the policy can be applied to a model.

        Raises:
            ValueError: If it was searched for another model, names a site that the model does not
                have, or keeps tokens that it does not have.
        """
        # Case: searched for another model. Sites of the same name would be elsewhere in it.
        if self.model is not None and self.model != model:
            raise ValueError(
                f"the policy {self.name or '(unnamed)'} was made for {self.model}, and this model "
                f"is {model}; search a policy for this model"
            )
        for reduction in self.reductions:
            stage, layer = split_site(reduction.site)
            # A model has one projector, so a site there always exists.
            layers = {"vision": model.vision_layers, "decoder": model.decoder_layers}
            if stage in layers and layer >= layers[stage]:
                # Behind the last layer of the decoder, there is nothing left to save.
                last = layers[stage] - 1 - (stage == "decoder")
                raise ValueError(
                    f"the policy reduces at {reduction.site}, but {model.model_type} has "
                    f"{counted(layers[stage], f'{stage} layer')}; "
                    + (f"the last site is {stage}.{last}" if last >= 0 else "reduce at projector")
                )
        # Images of varying size are checked when they come; fractions fit all of them.
        if model.visual_tokens:
            self.counts(model.visual_tokens)

    def to_json(self) -> str:
        """Return the policy as indented JSON, without fields that have their default value.

        Of learned parts, it has shapes, dtypes and a hash of all values.
        """
        # The first two entries identify the file, so that a reader can refuse others with a reason.
        data: dict[str, Any] = {"deos_fx": "policy", "version": VERSION}
        if self.name:
            data["name"] = self.name
        if self.model is not None:
            data["model"] = asdict(self.model)
        if self.image_scale != 1:
            data["image_scale"] = self.image_scale
        if self.tensors:
            data["learned"] = self._digest()
        data["reductions"] = [reduction.to_dict() for reduction in self.reductions]
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all learned parts, each under its site, a slash and its name."""
        return {
            f"{reduction.site}/{name}": value
            for reduction in self.reductions
            for name, value in reduction.learned.items()
        }

    def _digest(self) -> str:
        """Return a hash of the learned parts of all reductions."""
        parts = "".join(reduction.learned.digest for reduction in self.reductions)
        return hashlib.sha256(parts.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, tensors: Mapping[str, Tensor] | None = None) -> Policy:
        """Read a policy from the JSON that ``to_json`` wrote.

        Args:
            text: The JSON.
            tensors: Its learned parts, as ``tensors`` returns them; needed only if it has some.

        Raises:
            ValueError: If the text is not a policy, is one of another version, or has other
                learned parts.
        """
        return cls._of_data(parse_json(text), tensors or {})

    @classmethod
    def _of_data(cls, data: Any, tensors: Mapping[str, Tensor]) -> Policy:
        from deos_fx.policy.schema import PolicyFile

        validated(PolicyFile, data)
        # Values are taken as they were written, since the schema makes floats of whole numbers.
        reductions, model = data["reductions"], data.get("model")
        # In a file, a wrong type is a wrong value like any other.
        try:
            policy = cls(
                tuple(
                    Reduction.from_dict(values, _of_site(tensors, values["site"]))
                    for values in reductions
                ),
                name=data.get("name", ""),
                model=None if model is None else ModelSignature(**model),
                image_scale=data.get("image_scale", 1.0),
            )
        except TypeError as error:
            raise ValueError(str(error)) from error
        unknown = sorted(tensors.keys() - policy.tensors.keys())
        if unknown:
            raise ValueError(f"there are learned parts that it does not name: {unknown[0]!r}")
        if policy.tensors and data.get("learned") != policy._digest():
            raise ValueError(
                "the learned parts are not those that the policy was written with (their hash "
                "differs); restore the .safetensors file that belongs to it, or save the policy "
                "again"
            )
        return policy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a file, completely or not at all.

        Learned parts are written to a second file of the same name that ends in ``.safetensors``.

        Raises:
            OSError: If the folder does not exist or cannot be written, or that second file holds
                something else, such as the weights of a model.
            ValueError: If the name itself ends in ``.safetensors``.
        """
        check_file(path)
        if Path(path).suffix == ".safetensors":
            raise ValueError(
                f"{os.fspath(path)} would be the file of the policy's learned parts; give a name "
                "that ends in .json"
            )
        files = {Path(path): lambda part: part.write_text(self.to_json(), encoding="utf-8")}
        if self.tensors:
            _check_learned(_beside(path))
            # The JSON is replaced last: it has the hash of the tensors, so it never names others.
            files = {_beside(path): tensors_writer(_beside(path), self.tensors), **files}
        write_files(files)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy from a file, and its learned parts from the file beside it.

        Raises:
            OSError: If one of the files cannot be read.
            ValueError: If the file does not hold a policy, or the learned parts are missing or
                others; the message names the files.
        """
        files = os.fspath(path)
        try:
            data = read_json(path)
            tensors = {}
            # A policy without learned parts is a single file, whatever lies beside it.
            if isinstance(data, dict) and "learned" in data and _beside(path).exists():
                files += f" with {_beside(path).name}"
                tensors = read_tensors(_beside(path))
            return cls._of_data(data, tensors)
        except ValueError as error:
            raise ValueError(f"{files} is not a policy file: {error}") from error

    def __repr__(self) -> str:
        title = f"Policy {self.name!r}" if self.name else "Policy"
        if self.model is not None:
            title += f" for {self.model}"
        lines = self.lines
        return f"{title}: no reduction" if not lines else "\n  ".join([f"{title}:", *lines])

    @property
    def lines(self) -> list[str]:
        """Return a line for the scale of images, if they are scaled, and one for each reduction."""
        scaled = [f"images enter at {self.image_scale:.3g} of their size"]
        return scaled * (self.image_scale != 1) + [str(reduction) for reduction in self.reductions]


def _beside(path: str | os.PathLike[str]) -> Path:
    """Return the file for the learned parts of a policy."""
    return Path(path).with_suffix(".safetensors")


def _check_learned(path: Path) -> None:
    """Refuse to write learned parts over tensors that are none."""
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
    except (OSError, SafetensorError):
        # Case: no such file, or one that nobody can read.
        return
    others = [name for name in names if "/" not in name]
    if others:
        raise FileExistsError(
            f"cannot write the learned parts of a policy to {path}: it holds other tensors "
            f"({others[0]}). Give the policy another name."
        )


def _of_site(tensors: Mapping[str, Tensor], site: object) -> dict[str, Tensor]:
    """Return the learned parts of one site by name."""
    split = ((*name.rpartition("/")[::2], value) for name, value in tensors.items())
    return {name: value for where, name, value in split if where == site}
