"""Build the page of a report: one HTML file with its style, drawings and images inside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Section", "build_page", "details", "standalone", "table", "tiles"]


class Section:
    """A part of a page: a heading, a caption that explains what is shown, and the content."""

    def __init__(self, heading: str, caption: str, *content: str) -> None:
        self.heading = heading
        self.caption = caption
        self.content = content

    def html(self) -> str:
        """Return the section as HTML; the content is HTML already, heading and caption are text."""
        # A chart is as wide as its text needs, so it scrolls on a phone.
        parts = [
            _scrolling("chart", part) if part.startswith("<svg") else part for part in self.content
        ]
        return (
            f"<section><h2>{escape(self.heading)}</h2>"
            f'<p class="caption">{escape(self.caption)}</p>{"".join(parts)}</section>'
        )


def _scrolling(kind: str, content: str) -> str:
    """Wrap what may be wider than the page; who has no mouse scrolls it by keys."""
    label = f"{kind}, scrolls sideways"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{content}</div>'


def build_page(
    title: str, lead: str, figures: str, sections: Iterable[Section], command: str
) -> str:
    """Put a page together.

    Args:
        title: Title of the page.
        lead: The result in a sentence or two.
        figures: The result in figures, as HTML.
        sections: The sections, in order.
        command: The command line that made the page.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_ROOT}{_STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{figures}</header>'
        f"{''.join(section.html() for section in sections)}"
        f"<footer>Made by <code>{escape(command)}</code></footer></main></body></html>\n"
    )


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Lay out large figures in a row: each a value, its name and a remark."""
    parts = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(remark)}</small></div>"
        for value, name, remark in items
    )
    return f'<div class="tiles">{"".join(parts)}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", kind: str = "numbers"
) -> str:
    """Make a table from cells that are HTML already, ``<td>`` included, and a plain-text head.

    Args:
        head: Titles of the columns.
        rows: Cells of every row; the first one names the row.
        note: A remark below.
        kind: ``numbers``, ``listing`` if the last column is words, or ``narrow``.

    Returns:
        HTML.
    """
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(f"<tr>{_row_title(row[0])}{''.join(row[1:])}</tr>" for row in rows)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    whole = f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    return _scrolling("table", f'<table class="{kind}">{whole}</table>') + below


def _row_title(cell: str) -> str:
    """Turn the first cell of a row into its title, which screen readers say with every other."""
    return f'<th scope="row"{cell.removeprefix("<td").removesuffix("</td>")}</th>'


def details(summary: str, text: str) -> str:
    """Make preformatted text that opens at a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

# Name -> colour on a light and on a dark page. Those of the regimes are Okabe and Ito's set, which
# the colour-blind can tell apart, darkened or lightened where the background requires it.
_COLORS = {
    "paper": ("#ffffff", "#14171b"),
    "raised": ("#f6f7f9", "#1d2127"),
    "ink": ("#1b1f24", "#e8ebef"),
    "soft": ("#59636e", "#a2acb8"),
    "line": ("#d5dae0", "#353c45"),
    "accent": ("#0065a8", "#62b5ee"),
    "prune": ("#c04a00", "#f0883f"),
    "merge": ("#0072b2", "#56b4e9"),
    "pool": ("#00805e", "#35c79b"),
    "reweight": ("#a8488c", "#dd93c2"),
    "mixed": ("#8f6400", "#e6ac2d"),
}


def _variables(shade: int) -> str:
    return " ".join(f"--{name}: {colors[shade]};" for name, colors in _COLORS.items())


def standalone(drawing: str) -> str:
    """Return a drawing of a page as a file of its own, with the colours of a light page."""
    for name, (light, _) in _COLORS.items():
        drawing = drawing.replace(f"var(--{name})", light)
    drawing = drawing.replace("var(--font)", _FONT.replace('"', "'"))
    return drawing + "\n"


_ROOT = f""":root {{ color-scheme: light dark; --font: {_FONT}; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
"""

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--font); }
h1, h2, p, footer { overflow-wrap: anywhere; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 52px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 16px; margin: 0; } section > .scroll { margin-top: 16px; }
.lead { font-size: 18px; color: var(--soft); margin: 0; max-width: 52em; }
.caption { color: var(--soft); margin: 0 0 16px; max-width: 56em; }
.note, footer, small { color: var(--soft); font-size: 13px; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px; }
pre { background: var(--raised); padding: 12px 16px; border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin-top: 10px; }
svg { display: block; width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 28px 0 0; }
.tile { background: var(--raised); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 27px; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; } .tile small { display: block; }
/* Where something is hidden at a side, there is a shade, which moves with the page. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 40px 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); padding: 6px 8px;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
td { text-align: right; padding: 6px 8px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 8px; }
tbody th { font-weight: inherit; color: inherit; white-space: nowrap; vertical-align: middle; }
table.listing th:last-child { text-align: left; } table.narrow { max-width: 420px; }
td.words { text-align: left; white-space: normal; min-width: 16em; color: var(--soft); }
td.shade { background: color-mix(in srgb, var(--accent) calc(var(--share) * 42%),
  transparent); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.pairs, .rows { display: grid; gap: 16px; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.example { border: 1px solid var(--line); border-radius: 12px; padding: 16px; }
.example p { margin: 2px 0 12px; color: var(--soft); }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr));
  gap: 14px; }
.strip.wide { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.strip svg { border-radius: 6px; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; }
.answers { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 12px; font-size: 14px; }
.right::before { content: "\\2713\\00a0"; color: var(--pool); font-weight: 700; }
.wrong::before { content: "\\2717\\00a0"; color: var(--prune); font-weight: 700; }
.tokens .gone { fill: #05070a; opacity: 0.72; } .tokens .earlier { fill: #05070a; opacity: 0.86; }
.tokens rect { shape-rendering: crispEdges; }
.tokens .kept { fill: none; stroke: #ffffff; stroke-width: 0.9; }
.tokens line { stroke: #ffd54a; stroke-width: 0.8; stroke-linecap: round; }
.tokens circle { fill: #ffd54a; }
@media (max-width: 480px) { main { padding: 28px 16px 40px; } h2 { margin-top: 40px; } }
@media print { section { break-inside: avoid; } }
"""
