"""The command ``deos-fx generate``: what a model, reduced or exported, answers about an image."""

from __future__ import annotations

from typing import Annotated

import typer

from deos_fx.cli.console import Console
from deos_fx.cli.options import (
    Device,
    Dtype,
    Images,
    ImageScale,
    ImageUrls,
    Model,
    PolicyFile,
    Preset,
    Prompt,
    TokenLimit,
)

__all__ = ["generate"]


def generate(
    model_dir: Model,
    image: Images,
    prompt: Prompt,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    image_scale: ImageScale = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 128,
    urls: ImageUrls = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Print what a model answers about an image.

    MODEL_DIR is a model, a folder that transform wrote, or one that export
    wrote, which runs in ONNX Runtime. A model runs unreduced unless --policy,
    --preset or --budget are given. Of each token the likeliest is taken.

    [bold]Examples[/]

      deos-fx generate reduced --image cat.jpg --prompt "What is this?"

      deos-fx generate my-llava --image cat.jpg --prompt "What?" --budget 50%

      deos-fx generate onnx --image a.jpg --image b.jpg --prompt "Who is older?"
    """
    from deos_fx.cli.loading import checked_processor, load_generating
    from deos_fx.cli.policies import Choice
    from deos_fx.cli.processors import going_with
    from deos_fx.cli.questions import question_of
    from deos_fx.comparison.answers import generated

    record = question_of(image, prompt, urls)
    processor = checked_processor(model_dir)
    choice = Choice(policy, preset, budget, image_scale)
    model, place = load_generating(model_dir, choice, dtype=dtype, device=device)
    (answer,) = generated(
        model.generate,
        place,
        going_with(model, processor),
        [record],
        batch_size=1,
        max_new_tokens=max_new_tokens,
    )
    if not answer:
        Console(stderr=True).print("The model ended its answer before the first word.")
    # Plain text: the output is meant for other programs, too.
    typer.echo(answer)
