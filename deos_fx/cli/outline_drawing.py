"""Draw the outline of a model as one SVG file, from pixels at the top to logits.

The width of the band behind the blocks shows the number of tokens; a reduction narrows it. The file
contains its colours for a light and for a dark page and refers to nothing outside itself.
"""

from __future__ import annotations

import textwrap
from html import escape

from deos_fx.cli.outline import Outline, Row, tokens_of
from deos_fx.words import counted

__all__ = ["outline_chart"]

# Pixels. The flow is in the left column, the notes about it in the right one.
_WIDTH, _MARGIN = 860, 32
_FLOW, _CARD, _BAND = 250, 300, 380
_NOTES, _NOTE_CHARACTERS = 490, 44
_LINE, _GAP = 19, 30
_TITLES = {"vision": "Vision tower", "projector": "Into the prompt", "decoder": "Decoder"}


def outline_chart(found: Outline) -> str:
    """Draw an outline.

    Args:
        found: The outline of a model.

    Returns:
        A complete SVG document.
    """
    drawing = _Drawing(found)
    drawing.head()
    before: Row | None = None
    for row in found.rows:
        # A heading between stages, an arrow between blocks; the funnel of a reduction replaces it.
        if before is None or row.stage != before.stage:
            drawing.stage(row.stage)
        elif before.reduction is None:
            drawing.arrow()
        drawing.blocks(row)
        if row.reduction is not None:
            drawing.cut(row)
        before = row
    drawing.end()
    return drawing.document()


class _Drawing:
    """A drawing that grows from top to bottom; ``y`` is where the next part goes."""

    def __init__(self, found: Outline) -> None:
        self.found = found
        self.most = max([found.visual + found.text, *(row.tokens for row in found.rows)])
        # From back to front.
        self.bands: list[str] = []
        self.cards: list[str] = []
        self.parts: list[str] = []
        self.y = float(_MARGIN)
        self.width = self._width(found.rows[0].tokens)

    def document(self) -> str:
        """Return the drawing as an SVG document."""
        height = self.y + _MARGIN
        label = f"{self.found.name} from pixels to logits"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
            f'width="{_WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(label)}">'
            f"<style>{_STYLE}</style>"
            f'<rect class="paper" width="{_WIDTH}" height="{height:.0f}"/>'
            f"{''.join((*self.bands, *self.cards, *self.parts))}</svg>\n"
        )

    # *** the parts of the drawing, in order ***

    def head(self) -> None:
        """Draw the title, and the image that comes in."""
        found = self.found
        self._text(_MARGIN, self.y + 20, found.name, "title")
        millions = f"{found.parameters / 1e6:,.0f} million parameters"
        text = counted(found.text, "text token")
        prompt = f"One image and {text}; the band is as wide as there are tokens."
        self._text(_MARGIN, self.y + 44, f"{found.family}, {millions}. {prompt}", "soft")
        self.y += 78
        self._pill("image " + " × ".join(str(side) for side in found.pixels if side > 1))

    def stage(self, stage: str) -> None:
        """Draw the heading of a stage."""
        self._strip(_GAP)
        self._text(_NOTES, self.y + _GAP - 8, _TITLES[stage], "stage")
        self.y += _GAP
        self.cards.append(
            f'<line class="rule" x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" '
            f'y1="{self.y:.0f}" y2="{self.y:.0f}"/>'
        )
        self.arrow()

    def blocks(self, row: Row) -> None:
        """Draw one card for like blocks, with its tokens and its site next to it."""
        note = "reduction available" + f" ({row.lacks})" * bool(row.lacks)
        if row.reason:
            note = f"no reduction here: {row.reason}"
        site = textwrap.wrap(note, _NOTE_CHARACTERS)
        # The card is as high as the notes next to it.
        height = max(58.0, 20 + _LINE * (1 + len(site)))
        middle, left = self.y + height / 2, _FLOW - _CARD / 2
        # Blocks that are left out do not change the flow past them.
        if row.used:
            self.width = self._width(row.tokens)
        self._strip(height)
        used = "" if row.used else " unused"
        self.cards.append(
            f'<rect class="card{used}" x="{left:.0f}" y="{self.y:.1f}" width="{_CARD}" '
            f'height="{height:.1f}" rx="10"/>'
        )
        name, kind = row.name, row.module
        kind += f" × {row.count}" * (row.count > 1)
        self._text(_FLOW, middle - 4, name, "name middle")
        self._text(_FLOW, middle + 16, kind, "soft middle")
        top = middle - _LINE * len(site) / 2
        self._text(_NOTES, top + 4, tokens_of(row), "count")
        mark = "no" if row.reason else "yes"
        for i, line in enumerate(site):
            self._text(_NOTES + 16, top + 4 + _LINE * (i + 1), line, f"note {mark}")
        dot = top + 4 + _LINE - 4.5
        self.parts.append(f'<circle class="{mark}" cx="{_NOTES + 5}" cy="{dot:.1f}" r="4.5"/>')
        self.y += height

    def cut(self, row: Row) -> None:
        """Narrow the band to the tokens that a reduction leaves."""
        assert row.reduction is not None
        others = row.tokens - row.visual
        wide, narrow = self._width(row.tokens), self._width(row.left + others)
        height, regime = 46.0, row.reduction.regime
        top, bottom = self.y, self.y + height
        # A funnel, symmetric about the middle of the flow.
        corners = [(-wide, top), (wide, top), (narrow, bottom), (-narrow, bottom)]
        points = " ".join(f"{_FLOW + x / 2:.1f},{y:.1f}" for x, y in corners)
        self.bands.append(f'<polygon class="{regime} funnel" points="{points}"/>')
        middle = top + height / 2
        text = f"{regime}: {row.visual} → {counted(row.left, 'visual token')}"
        self._text(_NOTES, middle + 5, text, f"name {regime}")
        # A dotted line from the wider of funnel and cards to the note.
        self.parts.append(
            f'<line class="lead" x1="{_FLOW + max(wide, _CARD) / 2 + 8:.0f}" x2="{_NOTES - 10}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
        self.width = narrow
        self.y += height

    def arrow(self) -> None:
        """Draw the arrow from one block to the next."""
        self._strip(_GAP)
        tip = self.y + _GAP - 7
        self.parts.append(
            f'<path class="arrow" d="M{_FLOW} {self.y + 5:.1f}V{tip:.1f}m-5 -5l5 5l5 -5"/>'
        )
        self.y += _GAP

    def end(self) -> None:
        """Draw the output."""
        self.arrow()
        self._pill("logits")

    # *** shapes ***

    def _width(self, tokens: int) -> float:
        """Return the width of the band; that of a card if the number of tokens is not known."""
        # In proportion to the tokens, but never too thin to see.
        return 24 + (_BAND - 24) * tokens / self.most if tokens else float(_CARD)

    def _strip(self, height: float) -> None:
        self.bands.append(
            f'<rect class="band" x="{_FLOW - self.width / 2:.1f}" y="{self.y:.1f}" '
            f'width="{self.width:.1f}" height="{height:.1f}"/>'
        )

    def _pill(self, text: str) -> None:
        # SVG cannot measure text; this is its usual width in the font of the page.
        width = 40 + 7.6 * len(text)
        self.parts.append(
            f'<rect class="pill" x="{_FLOW - width / 2:.1f}" y="{self.y:.1f}" width="{width:.1f}" '
            f'height="34" rx="17"/>'
        )
        self._text(_FLOW, self.y + 22, text, "count middle")
        self.y += 34

    def _text(self, x: float, y: float, text: str, kind: str) -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')


# The colours of the report (results/page.py), which tell regimes apart on light and dark paper.
_STYLE = """
svg { --paper: #ffffff; --raised: #f6f7f9; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --accent: #0065a8; --band: #e3eef7; --prune: #c04a00; --merge: #0072b2; --pool: #00805e;
  --reweight: #a8488c; --mixed: #8f6400; }
@media (prefers-color-scheme: dark) { svg { --paper: #14171b; --raised: #1d2127; --ink: #e8ebef;
  --soft: #a2acb8; --line: #3a424c; --accent: #62b5ee; --band: #1c2d3c; --prune: #f0883f;
  --merge: #56b4e9; --pool: #35c79b; --reweight: #dd93c2; --mixed: #e6ac2d; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  fill: var(--ink); }
.paper { fill: var(--paper); } .band { fill: var(--band); }
.card { fill: var(--raised); stroke: var(--line); }
.pill { fill: var(--paper); stroke: var(--soft); }
.title { font-size: 22px; font-weight: 650; } .soft { fill: var(--soft); }
.stage { font-size: 13px; font-weight: 600; fill: var(--soft); letter-spacing: 0.04em; }
.unused { fill: var(--paper); stroke-dasharray: 4 4; }
.name { font-weight: 600; } .count { font-variant-numeric: tabular-nums; }
.middle { text-anchor: middle; } .note { font-size: 13.5px; }
text.yes { fill: var(--pool); } text.no { fill: var(--soft); }
circle.yes { fill: var(--pool); } circle.no { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.rule, .lead { stroke: var(--line); } .lead { stroke-dasharray: 3 3; }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.funnel { opacity: 0.55; }
polygon.prune { fill: var(--prune); } polygon.merge { fill: var(--merge); }
polygon.pool { fill: var(--pool); } polygon.reweight { fill: var(--reweight); }
polygon.mixed { fill: var(--mixed); } text.prune { fill: var(--prune); }
text.merge { fill: var(--merge); } text.pool { fill: var(--pool); }
text.reweight { fill: var(--reweight); } text.mixed { fill: var(--mixed); }
"""
