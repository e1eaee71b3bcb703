"""Settings of every test run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Several workers share the cores: threads of their own would only wait for each other. Set before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What takes longest starts first, so that no worker is left alone with it at the end.
LONGEST = ("test_onnx", "test_onnx_families", "test_readme", "test_search", "test_operator")


def pytest_configure(config: pytest.Config) -> None:
    """Let workers take what shares a costly fixture (`xdist_group`) as a whole, in our order."""
    if config.getoption("dist", "no") == "load":
        config.option.dist = "loadgroup"
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    # Behind the yield pytest-randomly has shuffled; within a file its order stays.
    result = yield
    items.sort(key=_place)
    return result


def _place(item: pytest.Item) -> int:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
