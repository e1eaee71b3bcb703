"""Plain tensor functions on the tokens of a prompt: their indices, positions, biases and votes."""

from __future__ import annotations

from types import FunctionType

from deos_fx.tokens.bias import (
    gate_bias,
    mass_bias,
    ones_like_tokens,
    patch_bias,
    patch_gate_bias,
    prompt_gates,
)
from deos_fx.tokens.index import (
    beside,
    first_of_prompt,
    kept_in_prompt,
    kept_of_kept,
    kept_of_prompt,
    known_of_kept,
    last_of_prompt,
    masses_of_prompt,
    of_images,
    of_prompts,
    put,
    streams_in_row,
    take,
    take_each,
    take_in_each,
    take_mask,
    visual_after,
    with_patches,
)
from deos_fx.tokens.positions import (
    are_open,
    are_visual,
    class_token,
    compact_positions,
    grid_positions,
    is_separator,
    last_token,
    relaxed_positions,
    shift_of,
    text_tokens,
    trailing,
    visual_positions,
)
from deos_fx.tokens.turn import after_earlier
from deos_fx.tokens.votes import (
    class_feature,
    for_images,
    question_votes,
    rater_votes,
    text_key_size,
    text_votes,
    tower_votes,
    without_class,
)

__all__ = [
    "after_earlier",
    "are_open",
    "are_visual",
    "beside",
    "class_feature",
    "class_token",
    "compact_positions",
    "first_of_prompt",
    "for_images",
    "gate_bias",
    "grid_positions",
    "is_separator",
    "kept_in_prompt",
    "kept_of_kept",
    "kept_of_prompt",
    "known_of_kept",
    "last_of_prompt",
    "last_token",
    "mass_bias",
    "masses_of_prompt",
    "of_images",
    "of_prompts",
    "ones_like_tokens",
    "patch_bias",
    "patch_gate_bias",
    "prompt_gates",
    "put",
    "question_votes",
    "rater_votes",
    "relaxed_positions",
    "shift_of",
    "streams_in_row",
    "take",
    "take_each",
    "take_in_each",
    "take_mask",
    "text_key_size",
    "text_tokens",
    "text_votes",
    "tower_votes",
    "trailing",
    "visual_after",
    "visual_positions",
    "with_patches",
    "without_class",
]

# The printed code of a graph names a function's module; the public one is the easiest to read.
for _function in [value for name, value in globals().items() if name in __all__]:
    if isinstance(_function, FunctionType):
        _function.__module__ = __name__
