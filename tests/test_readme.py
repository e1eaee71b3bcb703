"""The Python of README runs as it is written, top to bottom, on the reference model."""

import functools
import re
from pathlib import Path

import deos_fx
from deos_fx.passes.search import run as run_module

README = Path(__file__).resolve().parent.parent / "README.md"


def test_examples_run(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    # The default length of a search is a matter of minutes; its result is tested elsewhere.
    monkeypatch.setattr(deos_fx, "search", functools.partial(deos_fx.search, steps=2))
    monkeypatch.setattr(run_module, "_VARIATIONS", 1)
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)

    assert (tmp_path / "report.html").stat().st_size > 0
    assert (tmp_path / "comparison" / "comparison.html").stat().st_size > 0
    inputs, reduced = names["inputs"], names["reduced"]
    expected = reduced.generate(**inputs, max_new_tokens=4)
    assert names["onnx_model"].generate(**inputs, max_new_tokens=4).tolist() == expected.tolist()
