"""What is relied on in other packages is there, or loading says which version lacks it."""

from __future__ import annotations

import pytest
import transformers

from deos_fx.models.upstream import RELIED_ON, Relied, check_upstream


def test_everything_is_there() -> None:
    check_upstream()
    assert len({(owner, name) for owner, name, _ in RELIED_ON}) == len(RELIED_ON)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("transformers.generation.utils:GenerationMixin", "_prepare_tea"),
        ("transformers.generation.utils:TeaMixin", "_prepare_cache_for_generation"),
        ("transformers.kitchen", "_kettle"),
        ("transformers.masking_utils:create_causal_mask", "tea="),
    ],
)
def test_what_is_gone_is_named_with_its_version(owner: str, name: str) -> None:
    found = f"^transformers {transformers.__version__} has no {name} in {owner}.* nobody has tea"
    with pytest.raises(ImportError, match=found):
        check_upstream([*RELIED_ON, Relied(owner, name, "nobody has tea")])
