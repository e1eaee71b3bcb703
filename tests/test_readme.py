"""The Python of README and the guide runs as it is written, on the reference model."""

import contextlib
import functools
import re
from pathlib import Path

import pytest
from in_pytorch import without_tracing

import deos_fx
from deos_fx.passes.search import run as run_module

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/guide.md", 6)])
def test_examples_run(page, count, tmp_path, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == count
    monkeypatch.chdir(tmp_path)
    # The default length of a search is a matter of minutes; its result is tested elsewhere.
    monkeypatch.setattr(deos_fx, "search", functools.partial(deos_fx.search, steps=2))
    monkeypatch.setattr(run_module, "_VARIATIONS", 1)
    names = {}
    # Both export the same; a trace takes half a minute.
    with contextlib.nullcontext() if page == "README.md" else without_tracing():
        for block in blocks:
            exec(compile(block, page, "exec"), names)

    assert (tmp_path / "report.html").stat().st_size > 0
    assert (tmp_path / "kept.png").stat().st_size > 0
    if "comparison" in names:
        assert (tmp_path / "comparison" / "comparison.html").stat().st_size > 0
    inputs, reduced = names["inputs"], names["reduced"]
    expected = reduced.generate(**inputs, max_new_tokens=4)
    assert names["onnx_model"].generate(**inputs, max_new_tokens=4).tolist() == expected.tolist()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
def test_links_lead_somewhere(page):
    page = ROOT / page
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [
        link for link in links if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert not missing
