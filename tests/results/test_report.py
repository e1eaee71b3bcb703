"""Reports: one file that needs nothing else, says what was measured, escapes what it is given."""

import html.parser
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from deos_fx import presets
from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import (
    ModelSignature,
    Policy,
)
from deos_fx.policy.reduction import Reduction
from deos_fx.results.charts import PAINTS, accuracy_chart
from deos_fx.results.explanation import SiteExplanation, token_steps
from deos_fx.results.methods import SEARCHED, UNREDUCED, Method, OnnxCheck, Picture
from deos_fx.results.report import (
    DemoResult,
    demo_report,
)
from deos_fx.results.search_result import Candidate, SearchResult
from deos_fx.results.token_drawing import Move, TokenStep

LAYERS, TOKENS = 6, 64
VOID = {"meta", "br", "rect", "line", "circle", "image", "use", "path", "hr", "link", "img"}
MODEL = ModelSignature(model_type="llava", vision_layers=3, decoder_layers=6, visual_tokens=64)


def cost_of(policy):
    counts, present = [], TOKENS
    cuts = {reduction.site: reduction.count(TOKENS) for reduction in policy.reductions}
    present = cuts.get("projector", present)
    for layer in range(LAYERS):
        counts.append(present)
        present = cuts.get(f"decoder.{layer}", present)
    total = sum(counts)
    return Cost(tuple(counts), total / LAYERS, 1_000_000 * total, 512 * total)


@pytest.fixture
def found():
    policy = Policy(
        (Reduction("projector", 16, gain=1.0), Reduction("decoder.1", 4)), "searched", MODEL
    )
    candidates = [
        Candidate(policy, "step 4", 0.25, cost_of(policy)),
        Candidate(presets.merge(keep=8), "preset merge", 0.5, cost_of(presets.merge(keep=8))),
    ]
    history = [{"step": i, "task": 1 / i, "visual_tokens": 64 / i} for i in range(1, 9)]
    return SearchResult(
        policy, history, candidates, {"visual_tokens": 8.0}, cost_of(Policy()), 0.1, 0.24
    )


@pytest.fixture
def demo(found):
    def method(name, policy, overall):
        accuracy = {"at": overall, "count": overall, "overall": overall}
        return Method(name, policy, cost_of(policy), accuracy)

    step = TokenStep("projector", "merge", tuple(range(64)), (3, 9), (Move(4, 9, 1.0),))
    image = Image.new("RGB", (64, 64), "red")
    answers = {UNREDUCED: "7", SEARCHED: "<5>"}
    return DemoResult(
        limit=8.0,
        search=found,
        methods=[
            method("merge", presets.merge(keep=8), 0.5),
            method(UNREDUCED, Policy(), 0.9),
            method(SEARCHED, found.policy, 0.8),
            Method("fastv", Policy(), cost_of(Policy()), {}, reason="fastv cannot meet it"),
        ],
        tuning=0,
        questions=40,
        grid=(8, 8),
        pictures=[Picture(image, "at", "what is at <top>", "7", answers, [step])],
        onnx=OnnxCheck(32, 31, "cpu", {"prefill.onnx": 2**20}),
        seconds={"search": 2.0, "export": 1.0},
    )


class Nesting(html.parser.HTMLParser):
    """Checks that every element is closed, in order, and that identifiers are unique."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def check_page(text):
    """One well-formed document that loads nothing from anywhere."""
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    targets = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    for target in (a or b for a, b in targets):
        assert target.startswith(("#", "data:")), target
    for target in re.findall(r'(?:href="|url\()#([^")]*)', text):
        assert target in parser.ids
    assert not re.search(r"<script|@import|<link", text)
    for paint in re.findall(r"var\(--([a-z]+)\)", text):
        assert paint in (*PAINTS, "font", "share", "raised")
    assert "#0a0b" not in text, "a placeholder colour was left"
    check_on_a_phone(text)
    check_for_a_screen_reader(text)


def check_on_a_phone(text):
    """At 390 px no text of a chart is below 10 px, and what is wider than the page scrolls."""
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        sizes = [float(size) for size in re.findall(r"font[^;:]*:[^;\"]*?([\d.]+)px", drawing)]
        if sizes:
            width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1])
            least = float(re.search(r"min-width: (\d+)px", drawing)[1])
            assert min(sizes) * max(least, 390 - 2 * 16) / width >= 10
    chart_or_table = r"<table|<svg[^>]*min-width"
    wide = re.findall(rf"(.{{0,90}})(?:{chart_or_table})", text)
    assert all(re.search(r'class="scroll" tabindex="0" role="group" aria-label=', x) for x in wide)


def check_for_a_screen_reader(text):
    """Every drawing says what it shows, and every row of a table has a title."""
    for tag in re.findall(r"<svg[^>]*>", text):
        assert re.search(r'role="img" aria-label="[^"]+"', tag), tag
    for body in re.findall(r"<tbody>(.*?)</tbody>", text, flags=re.DOTALL):
        assert body.count("<tr>") == body.count('<tr><th scope="row"')
    assert len(re.findall(r"<th[ >]", text)) == text.count('<th scope="')
    assert "<img" not in text
    heads = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert heads[0] == 1 and all(b - a <= 1 for a, b in zip(heads, heads[1:], strict=False))


def test_search_report_is_one_whole_page(found, tmp_path):
    found.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    check_page(text)
    assert "projector: keep 16" in text
    assert "preset merge" in text
    assert "gap of +0.01" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_demo_report_is_one_whole_page(demo, tmp_path):
    demo_report(demo, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    check_page(text)
    for words in ("31 / 32", "80.0 %", "90.0 %", "fastv cannot meet it", "data:image/png"):
        assert words in text


def test_words_from_outside_are_escaped(demo, tmp_path):
    demo_report(demo, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "what is at &lt;top&gt;" in text
    assert "&lt;5&gt;" in text
    assert "<top>" not in text


def test_methods_are_ranked_by_accuracy(demo):
    assert [method.name for method in demo.ranked()] == [UNREDUCED, SEARCHED, "merge", "fastv"]
    assert demo.best_preset().name == "merge"


def test_labels_of_many_methods_do_not_overlap():
    # Two far ahead of twenty-two that lie close together.
    shares = [0.94, 0.85, *(0.6 - 0.01 * i for i in range(22))]
    methods = [
        Method(f"way-{i}", presets.merge(keep=8), cost_of(presets.merge(keep=8)), {"overall": x})
        for i, x in enumerate(shares)
    ]
    svg = accuracy_chart(methods, 8.0, 64, 400)
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    places = [float(re.search(rf'y="([\d.]+)"[^>]*>way-{i} ', svg)[1]) for i in range(len(methods))]
    assert all(below - above > 11 for above, below in zip(places, places[1:], strict=False))
    assert 0 < places[0] and places[-1] < height
    # The best keep their place beside their points.
    assert places[0] < height * 0.15


def test_report_without_measured_presets(demo, tmp_path):
    kept = [method for method in demo.methods if method.name != "merge"]
    demo_report(replace(demo, methods=kept), tmp_path / "report.html")
    assert "best hand-designed" not in (tmp_path / "report.html").read_text()


def test_report_into_a_missing_folder_leaves_nothing(found, tmp_path):
    with pytest.raises(OSError):
        found.report(tmp_path / "missing" / "report.html")
    assert not list(tmp_path.iterdir())


def test_token_steps_speak_of_patches():
    # Two rows; the second one's image starts at position 5. Of 4 tokens, 1 and 3 were kept.
    destination = torch.zeros(2, 2, 4)
    destination[:, 0, 0] = 1.0
    destination[:, 1, 2] = 0.9
    destination[:, 0, 2] = 0.1
    explanation = SiteExplanation(
        site="decoder.1",
        positions_in=torch.tensor([[2, 3, 4, 5], [5, 6, 7, 8]]),
        kept=torch.tensor([[3, 5], [6, 8]]),
        dropped=torch.tensor([[2, 4], [5, 7]]),
        destination=destination,
        mass=torch.ones(2, 2),
        scores=None,
        remaining=torch.tensor([[0, 1, 3, 5], [0, 1, 6, 8]]),
    )
    visual = torch.tensor([[2, 3, 4, 5], [5, 6, 7, 8]])
    for row in range(2):
        (step,) = token_steps([explanation], ["merge"], visual[row], row)
        assert step.before == (0, 1, 2, 3)
        assert step.kept == (1, 3)
        # The tenth of token 2 that went to token 1 is not drawn.
        assert [(move.source, move.target) for move in step.moves] == [(0, 1), (2, 3)]


def test_only_the_first_image_is_drawn():
    explanation = SiteExplanation(
        site="projector",
        positions_in=torch.arange(8)[None],
        kept=torch.tensor([[1, 6]]),
        dropped=torch.tensor([[0, 2, 3, 4, 5, 7]]),
        destination=None,
        mass=torch.ones(1, 2),
        scores=None,
        remaining=torch.tensor([[1, 6]]),
    )
    (step,) = token_steps([explanation], ["prune"], torch.arange(4), 0)
    assert (step.before, step.kept, step.moves) == ((0, 1, 2, 3), (1,), ())
