"""Settings of every test run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Several workers share the cores: threads of their own would only wait for each other. Set before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What takes longest starts first, so that no worker is left alone with it at the end.
LONGEST = (
    "test_onnx",
    "test_onnx_families",
    "test_readme",
    "test_search",
    "test_compare",
    "test_quantise",
    "test_recorded",
)
# One worker gets all of these tests, since what they share takes long: exports, a search.
TOGETHER = (
    "test_onnx",
    "test_onnx_families",
    "test_elastic",
    "test_search",
    "test_compare",
    "test_evaluate",
    "test_quantise",
)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    # Behind the yield pytest-randomly has shuffled; within a file its order stays.
    result = yield
    items.sort(key=_place)
    return result


def _place(item: pytest.Item) -> int:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        """Files of TOGETHER as a whole, all other tests one by one."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).stem in TOGETHER else nodeid

    if config.getoption("dist") != "load":
        return None
    # In our order, not by how many tests there are.
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def examples() -> Any:
    """Three questions about scenes of the reference model."""
    from deos_fx import reference

    return reference.make_examples(3, "validation")


@pytest.fixture
def questions(tmp_path: Path, examples: Any) -> Path:
    """A JSONL file of reference questions with answers."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, example in enumerate(examples):
        example.scene.image.save(folder / f"{i}.png")
        question = example.question
        line = {"image": f"{i}.png", "prompt": question.text, "answer": question.answer}
        lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"
