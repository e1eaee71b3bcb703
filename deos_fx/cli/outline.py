"""Outline a model: its blocks from pixels to logits, with like blocks folded into one row.

The model is captured on the meta device, so the outline shows what a reduction would meet, and a
large model takes no more time than a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from deos_fx.cost.amounts import CostReport
from deos_fx.cost.model import CostModel
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.blocks import Block
from deos_fx.models.facts import facts_of
from deos_fx.passes.analyse.sites import Encoder, Sites
from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.passes.pipeline import Captured, capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.words import counted

__all__ = [
    "Outline",
    "Row",
    "costs_of",
    "outline",
    "print_cost",
    "print_outline",
    "tokens_of",
]


# *** the outline ***


@dataclass(frozen=True)
class Row:
    """Consecutive blocks of one kind, and the sites after them.

    Attributes:
        stage: ``vision``, ``projector`` or ``decoder``.
        first: Number of the first block; without meaning at the projector.
        last: Number of the last block.
        module: Class of the blocks.
        tokens: Tokens that go through each block, per prompt; 0 where they are not known.
        visual: How many of these are visual tokens.
        reason: Why the sites are not available; empty if they are.
        scores: Scores that can be computed there.
        lacks: Why these are fewer than at other sites of the stage; empty if they are not.
        used: Whether the language model reads the output of the blocks.
        reduction: The reduction of a policy after the last block, if there is one.
        left: Visual tokens that this reduction leaves.
    """

    stage: str
    first: int
    last: int
    module: str
    tokens: int
    visual: int
    reason: str
    scores: tuple[str, ...]
    lacks: str = ""
    used: bool = True
    reduction: Reduction | None = None
    left: int = 0

    @property
    def name(self) -> str:
        """Return the name of the row, such as ``decoder.0 to 31``."""
        if self.stage == "projector":
            return "projector"
        numbers = dict.fromkeys((self.first, self.last))
        return f"{self.stage}.{' to '.join(map(str, numbers))}"

    @property
    def count(self) -> int:
        """Return the number of blocks."""
        return self.last - self.first + 1

    def follows(self, other: Row) -> bool:
        """Return whether this row continues another one and can be folded into it."""
        # Alike in everything but their numbers. A reduction ends a row, so only the later one may
        # have any.
        same = replace(other, first=self.first, last=self.last)
        return same == replace(self, reduction=None, left=0) and self.stage != "projector"


@dataclass(frozen=True)
class Outline:
    """A model from pixels to logits, for a prompt with one image.

    Attributes:
        name: Class of the model.
        family: Its model type.
        parameters: Number of its parameters.
        pixels: Shape of the image, or of its patches, as the model takes it.
        visual: Visual tokens of the image.
        grid: Their rows and columns, in each tile if there are several; (0, 0) where these depend
            on the image's size.
        ends: Ends of its rows, which are never reduced and count as text.
        text: Tokens of text in the prompt.
        rows: Its blocks, from pixels to logits.
        policy: The policy that the rows' reductions belong to.
    """

    name: str
    family: str
    parameters: int
    pixels: tuple[int, ...]
    visual: int
    grid: tuple[int, int]
    ends: int
    text: int
    rows: tuple[Row, ...]
    policy: Policy


def outline(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], policy: Policy | None = None
) -> Outline:
    """Capture a model and fold its like blocks into rows.

    Args:
        model: A vision-language model; it may be on the meta device.
        inputs: A prompt with one image.
        policy: The reductions to show; none if None.

    Returns:
        The outline.

    Raises:
        ValueError: If the model cannot be captured, or the policy does not fit it.
    """
    # No cache: its keys would only add inputs and outputs to the graph.
    policy = policy or Policy()
    facts = facts_of(model)
    call = Call.of(facts, {**inputs, "use_cache": False})
    captured = capture_call(model, completed(call).inputs)
    layout = call.layout
    visual = sum(layout.sizes)
    text = call.inputs["input_ids"].shape[1] - visual
    rows: list[Row] = []
    for row in _with_policy(call, policy, _rows(model, captured, visual, text)):
        if rows and row.follows(rows[-1]):
            # Fold: the later row has the reduction, the earlier one the first number.
            rows[-1] = replace(row, first=rows[-1].first)
        else:
            rows.append(row)
    return Outline(
        name=facts.name,
        family=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pixels=tuple(call.inputs["pixel_values"].shape),
        visual=visual,
        grid=facts.grid,
        ends=layout.separators,
        text=text,
        rows=tuple(rows),
        policy=policy,
    )


def tokens_of(row: Row) -> str:
    """Describe in words the tokens that go through the blocks of a row."""
    # Text in the decoder, class tokens in the tower.
    others = row.tokens - row.visual
    if not row.used:
        return "left out"
    # Case: inside an encoder that is one node of the graph.
    if not row.tokens:
        return "as many tokens as the image has patches"
    if row.stage == "projector":
        return counted(row.visual, "visual token")
    if row.stage == "decoder":
        return f"{counted(row.tokens, 'token')}: {row.visual} visual, {others} text"
    parts = f"{counted(row.visual, 'patch', 'patches')}, {counted(others, 'class token')}"
    return counted(row.tokens, "token") + f": {parts}" * bool(others)


def _rows(model: PreTrainedModel, captured: Captured, visual: int, text: int) -> Iterator[Row]:
    """Yield one row for each block, and one for the projector."""
    # A block is in the graph under the name of its site's node, unless nothing reads its output.
    graph, sites = captured.graph_module.graph, captured.sites
    assert sites is not None, "the inputs have an image"
    nodes = {node.name: node for node in graph.nodes}
    modules = note_of_graph(captured.graph_module).blocks
    for site in sites.sites:
        stage, number = split_site(site.name)
        if stage == "projector":
            # Case: the projector, which is no block.
            kind = _projector(model, captured, sites)
            yield Row(stage, 0, 0, kind, visual, visual, site.reason, site.scores, site.lacks)
            continue
        # The tokens of a vision block are known only if the graph shows the inside of the tower.
        tokens, share = (text + visual, visual) if stage == "decoder" else (0, 0)
        node = nodes.get(site.node)
        if stage == "vision" and node is not None and sites.encoder is Encoder.PATCHWISE:
            tokens = note_of(node).shape[-2]
            share = tokens - sites.class_tokens
        kind = type(modules[Block(stage, number)]).__name__
        used = site.node in nodes or sites.encoder is Encoder.OPAQUE
        about = site.reason, site.scores, site.lacks
        yield Row(stage, number, number, kind, tokens, share, *about, used)


def _projector(model: PreTrainedModel, captured: Captured, sites: Sites) -> str:
    """Return the class of the module that projects the tower's output to the text's width."""
    # Case: the encoder is one node, and its projector is not in the graph.
    if sites.encoder is Encoder.OPAQUE:
        return _last_named(model)
    graph_module = captured.graph_module
    # Case: its module is in the graph.
    node = next(node for node in graph_module.graph.nodes if node.name == sites.features)
    # Go back from the features to the module that made them.
    while node.op != "call_module" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "call_module":
        # Case: features that are computed by plain operations alone.
        return _last_named(model)
    return type(graph_module.get_submodule(str(node.target))).__name__


def _last_named(model: PreTrainedModel) -> str:
    """Return the class of a module named like a projector; ``image features`` if there is none."""
    names = ("multi_modal_projector", "connector", "merger", "projector", "aligner")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and isinstance(module, nn.Module):
            return type(module).__name__
    return "image features"


def _with_policy(call: Call, policy: Policy, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows with the tokens that a policy leaves in each."""
    if policy.is_empty:
        yield from rows
        return
    # Patches in each vision block, tokens in each layer, and what is kept at each site.
    costs: Any = CostModel.of_call(call)
    patches, layers = costs.patches(policy), costs.counts(policy)
    whole = costs.tokens_per_image
    kept = dict(
        zip(
            (step.site for step in policy.reductions),
            zip(policy.reductions, policy.counts(whole), strict=True),
            strict=True,
        )
    )
    left = visual = whole
    for row in rows:
        # What comes into the block: in the projector, what the last vision block left of all tiles.
        if row.stage == "decoder":
            visual = layers[row.first]
        elif row.stage == "projector":
            visual = left * costs.images
        elif row.visual and row.first < len(patches):
            visual = patches[row.first]
        # A row whose tokens are not known has none to remove.
        gone = (row.visual - visual) if row.visual else 0
        row = replace(row, tokens=row.tokens - gone, visual=row.visual - gone)
        if row.name in kept:
            reduction, left = kept[row.name]
            # In the tower rows show one tile, behind it a prompt.
            visual = left * (1 if row.stage == "vision" else costs.images)
            row = replace(row, reduction=reduction, left=visual)
        yield row


# *** printing it ***


_STAGES = ("vision", "projector", "decoder")


def print_outline(found: Outline, console: Console) -> None:
    """Print a model's blocks, token spaces and sites, from pixels to logits.

    Args:
        found: The outline of the model.
        console: The console to print on.
    """
    size = f"{found.parameters / 1e6:,.1f} million parameters"
    console.print(f"[bold]{found.name}[/] ({found.family}), {size}", highlight=False)
    rows, columns = found.grid
    tiles = found.visual // (rows * columns) if rows else 0
    # Case: an image that its processor cuts into tiles.
    several = f"{tiles} tiles of " if tiles > 1 else ""
    grid = f" ({several}{rows} x {columns})" if rows else "; images of other sizes have others"
    ends = f" and {counted(found.ends, 'end')} of rows" if found.ends else ""
    console.print(f"{counted(found.visual, 'visual token')}{ends} an image{grid}", highlight=False)
    # Reasons are long and shared by many rows: rows refer to them by number.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("blocks", no_wrap=True, style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("visual", justify="right")
    table.add_column("site")
    notes = (row.reason or row.lacks for row in found.rows)
    reasons = list(dict.fromkeys(note for note in notes if note))
    for row, following in zip(found.rows, (*found.rows[1:], None), strict=True):
        last = following is None or following.stage != row.stage
        site = "no" if row.reason else "[green]available[/]"
        if note := row.reason or row.lacks:
            site += f" ({reasons.index(note) + 1})"
        numbers = [str(count) if count else "-" for count in (row.tokens, row.visual)]
        module = f"{row.module} x {row.count}" if row.count > 1 else row.module
        cut = row.reduction
        table.add_row(row.name, module, *numbers, site, end_section=last and cut is None)
        if cut is not None:
            left = f"[bold]-> {row.left}[/]"
            table.add_row(f"  [cyan]{cut.regime}[/]", "", "", left, "", end_section=last)
    console.print(table)
    for i, reason in enumerate(reasons):
        console.print(f" ({i + 1}) {reason}", highlight=False)
    console.print(_scores(found))


def _scores(found: Outline) -> Table:
    """Make a table of the scores that can be computed at each stage."""
    known = {
        stage: dict.fromkeys(
            score for row in found.rows if row.stage == stage for score in row.scores
        )
        for stage in _STAGES
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("scores", overflow="fold")
    for stage in _STAGES:
        table.add_column(stage, justify="center")
    # Scores that are available at the same stages share a row.
    groups: dict[tuple[bool, ...], list[str]] = {}
    for score in dict.fromkeys(score for stage in reversed(_STAGES) for score in known[stage]):
        groups.setdefault(tuple(score in known[stage] for stage in _STAGES), []).append(score)
    for places, names in groups.items():
        table.add_row(", ".join(names), *("[green]yes[/]" if place else "-" for place in places))
    return table


def costs_of(
    model: PreTrainedModel,
    whole: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    policy: Policy,
) -> CostReport:
    """Compute the total cost of a policy, next to that of the unreduced model.

    Args:
        model: A vision-language model.
        whole: A prompt with one image of full size.
        inputs: The same, with the image as it enters under the policy.
        policy: A policy for it.

    Raises:
        ValueError: If the policy does not fit the model.
    """
    before = after = CostModel.of_call(Call.of(facts_of(model), whole))
    if inputs is not whole:
        after = CostModel.of_call(Call.of(facts_of(model), inputs))
    return CostReport(before=before.predict(Policy()), after=after.predict(policy))


def print_cost(policy: Policy, costs: CostReport, console: Console) -> None:
    """Print the total cost of a policy, next to that of the unreduced model.

    Args:
        policy: The policy.
        costs: Its cost.
        console: The console to print on.
    """
    before, after = costs.before, costs.after
    console.print(policy, highlight=False, markup=False, soft_wrap=True)
    totals = Table("", "before", "after", "ratio", title="Cost of the prefill", box=box.SIMPLE_HEAD)
    names = ("visual tokens, mean", "GFLOPs", "KV cache, KiB")
    for name, whole, left in zip(names, before.in_units, after.in_units, strict=True):
        totals.add_row(name, f"{whole:,.4g}", f"{left:,.4g}", f"{left / whole:.1%}")
    console.print(totals)
