"""The command ``deos-fx``.

Every command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from deos_fx.cli.data_command import data as data_command
from deos_fx.cli.eval_command import evaluate as eval_command
from deos_fx.cli.generate_command import generate
from deos_fx.cli.loading import (
    AsJson,
    DataFile,
    Device,
    Dtype,
    Evaluations,
    Force,
    Model,
    OtherLimit,
    Output,
    OutputOption,
    PolicyFile,
    PolicyFiles,
    Preset,
    Presets,
    TestFile,
    TokenLimit,
    TokenLimits,
    TuneFile,
    Urls,
    copy_processor,
    example_processor,
    load_model,
    load_reduced,
    meta_model,
    named_policies,
    policy_of,
)
from deos_fx.cli.outputs import check_target
from deos_fx.cli.show_command import show
from deos_fx.version import __version__

__all__ = ["app"]


class _Commands(TyperGroup):
    """The commands; a user's mistake prints one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        # These types carry a message for the user; any other error is a bug, with its traceback.
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            _fail(error)
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted; no results were written.")
            raise typer.Exit(130) from None


def _fail(error: Exception) -> None:
    # Soft wrapping leaves lines whole, so that paths and commands can be copied.
    console = Console(stderr=True, soft_wrap=True)
    text = str(error).strip() or type(error).__name__
    console.print("[bold red]Error:[/]", end=" ")
    console.print(text, markup=False, highlight=False)
    console.print("[dim]deos-fx --debug <command> shows where it comes from.[/]")
    raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_QUIET: ContextVar[bool] = ContextVar("deos_fx_quiet", default=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deos-fx {__version__}")
        raise typer.Exit


def _console() -> Console:
    """Return where a command reports what it does; nowhere with --quiet."""
    return Console(quiet=_QUIET.get())


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors, and what was asked for, alone.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A compiler for the visual tokens of Hugging Face vision-language models.

    Start with [bold]deos-fx demo[/].
    """
    import logging
    import signal

    _QUIET.set(quiet)
    # By default, termination from outside skips all cleaning up. As SystemExit it passes through
    # the contexts that remove temporary folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The commands have a progress display of their own. transformers reads these variables when it
    # is imported, for which a command's help need not wait.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


# *** the commands ***


@app.command()
def demo(
    output: OutputOption = Path("deos-fx-demo"),
    budget: TokenLimit = "12.5%",
    seed: Annotated[int, typer.Option(help="Seed of the search and its scenes.")] = 0,
    force: Force = False,
) -> None:
    """Search, compare, export and run a small trained model, and write a report.

    Takes a few minutes on two cores and needs no network. Writes
    policy.json, the ONNX files, results.json and report.html.

    [bold]Examples[/]

      deos-fx demo

      deos-fx demo --output my-demo --budget 0.25
    """
    check_target(output, force)
    from deos_fx.cli.demo import run_demo

    run_demo(output, budget, seed, _console())


@app.command("presets")
def show_presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Write this preset's policy as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the published methods, or write the policy of one.

    Policies are written with the defaults of the official code; in Python,
    deos_fx.presets has them as functions with all their settings.

    [bold]Examples[/]

      deos-fx presets

      deos-fx presets fastv > policy.json
    """
    from deos_fx import presets
    from deos_fx.cli.terminal import presets_table

    # Case: no name, so list all.
    if name is None and as_json:
        keys = ("name", "title", "source", "licence", "needs")
        listed = [{key: getattr(method, key) for key in keys} for method in presets.list()]
        typer.echo(json.dumps(listed, indent=2))
        return
    if name is None:
        Console().print(presets_table(presets.list()))
        return
    known = {method.name: method for method in presets.list()}
    if name not in known:
        raise ValueError(f"no preset {name!r}; choose from {', '.join(known)}")
    # Plain text without a further line end: the output is meant for a file.
    typer.echo(known[name].function().to_json(), nl=False)


@app.command()
def inspect(
    model_dir: Model,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
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
    """
    if svg is not None:
        check_target(svg, force)
    from deos_fx.cli.outline import costs_of, outline, print_cost, print_outline
    from deos_fx.cli.outline_drawing import outline_chart
    from deos_fx.cli.outline_json import outline_json
    from deos_fx.files import write_text
    from deos_fx.inputs.example import example_inputs

    # Nothing here needs weights, so the model stays on the meta device.
    console = Console()
    model = meta_model(model_dir)
    inputs = example_inputs(model, example_processor(model_dir))
    chosen = policy_of(model, model_dir, policy, preset, budget)
    found = outline(model, inputs, chosen)
    costs = None if chosen is None else costs_of(model, inputs, chosen)
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
            _console().print(f"Wrote {svg}", highlight=False)


@app.command()
def transform(
    model_dir: Model,
    out_dir: Output,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Apply a policy to a model and save both.

    Without --policy and --preset this applies the default policy, at the
    budget or the default one. A policy that the model cannot run is refused before
    anything is loaded or written. ReducedModel.from_pretrained loads the result;
    transformers itself would load the unreduced model from it.

    [bold]Examples[/]

      deos-fx transform my-llava reduced

      deos-fx transform my-llava reduced --policy policy.json

      deos-fx transform my-llava reduced --preset fastv --budget 0.25
    """
    check_target(out_dir, force, model_dir)
    from deos_fx.runtime.saved import folder_for

    with folder_for(out_dir) as folder:
        how = {} if dtype is None else {"dtype": dtype}
        reduced = load_reduced(model_dir, policy, preset, budget, **how)
        reduced.save_pretrained(folder)
        copy_processor(model_dir, folder)
    _console().print(reduced.policy, highlight=False, markup=False, soft_wrap=True)
    _console().print(f"Wrote {out_dir}", highlight=False)


@app.command()
def profile(
    model_dir: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")
    ] = Path("latency.json"),
    runtime: Annotated[str, typer.Option(help="torch or onnxruntime.")] = "torch",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the CPU for torch, else CUDA if any.")
    ] = None,
) -> None:
    """Measure what each decoder layer takes at each number of tokens, on this machine.

    The table limits a search by the latency of this machine and runtime, also on
    another machine: with --latency-table. For onnxruntime the model is exported to a
    temporary folder first.

    [bold]Examples[/]

      deos-fx profile my-llava --runtime onnxruntime --device cuda

      deos-fx search my-llava --data questions.jsonl --latency-ms 20 --latency-table latency.json
    """
    from deos_fx.cli.terminal import profile_table, stages
    from deos_fx.exporters.profile import profile as measure
    from deos_fx.inputs.example import example_inputs

    console = Console()
    # PyTorch runs where the model is; the device of ONNX Runtime is another matter.
    of_model, of_runtime = (device, None) if runtime == "torch" else (None, device)
    with stages(console) as stage:
        with stage("load"):
            model = load_model(model_dir, device=of_model)
            inputs = example_inputs(model, example_processor(model_dir))
        with stage("measure"):
            table = measure(model, inputs, runtime=runtime, device=of_runtime)
    table.save(output)
    console.print(profile_table(table))
    console.print(f"Wrote {output}", highlight=False)


@app.command()
def search(
    model_dir: Model,
    data: DataFile,
    output: OutputOption = Path("deos-fx-search"),
    budget: TokenLimits = None,
    flops: OtherLimit = None,
    kv_cache: OtherLimit = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of the prefill, measured on this machine.")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured elsewhere, by deos-fx profile."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Order of the batches.")] = 0,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE",
            help="A site to consider, as inspect names it; may be given several times. "
            "Default: the projector and the decoder.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the search here, and continue the one found here."),
    ] = None,
    urls: Urls = False,
) -> None:
    """Search a policy for a model and a budget, on your own data.

    With answers the search minimises their loss; without, it stays close to
    the answers of the unreduced model. Ctrl-C ends it early with the best policy
    so far. Writes policy.json and report.html. Without any limit the budget
    is 12.5 % of the visual tokens. Several budgets are searched in one go, and
    policy-0.25.json, ... are written. Several processes share the work if
    accelerate launches them.

    [bold]Examples[/]

      deos-fx search my-llava --data questions.jsonl --budget 12.5%

      deos-fx search my-llava --data questions.jsonl --flops 0.5 --output found

      deos-fx search my-llava --data questions.jsonl --budget 25% --budget 12.5%

      accelerate launch -m deos_fx search my-llava --data questions.jsonl

    A line of questions.jsonl:

      {"image": "images/1.png", "prompt": "What is this?", "answer": "A cat"}
    """
    check_target(output, force, model_dir)
    from deos_fx.cli.searching import limits_of, placed, search_processes, write_found
    from deos_fx.cli.terminal import announced, stages
    from deos_fx.data import batches, read_records
    from deos_fx.data.processors import load_processor
    from deos_fx.passes.search.search import search as run_search

    # Mistakes in the limits and in the data show before the model is loaded.
    limits = limits_of(budget, flops, kv_cache, latency_ms, table=latency_table)
    records = read_records(data, urls=urls)
    with search_processes(output, _console()) as (folder, own, console), stages(console) as stage:
        with stage("load"):
            model = placed(load_model(model_dir, dtype=dtype, device=device), own)
            inputs = list(batches(load_processor(model_dir), records, batch_size))
        with stage.phased("search") as progress:
            result = run_search(
                model,
                inputs,
                **limits,
                steps=steps,
                seed=seed,
                sites=sites,
                checkpoint=checkpoint,
                progress=announced(progress, console),
            )
        names = [] if folder is None else write_found(result, folder, console, len(inputs))
    console.print(f"Wrote {', '.join(names)} and report.html to {output}", highlight=False)


@app.command()
def compare(
    model_dir: Model,
    test: TestFile,
    tune: TuneFile = None,
    output: OutputOption = Path("deos-fx-compare"),
    budget: TokenLimit = "12.5%",
    policy: PolicyFiles = None,
    preset: Presets = None,
    evaluations: Evaluations = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of what is random.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    urls: Urls = False,
) -> None:
    """Compare policies with presets at the same budget, and with the unreduced model.

    Presets, random and uniform pruning among them, are fitted to the budget and,
    with --tune, tuned (pip install 'deos-fx\\[compare]'). Also resizes the image to as
    few tokens where the model allows it, and leaves it out. Answers count as right if
    they are exactly the given ones. Writes comparison.html, .csv, .json and plots.

    [bold]Examples[/]

      deos-fx compare my-llava --test test.jsonl --policy found/policy.json

      deos-fx compare my-llava --test test.jsonl --tune questions.jsonl --evaluations 100

    A line of test.jsonl:

      {"image": "images/1.png", "prompt": "What is this?", "answer": "A cat", "kind": "what"}
    """
    check_target(output, force, model_dir)
    from deos_fx.cli.terminal import comparison_table, stages
    from deos_fx.comparison.compare import compare as run_comparison
    from deos_fx.data import read_records
    from deos_fx.data.processors import load_processor
    from deos_fx.files import fresh_folder
    from deos_fx.policy.budget import Budget

    # Mistakes in the files show before the model is loaded.
    console, policies = _console(), named_policies(policy or [])
    records = read_records(test, urls=urls)
    tuning = None if tune is None else read_records(tune, urls=urls)
    with fresh_folder(output, ("comparison.*",)) as folder, stages(console) as stage:
        with stage("load"):
            processor = load_processor(model_dir)
            model = load_model(model_dir, dtype=dtype, device=device)
        with stage.phased("compare") as progress:
            result = run_comparison(
                model,
                processor,
                records,
                budget=Budget(visual_tokens=budget),
                policies=policies,
                tuning=tuning,
                presets=preset,
                evaluations=evaluations,
                seeds=seeds,
                batch_size=batch_size,
                progress=progress,
            )
        result.save(folder)
    console.print(comparison_table(result))
    for row in result.left_out:
        console.print(f"{row.name}: {row.reason}", highlight=False, markup=False)
    console.print(f"Wrote {output / 'comparison.html'}", highlight=False)


@app.command()
def export(
    model_dir: Model,
    out_dir: Output,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where ONNX Runtime is to be fast: cpu or cuda. Default: cuda for half precision."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Round the weights: int8 or int4. Default: as they are.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Whether to compare ONNX Runtime's logits with PyTorch's.")
    ] = True,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Export a reduced model to ONNX: prefill and decode graphs that include the reductions.

    MODEL_DIR may be a folder that transform wrote; then its policy is used.
    OnnxModel.from_pretrained loads the result.

    [bold]Examples[/]

      deos-fx export my-llava onnx --policy policy.json

      deos-fx export my-llava onnx --preset merge --budget 12.5%

      deos-fx export reduced onnx
    """
    check_target(out_dir, force, model_dir)
    from deos_fx import export_onnx
    from deos_fx.cli.terminal import stages
    from deos_fx.exporters.manifest import FILES
    from deos_fx.files import fresh_folder

    console = _console()
    how = {} if dtype is None else {"dtype": dtype}
    with fresh_folder(out_dir, FILES, whole=True) as folder, stages(console) as stage:
        with stage("load the model"):
            reduced = load_reduced(model_dir, policy, preset, budget, **how)
        with stage.phased("export") as advance:
            export_onnx(
                reduced, folder, device=device, weights=weights, verify=verify, progress=advance
            )
        copy_processor(model_dir, folder)
    console.print(f"Wrote {out_dir}", highlight=False)


@app.command()
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that transform or export wrote.")
    ],
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Remove what killed commands have left in it and beside it."),
    ] = False,
) -> None:
    """Compare every file of a reduced model or an export with its size and hash.

    Reads all files, which loading does only up to 1 GB. The exit code is 1 if
    a file is missing or another one. With --clean, also removes the hidden folders
    (.deos-fx-...) that killed commands have left in the folder and beside it.

    [bold]Examples[/]

      deos-fx check reduced

      deos-fx check onnx --clean
    """
    from deos_fx.cli.checking import check_contents, remove_leftovers
    from deos_fx.contents import RECORD

    console = Console(soft_wrap=True)
    if clean:
        remove_leftovers(folder, console)
        if not (folder / RECORD).exists():
            # Case: a folder that others were to be written in. There is nothing else to check.
            return
    if not check_contents(folder, console):
        raise typer.Exit(1)


# Those that have files of their own.
app.command("data")(data_command)
app.command("eval")(eval_command)
app.command()(show)
app.command()(generate)
