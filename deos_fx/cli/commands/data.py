"""The command ``deos-fx data``: what a model will see of a file of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deos_fx.cli.console import Console, report_console
from deos_fx.cli.options import Urls
from deos_fx.words import counted

if TYPE_CHECKING:
    from deos_fx.data.preview import Preview

__all__ = ["data"]


def data(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSONL or CSV, or a folder that datasets saved."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL_DIR", help="Whose processor reads it.")
    ],
    rows: Annotated[int, typer.Option(min=0, help="Rows that are shown; all are checked.")] = 3,
    urls: Urls = False,
) -> None:
    """Show what a model will see of your data: text, images, and what it is to answer.

    Every row is read and rendered through the chat template of the model's
    processor, and every image is opened; a wrong row is named with its line.
    Needs no weights. Of a row it shows the text with its special tokens, each
    image as its token and how often that is repeated, and the answer, whose
    tokens are the labels.

    [bold]Examples[/]

      deos-fx data questions.jsonl --model my-llava

      deos-fx data questions.csv --model my-llava --rows 10

    Rows of questions.jsonl:

      {"image": "a.png", "prompt": "What is this?", "answer": "A cat"}

      {"images": ["a.png", "b.png"], "prompt": "Is <image> in <image>?"}

      {"image": "a.png", "messages": [{"role": "user", "content": "..."}, ...]}

    kind, the kind of a question, may stand in all of them; docs/data.md has
    more.
    """
    from deos_fx.cli.loading import checked_processor, meta_model
    from deos_fx.cli.policies import own_policy
    from deos_fx.cli.terminal import stages
    from deos_fx.data import read_records, scaled_processor
    from deos_fx.data.preview import preview
    from deos_fx.inputs.call import Call
    from deos_fx.models.facts import facts_of

    console = Console()
    records = read_records(file, urls=urls)
    processor, own = checked_processor(model), own_policy(model)
    if own is not None:
        # A folder that transform wrote: images as they enter the reduced model.
        processor = scaled_processor(processor, own.image_scale)
    whole = meta_model(model)
    facts = facts_of(whole)

    def read(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return Call.of(facts, inputs).inputs

    seen = []
    with stages(report_console()) as stage, stage("read") as advance:
        for i, record in enumerate(records):
            seen.append(preview(processor, record, facts.image_token, read))
            advance(i + 1, len(records))
    for one in seen[:rows]:
        _print_row(one, console)
    console.print(_totals(seen))


def _print_row(seen: Preview, console: Console) -> None:
    sizes = ", ".join(f"{width} x {height}" for width, height in seen.sizes)
    where = escape(seen.record.where)
    console.print(
        f"[bold]{where}[/]: {counted(len(seen.sizes), 'image')} of {sizes} pixels; "
        f"{counted(seen.tokens(), 'token')}, "
        f"{seen.tokens('image')} of them for images, {seen.tokens('answer')} of the answer",
        highlight=False,
        soft_wrap=True,
    )
    text = Text()
    for piece in seen.pieces:
        if piece.kind == "image":
            text.append(f"{piece.text} x {piece.tokens}", "cyan")
        elif piece.kind == "answer":
            # The marks are for those who see no colours.
            text.append(f">>>{piece.text}<<<", "bold green")
        else:
            text.append(piece.text)
    console.print(text, soft_wrap=True, end="\n\n")


def _totals(seen: Sequence[Preview]) -> Table:
    table = Table(title=counted(len(seen), "row"), box=None, pad_edge=False, title_justify="left")
    for title in ("of a row", "least", "mean", "most"):
        table.add_column(title, justify="left" if title == "of a row" else "right")
    counts = {
        "images": [len(one.sizes) for one in seen],
        "tokens for images": [one.tokens("image") for one in seen],
        "tokens of the answer": [one.tokens("answer") for one in seen],
        "tokens": [one.tokens() for one in seen],
    }
    for name, values in counts.items():
        mean = sum(values) / len(values)
        table.add_row(name, str(min(values)), f"{mean:.4g}", str(max(values)))
    kinds = [kind for kind in dict.fromkeys(one.record.kind for one in seen) if kind]
    others = dict.fromkeys(name for one in seen for name in one.record.extra)
    lists = {"kinds": kinds, "entries that are not used": [*others]}
    lines = [f"{name}: {', '.join(values)}" for name, values in lists.items() if values]
    table.caption, table.caption_justify = escape("\n".join(lines)), "left"
    return table
