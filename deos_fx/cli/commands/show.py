"""The command ``deos-fx show``: which patches of an image a policy keeps, drawn on it."""

from __future__ import annotations

from pathlib import Path

from deos_fx.cli.console import Console, report_console
from deos_fx.cli.options import (
    Device,
    Dtype,
    Force,
    Images,
    ImageScale,
    ImageUrls,
    Model,
    OutputOption,
    PolicyFile,
    Preset,
    Prompt,
    TokenLimit,
)
from deos_fx.cli.outputs import check_target

__all__ = ["show"]


def show(
    model_dir: Model,
    image: Images,
    prompt: Prompt,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    image_scale: ImageScale = None,
    output: OutputOption = Path("deos-fx-show"),
    urls: ImageUrls = False,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Draw on an image which patches stay at each site, and where the others go.

    Writes show.html and show.png. MODEL_DIR may be a folder that transform
    wrote, and its policy is drawn then; without one, --policy and --preset, it
    is the default policy. Images are drawn as the model is given them: resized,
    cropped, and tiles apart.

    [bold]Examples[/]

      deos-fx show reduced --image cat.jpg --prompt "What is this?"

      deos-fx show my-llava --image cat.jpg --prompt "What?" --preset fastv
    """
    check_target(output, force, model_dir)
    from deos_fx.cli.loading import checked_processor, load_reduced
    from deos_fx.cli.policies import Choice
    from deos_fx.cli.questions import question_of
    from deos_fx.cli.terminal import stages
    from deos_fx.comparison.answers import inputs_for
    from deos_fx.data import batches, open_image
    from deos_fx.data.frames import frames
    from deos_fx.files import fresh_folder

    console = Console()
    record = question_of(image, prompt, urls)
    images = [open_image(source) for source in record.images]
    with fresh_folder(output) as folder, stages(report_console()) as stage:
        with stage("load"):
            processor = checked_processor(model_dir)
            choice = Choice(policy, preset, budget, image_scale)
            reduced = load_reduced(model_dir, choice, dtype=dtype, device=device)
            processor = reduced.processor(processor)
        with stage("draw"):
            (inputs,) = batches(processor, [record], 1)
            explanation = reduced.explain(**inputs_for(reduced.model, inputs))
            shown = frames(processor, inputs, images)
            if len(shown) < len(explanation.grids):
                raise ValueError(
                    f"--image: the model is given {len(explanation.grids)} tiles, as patches that "
                    "cannot be drawn; give a smaller image, which it takes whole, or --image-scale"
                )
            drawn = explanation.draw(shown, prompt)
            drawn.save(folder / "show.html")
            drawn.save(folder / "show.png")
    if not explanation:
        console.print(str(reduced.policy), highlight=False, markup=False)
    for site in explanation:
        console.print(str(site), highlight=False, markup=False)
    report_console().print(f"Wrote show.html and show.png to {output}", highlight=False)
