"""Reductions drawn on images: what is bright, what is dark, and that it can be read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from deos_fx.results.drawn import Drawn
from deos_fx.results.explanation import Explanation, SiteExplanation
from deos_fx.results.token_drawing import Move, TokenStep

GRID = (2, 3)
IMAGE = Image.new("RGB", (30, 20), (200, 100, 50))
STEPS = [
    TokenStep("projector", "merge", (0, 1, 2, 3, 4, 5), (0, 2, 4), (Move(1, 0, 1.0),)),
    TokenStep("decoder.1", "prune", (0, 2, 4), (4,), ()),
]
DRAWN = Drawn([IMAGE], [GRID], [STEPS], "what is <b>?")


def panels(drawn: Drawn, height: int = 320) -> list[np.ndarray]:
    """The drawings of a line, without their words: 480 pixels wide, 16 apart."""
    pixels = np.asarray(drawn.to_picture())
    assert pixels.shape[0] == height + 28 + 2 * 16
    return [pixels[16 : 16 + height, x : x + 480] for x in range(16, pixels.shape[1] - 16, 496)]


def test_the_picture() -> None:
    given, merged, pruned = panels(DRAWN)
    assert given.shape == merged.shape == (320, 480, 3)
    assert (given == (200, 100, 50)).all()

    def middle(panel: np.ndarray, patch: int) -> tuple[int, ...]:
        row, column = divmod(patch, 3)
        # Beside the centre, where moves begin and end.
        return tuple(panel[160 * row + 110, 160 * column + 80].tolist())

    bright = {patch for patch in range(6) if middle(merged, patch) == (200, 100, 50)}
    assert bright == {0, 2, 4}
    assert {patch for patch in range(6) if middle(pruned, patch) == (200, 100, 50)} == {4}
    # Those of earlier reductions are darker.
    assert sum(middle(pruned, 1)) < sum(middle(pruned, 0)) == sum(middle(merged, 1))
    # A yellow line from patch 1 to patch 0, and a white frame around patch 0.
    assert (merged[80, 100:220] == (255, 213, 74)).all()
    assert (merged[100, 2:6] == 255).any() and not (merged[100, 162:166] == 255).any()


def test_the_page_is_whole_and_says_what_it_shows() -> None:
    page = DRAWN.to_html()
    assert "<h1>1 of 6 visual tokens left</h1>" in page
    assert "when it was asked: what is &lt;b&gt;?" in page
    drawings = [part.split("</svg>")[0] + "</svg>" for part in page.split("<figure>")[1:]]
    given, merged, pruned = map(ElementTree.fromstring, drawings)
    assert {root.get("viewBox") for root in (given, merged, pruned)} == {"0 0 36 24"}
    assert given.get("aria-label") == "what the model is given"
    assert merged.get("aria-label") == "3 of 6 tokens left after projector"
    kinds = [[rect.get("class") for rect in root.iter("rect")] for root in (merged, pruned)]
    assert [kinds[0].count(kind) for kind in ("gone", "earlier", "kept")] == [3, 0, 3]
    assert [kinds[1].count(kind) for kind in ("gone", "earlier", "kept")] == [2, 3, 1]
    assert "decoder.1: prune 3 → 1" in page


def test_fine_grids_have_no_outlines_and_many_moves_are_faint() -> None:
    moves = tuple(Move(i, 1600, 1.0) for i in range(800))
    step = TokenStep("projector", "merge", tuple(range(1640)), tuple(range(800, 1640)), moves)
    page = Drawn([IMAGE], [(41, 40)], [[step]]).to_html()
    assert 'class="kept"' not in page and 'opacity="0.50"' in page


def test_files(tmp_path: Path) -> None:
    DRAWN.save(tmp_path / "a.html")
    DRAWN.save(tmp_path / "a.png")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == DRAWN.to_html()
    with Image.open(tmp_path / "a.png") as picture:
        assert (np.asarray(picture) == np.asarray(DRAWN.to_picture())).all()
    with pytest.raises(ValueError, match=r"a\.svg: give a name that ends in \.html or \.png"):
        DRAWN.save(tmp_path / "a.svg")


# *** from what explain returns ***


def explained(grids: list[tuple[int, int]]) -> Explanation:
    """Two images of four tokens in each of two prompts; the second and the last one stay."""
    place = torch.tensor([[1, 2, 3, 4, 6, 7, 8, 9], [0, 1, 2, 3, 5, 6, 7, 8]])
    kept = place[:, [1, 7]]
    weights = torch.zeros(2, 2, 8)
    # Token 0 of the first image goes to the second, in the first prompt only.
    weights[0, 0, 0] = 1.0
    site = SiteExplanation("decoder.1", place, kept, place, weights, weights, None, place)
    return Explanation([site], ["merge"], grids)


def test_each_image_of_each_prompt() -> None:
    explanation = explained([(2, 2), (2, 2)])
    (first,), (second,) = explanation.steps(0)
    assert (first.kept, second.kept) == ((1,), (3,))
    assert first.before == second.before == (0, 1, 2, 3)
    assert (first.moves, second.moves) == ((Move(0, 1, 1.0),), ())
    assert explanation.steps(1)[0][0].moves == ()
    drawn = explanation.draw([IMAGE, IMAGE], row=1)
    assert drawn.to_picture().size == (2 * 496 + 16, 2 * (480 + 28 + 16) + 16)
    assert drawn.steps == explanation.steps(1)


def test_without_reductions_the_images_are_drawn() -> None:
    drawn = Explanation([], [], [(2, 3)]).draw([IMAGE])
    assert len(panels(drawn)) == 1 and "6 of 6 visual tokens left" in drawn.to_html()


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="where the visual tokens lie on the image is not known"):
        explained([]).draw([IMAGE])
    with pytest.raises(ValueError, match="^1 image to draw on, but the prompt has 2 "):
        explained([(2, 2), (2, 2)]).draw([IMAGE])
