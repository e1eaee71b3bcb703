"""The command ``deos-fx transform``: a model and a policy, saved together."""

from __future__ import annotations

from deos_fx.cli.console import report_console
from deos_fx.cli.options import (
    Dtype,
    Force,
    ImageScale,
    Model,
    Output,
    PolicyFile,
    Preset,
    TokenLimit,
)
from deos_fx.cli.outputs import check_target

__all__ = ["transform"]


def transform(
    model_dir: Model,
    out_dir: Output,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    image_scale: ImageScale = None,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Apply a policy to a model and save both.

    Without --policy and --preset this applies the default policy, at the
    budget or the default one; with --image-scale alone, images enter smaller and
    nothing else is reduced. A policy that the model cannot run is refused before
    anything is loaded or written. ReducedModel.from_pretrained loads the result;
    transformers itself warns, and loads the unreduced model from it.

    [bold]Examples[/]

      deos-fx transform my-llava reduced

      deos-fx transform my-llava reduced --policy policy.json

      deos-fx transform my-llava reduced --preset fastv --budget 0.25

      deos-fx transform my-qwen reduced --image-scale 0.5
    """
    check_target(out_dir, force, model_dir)
    from deos_fx.cli.loading import load_reduced
    from deos_fx.cli.policies import Choice
    from deos_fx.cli.processors import copy_processor
    from deos_fx.contents import recorded
    from deos_fx.runtime.saved import folder_for

    # A processor that was written here may be another model's.
    with folder_for(out_dir, recorded(out_dir)) as folder:
        reduced = load_reduced(model_dir, Choice(policy, preset, budget, image_scale), dtype=dtype)
        reduced.save_pretrained(folder)
        copy_processor(model_dir, folder)
    report_console().print(reduced.policy, highlight=False, markup=False, soft_wrap=True)
    report_console().print(f"Wrote {out_dir}", highlight=False)
