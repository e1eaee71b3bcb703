"""The schemas of files of policies and latency tables: names, types and ranges of their fields.

Which values go together, and which names there are of scores and selectors, is checked where a
`Reduction` is made, in Python as from a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from deos_fx.policy.reduction import (
    ASSIGNMENTS,
    HIGHEST_TEMPERATURE,
    ORDERS,
    POSITIONS,
    RANGES,
    RECEIVERS,
    WEIGHTINGS,
)
from deos_fx.policy.site import SITE
from deos_fx.policy.tier import HIGHEST_WEIGHT, LEAST_SCALE, MOST_TOKENS
from deos_fx.schema import Count, Hash, Strict, Text

__all__ = ["LatencyFile", "PolicyFile"]


def _range(name: str) -> Any:
    """Return the limits of a number of a reduction."""
    low, high = RANGES[name]
    return Field(ge=low, le=high)


def _one_of(names: Any) -> Any:
    """Publish the choices of a name, which a reduction checks in its own words."""
    return Field(json_schema_extra={"enum": list(names)})


Keep = (
    Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Annotated[float, Field(gt=0, le=1, strict=True)]
)
"""A number of tokens, or a fraction."""
Weights = dict[str, Annotated[float, Field(ge=0, le=HIGHEST_WEIGHT)]]
"""Weight by name."""
Options = dict[str, float | list[float]]
"""Value by name."""


Share = Annotated[float, Field(gt=0, le=1)] | None
"""A fraction of the tokens, under the name that is written today."""


def _check_amount(entry: Any) -> Any:
    """Check that an entry says in one way how many tokens stay."""
    if entry.keep is None and entry.share is None:
        raise ValueError("it lacks the field 'keep', or 'share'")
    if entry.keep is not None and entry.share is not None:
        raise ValueError("it has both 'keep' and 'share'")
    return entry


class TierEntry(Strict):
    """A further step of a selection; the fields are those of `deos_fx.policy.Tier`."""

    keep: Literal[0] | Keep | None = None
    share: Share = None
    selector: Text = "top_k"
    scores: Weights = {}
    diversity: Annotated[float, _range("diversity")] = 0.0
    options: Options = {}
    observe: Text = ""

    _amount = model_validator(mode="after")(_check_amount)


class LearnedEntry(Strict):
    """A tensor of the file beside the policy."""

    shape: Annotated[list[Count], Field(min_length=1, max_length=2)]
    dtype: Literal["float32"]


class ReductionEntry(Strict):
    """A reduction; the fields are those of `deos_fx.Reduction`."""

    site: Annotated[Text, Field(json_schema_extra={"pattern": SITE})]
    keep: Keep | None = None
    share: Share = None
    scores: Weights = {}
    selector: Text = "top_k"
    diversity: Annotated[float, _range("diversity")] = 0.0
    options: Options = {}
    observe: Text = ""
    tiers: Annotated[list[TierEntry], Field(max_length=100)] = []
    order: Annotated[Text, _one_of(ORDERS)] = "position"
    receivers: Annotated[Text, _one_of(RECEIVERS)] = "all"
    gain: Annotated[float, _range("gain")] = 0.0
    assignment: Annotated[Text, _one_of(ASSIGNMENTS)] = "similar"
    temperature: Annotated[float, Field(ge=0, le=HIGHEST_TEMPERATURE)] | Literal["inf"] = 0.0
    similarity: Weights = {"feature": 1.0}
    neighbours: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    weighting: Annotated[Text, _one_of(WEIGHTINGS)] = "one"
    sharpness: Annotated[float, _range("sharpness")] = 1.0
    exponent: Annotated[float, _range("exponent")] = 1.0
    average: bool = False
    reweight: Annotated[float, _range("reweight")] = 0.0
    residual: bool = False
    keep_class: bool = False
    mass_bias: Annotated[float, _range("mass_bias")] = 0.0
    position: Annotated[Text, _one_of(POSITIONS)] = "keep"
    learned: dict[str, LearnedEntry] = {}

    _amount = model_validator(mode="after")(_check_amount)


class ModelEntry(Strict):
    """The model that a policy was made for."""

    model_type: Text
    vision_layers: Count
    decoder_layers: Count
    visual_tokens: Count
    """Of an image; 0 if it depends on the image's size."""


class PolicyFile(Strict):
    """A policy: how large images enter, where to reduce, how many tokens to keep, and how."""

    deos_fx: Literal["policy"]
    version: Literal[1]
    name: Text = ""
    model: ModelEntry | None = None
    image_scale: Annotated[float, Field(ge=LEAST_SCALE, le=1)] = 1.0
    """Of the sides of images as they enter."""
    learned: Hash | None = None
    """A hash of all learned parts, which are in the file beside it that ends in .safetensors."""
    reductions: Annotated[list[ReductionEntry], Field(max_length=1000)]


Milliseconds = Annotated[float, Field(ge=0)]


class LatencyFile(Strict):
    """What each decoder layer takes at each length of a prompt, on one machine."""

    deos_fx: Literal["latency"]
    version: Literal[1]
    model: ModelEntry
    machine: Text
    """What it ran on, for people."""
    lengths: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(max_length=1000)]
    """Tokens of the prompt, text included, ascending."""
    layers: Annotated[list[list[Milliseconds]], Field(max_length=1000)]
    """Times of each decoder layer at each of these lengths."""
    encoder: Milliseconds
    """Of encoding the images."""
    encoder_flops: Annotated[int, Field(ge=0, le=2**63 - 1)]
