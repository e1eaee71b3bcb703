"""Which families work, found out by running the checks on tiny models: writes docs/families.md.

python tests/support_table.py docs/families.md --onnx

With names of families after the page, only these are checked, and the rows of the others stay.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import test_families as checks
import torch
import transformers as hf
from families import FAMILIES, STATEFUL, TWINS, prompts, shared
from tiny import call_of
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from deos_fx.files import write_text
from deos_fx.models.facts import facts_of
from deos_fx.models.families import FORMER_IMAGES
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.site import split_site

__all__ = ["COLUMNS", "family_row", "main", "refused"]

COLUMNS = ("family", "class", "sites", "no reduction", "generate", "batch", "ONNX")
HEAD = """# Families

What works with which family of transformers. `tests/support_table.py` wrote this page and ran every
check on the tiny models of `tests/families.py` (random weights, CPU): do not edit it, run

```sh
{command}
```

{date}, torch {torch}, transformers {transformers}, Python {python}.

| column | what was checked |
| --- | --- |
| sites | Where visual tokens can be reduced. The reason why a vision tower has no site is below. |
| no reduction | With an empty policy, logits and new tokens are bit-identical to the model's. |
| generate | Reduced at the projector and in the decoder, prefill and new tokens are those of the \
original with the dropped tokens masked as keys. *: layers with a state have no keys to mask; here \
the original's own layers run over what is kept. |
| batch | Each row of a padded batch gets what it gets alone. |
| ONNX | Exported to ONNX, ONNX Runtime generates the same tokens for other prompts. |

"""


def main() -> None:
    """Run the checks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("families", nargs="*", help="Check only these; other rows stay.")
    parser.add_argument("--onnx", action="store_true", help="Export every family: half an hour.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes at a time.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.families or sorted(FAMILIES | TWINS)
    known = _tables_of(given.output.read_text()) if given.families else [[], []]
    with ProcessPoolExecutor(given.jobs) as pool:
        others = pool.submit(_all_refused)
        rows = pool.map(partial(family_row, onnx=given.onnx), names)
        towers = pool.map(_why_not_in_tower, names)
        rows = [_shown(row) for row in rows]
        reasons = [(name, why) for name, why in zip(names, towers, strict=True) if why]
        rows, reasons = (
            sorted([*new, *(row for row in old if row[0] not in names)])
            for new, old in zip((rows, reasons), known, strict=True)
        )
        messages = others.result()
    head = HEAD.format(
        command=f"python tests/support_table.py {given.output}" + " --onnx" * given.onnx,
        date=datetime.now(UTC).date().isoformat(),
        torch=torch.__version__,
        transformers=hf.__version__,
        python=platform.python_version(),
    )
    parts = [head, _table(COLUMNS, rows)]
    parts += ["\n## No sites in the vision tower\n\n", _table(("family", "reason"), reasons)]
    parts += ["\n## Refused\n\nBefore any compute, with this message:\n\n"]
    parts += [_table(("family", "message"), messages)]
    write_text(given.output, "".join(parts))


def family_row(name: str, *, onnx: bool = False) -> tuple[str, ...]:
    """What the checks find for one family, in the order of `COLUMNS`.

    Args:
        name: A family of `families`.
        onnx: Whether to export it.
    """
    prune: Callable[[], Any] = lambda: checks.test_pruning_is_masking(name, "both")  # noqa: E731
    mark = ""
    if name in STATEFUL:
        mark = " *"
        prune = lambda: checks.test_dropped_tokens_are_not_in_the_sequence(name, "both")  # noqa: E731
    return (
        name,
        type(shared(name)).__name__,
        _sites(name),
        _result(lambda: checks.test_the_empty_policy_is_bit_identical(name)),
        _result(prune) + mark,
        _result(lambda: checks.test_rows_of_a_batch_are_independent(name, "both")),
        _onnx(name) if onnx else "not run",
    )


def refused() -> Iterator[tuple[str, str]]:
    """Families of transformers that are refused, with the reason; each as its config makes it."""
    for family, kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if family in FAMILIES | TWINS:
            # Case: it was checked, with a config that says more than the default one.
            continue
        try:
            with torch.device("meta"):
                model = getattr(hf, kind)(hf.AutoConfig.for_model(family))
        except Exception:  # noqa: BLE001 - its default config is not of any model
            continue
        try:
            facts_of(model)
        except ValueError as error:
            yield family, _line(error)


def _all_refused() -> list[tuple[str, str]]:
    return list(refused())


def _shown(row: tuple[str, ...]) -> tuple[str, ...]:
    print(*row, sep=" | ", flush=True)
    return row


def _result(check: Callable[[], Any]) -> str:
    """``yes``, or what failed."""
    try:
        check()
    except Exception as error:  # noqa: BLE001 - whatever fails is the finding
        return f"fails: {_line(error)}"
    return "yes"


def _onnx(name: str) -> str:
    from onnx_families import check_onnx

    try:
        return _line(check_onnx(name))
    except Exception as error:  # noqa: BLE001
        return f"fails: {_line(error)}"


def _line(said: Any) -> str:
    """The first line of a message, fit for a cell."""
    text = str(said).strip() or type(said).__name__
    return text.splitlines()[0].replace("|", "/")


def _captured_sites(name: str) -> Any:
    batch = {
        "pixel_values" if given in FORMER_IMAGES else given: value
        for given, value in prompts(name).items()
    }
    inputs = call_of(shared(name), batch | {"use_cache": False}).inputs
    return capture_call(shared(name), inputs).sites


def _sites(name: str) -> str:
    """``vision.0 to 1, projector, decoder.0 to 3``."""
    numbers: dict[str, list[int]] = {}
    try:
        available = _captured_sites(name).available()
    except Exception as error:  # noqa: BLE001 - whatever fails is the finding
        return f"fails: {_line(error)}"
    for site in available:
        stage, number = split_site(site.name)
        numbers.setdefault(stage, []).append(number)
    named = []
    for stage, found in numbers.items():
        whole = found == list(range(found[0], found[-1] + 1))
        some = f"{found[0]} to {found[-1]}" if whole and len(found) > 1 else str(found).strip("[]")
        named.append(stage if stage == "projector" else f"{stage}.{some}")
    return ", ".join(named)


def _why_not_in_tower(name: str) -> str:
    """Why no vision block has a site; empty if one has."""
    try:
        sites = _captured_sites(name).sites
    except Exception:  # noqa: BLE001 - its row says so
        return ""
    tower = [site for site in sites if site.name.startswith("vision")]
    if any(site.available for site in tower):
        return ""
    return "; ".join(dict.fromkeys(site.reason for site in tower)) or "no blocks are known in it"


def _tables_of(page: str) -> list[list[tuple[str, ...]]]:
    """The rows of the tables of families and of reasons, as a former run wrote them."""
    families, reasons, _ = page.split("\n## ")
    # Before the table of families there is the one of columns.
    tables = families.rpartition("\n\n")[2], reasons.rpartition("\n\n")[2]
    return [[tuple(line[2:-2].split(" | ")) for line in table.splitlines()[2:]] for table in tables]


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
