"""The command ``deos-fx inspect``: the blocks and sites of a model, with a policy's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deos_fx.cli.console import Console, report_console
from deos_fx.cli.options import AsJson, Force, ImageScale, Model, PolicyFile, Preset, TokenLimit
from deos_fx.cli.outputs import check_target_file

__all__ = ["inspect"]


def inspect(
    model_dir: Model,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    image_scale: ImageScale = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="An image whose tokens are counted, which takes the model's processor. Default: "
            "one of 448 x 448 pixels, where sizes vary.",
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw it as well, in this file.")
    ] = None,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Show a model's blocks, its token spaces and its sites; with a policy, the tokens it leaves.

    Only the config is read, so a folder with config.json alone is enough, and
    a large model takes no more time and memory than a small one. A folder that
    transform wrote is shown with its policy.

    [bold]Examples[/]

      deos-fx inspect my-llava

      deos-fx inspect my-llava --preset merge --budget 12.5%

      deos-fx inspect my-llava --policy policy.json --svg my-llava.svg

      deos-fx inspect my-qwen --image photo.jpg --preset merge --budget 25%
    """
    if svg is not None:
        check_target_file(svg, force)
    from deos_fx.cli.loading import meta_model
    from deos_fx.cli.outline import costs_of, outline, print_cost, print_outline
    from deos_fx.cli.outline_drawing import outline_chart
    from deos_fx.cli.outline_json import outline_json
    from deos_fx.cli.policies import Choice, examples_of, own_policy, policy_of
    from deos_fx.cli.processors import example_processor
    from deos_fx.cli.questions import question_of
    from deos_fx.files import write_text
    from deos_fx.inputs.example import QUESTION, example_inputs

    # Nothing here needs weights, so the model stays on the meta device.
    console = Console()
    record = None if image is None else question_of([image], QUESTION, urls=False)
    # First, as an incomplete folder may have another model's config.
    own = own_policy(model_dir)
    model = meta_model(model_dir)
    examples = examples_of(model, model_dir, record)
    chosen = policy_of(model, examples, own, Choice(policy, preset, budget, image_scale))
    whole, inputs = examples(1.0 if chosen is None else chosen.image_scale)
    if whole is None or inputs is None:
        # Case: there is no example, and this says why.
        whole = inputs = example_inputs(model, example_processor(model_dir))
    found = outline(model, inputs, chosen)
    costs = None if chosen is None else costs_of(model, whole, inputs, chosen)
    if as_json:
        typer.echo(json.dumps(outline_json(found, costs), indent=2))
    else:
        print_outline(found, console)
        if costs is not None:
            print_cost(found.policy, costs, console)
    if svg is not None:
        write_text(svg, outline_chart(found))
        # With --json, the output holds nothing else.
        if not as_json:
            report_console().print(f"Wrote {svg}", highlight=False)
