"""Which families work, found out by running the checks on tiny models: writes docs/families.md.

python tests/support_table.py docs/families.md --onnx

With names of families after the page, only these are checked, and the rows of the others stay.
Without --onnx, cells of that column stay as they are.
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
from closeness import roundings_of
from families import FAMILIES, REFUSED, STATEFUL, STOOD_IN, TWINS, prompts, shared
from masked import assert_pruning_is_masking
from tiny import call_of
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from deos_fx.files import write_text
from deos_fx.models.blocks import image_tower
from deos_fx.models.facts import facts_of
from deos_fx.models.families import FORMER_IMAGES, WRITER
from deos_fx.passes.analyse.sites import Encoder
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.site import split_site

__all__ = ["COLUMNS", "family_row", "main", "refused"]

COLUMNS = (
    *("family", "class", "tower", "hybrid", "sites", "no reduction", "generate", "batch"),
    "ONNX",
)
_NOT_RUN = "not run"
HEAD = """# Families

What works with which family of transformers. `tests/support_table.py` wrote this page and ran every
check on the tiny models of `tests/families.py` (random weights, CPU): do not edit it, run

```sh
{command}
```

{date}, torch {torch}, transformers {transformers}, Python {python}.{former}

| column | what was checked |
| --- | --- |
| tower | After which blocks of the vision tower visual tokens can be reduced, by number, and what \
each is there: a single patch, or a group of patches that make a token. None: why not. |
| hybrid | Which layers of the decoder keep a state, by number, beside keys and values or in their \
place. |
| sites | Where else visual tokens can be reduced. |
| no reduction | With an empty policy, logits and new tokens are bit-identical to the model's. |
| generate | Reduced at the projector and in the decoder, prefill and new tokens are those of the \
original with the dropped tokens masked as keys. *: layers with a state have no keys to mask; here \
the original's own layers run over what is kept. |
| batch | Each row of a padded batch gets what it gets alone. Where padding changes what the \
original says: rows get what that says there with the dropped tokens masked. |
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
    run_here = (FAMILIES | TWINS).keys() - REFUSED - STOOD_IN
    names = given.families or sorted(run_here)
    known = _rows_of(given.output.read_text()) if given.output.exists() else {}
    with ProcessPoolExecutor(given.jobs) as pool:
        others = pool.submit(_all_refused)
        made = pool.map(partial(family_row, onnx=given.onnx), names)
        rows = known | {row[0]: _with_former_cells(_shown(row), known) for row in made}
        messages = others.result()
    head = HEAD.format(
        command=f"python tests/support_table.py {given.output}" + " --onnx" * given.onnx,
        date=datetime.now(UTC).date().isoformat(),
        torch=torch.__version__,
        transformers=hf.__version__,
        python=platform.python_version(),
        former=_former(sorted(rows.keys() - run_here)),
    )
    parts = [head, _table(COLUMNS, [rows[name] for name in sorted(rows)])]
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
        *_places(name),
        _result(lambda: checks.test_the_empty_policy_is_bit_identical(name)),
        _result(prune) + mark,
        _batch(name),
        _onnx(name) if onnx else _NOT_RUN,
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


def _batch(name: str) -> str:
    """The cell ``batch``."""
    found = _result(lambda: checks.test_rows_of_a_batch_are_independent(name, "both"))
    whole = shared(name)
    if found == "yes" or _result(lambda: checks.assert_rows_are_independent(name, whole)) == "yes":
        return found
    # Case: the original model answers otherwise in a padded batch.
    same = _result(
        lambda: assert_pruning_is_masking(
            whole, checks.reduce(name, checks.PRUNED["both"]), prompts(name, 2), roundings_of(name)
        )
    )
    return "as the original: padding changes what it says" if same == "yes" else found


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


def _places(name: str) -> tuple[str, str, str]:
    """The cells ``tower``, ``hybrid`` and ``sites``."""
    hybrid = _hybrid(shared(name))
    try:
        sites = _captured_sites(name)
    except Exception as error:  # noqa: BLE001 - whatever fails is the finding
        return ("", hybrid, f"fails: {_line(error)}")
    numbers: dict[str, list[int]] = {"vision": []}
    for site in sites.available():
        stage, number = split_site(site.name)
        numbers.setdefault(stage, []).append(number)
    found = numbers.pop("vision")
    token = "groups" if sites.encoder is not Encoder.PATCHWISE else "patches"
    tower = f"{_ranges(found)}: {token}" if found else f"none: {_why_not_in_tower(name, sites)}"
    named = (
        stage if stage == "projector" else f"{stage}.{_ranges(numbers[stage])}" for stage in numbers
    )
    return tower, hybrid, ", ".join(named)


def _hybrid(model: Any) -> str:
    """Which decoder layers keep a state: ``0, 2 to 4``; empty if none does."""
    cache = hf.DynamicCache(config=model.config.get_text_config(decoder=True))
    return _ranges(
        [i for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")]
    )


def _ranges(numbers: list[int]) -> str:
    """``0, 2 to 4`` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ends = (sorted({run[0], run[-1]}) for run in runs)
    return ", ".join(" to ".join(map(str, run)) for run in ends)


def _why_not_in_tower(name: str, sites: Any) -> str:
    """Why no vision block has a site."""
    reasons = (site.reason for site in sites.sites if site.name.startswith("vision"))
    return "; ".join(dict.fromkeys(reasons)) or _why_no_blocks(shared(name))


def _why_no_blocks(model: Any) -> str:
    """Why no blocks of a vision tower are known."""
    if hasattr(model.base_model, WRITER):
        return "the module that writes images into the prompt runs the tower inside"
    tower = image_tower(model)
    if tower is None:
        return "there is no tower of transformer blocks"
    attends = any("attention" in type(part).__name__.lower() for part in tower.modules())
    return "its blocks are not known" if attends else "the tower encodes each patch alone"


def _former(names: list[str]) -> str:
    """What is said of families that are not run here."""
    if not names:
        return ""
    return (
        f" Rows of {', '.join(names)} are those of an earlier run: they need an older "
        "transformers, or timm."
    )


def _with_former_cells(row: tuple[str, ...], known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """A row with the cells of a former run where it was not run anew."""
    former = known.get(row[0], row)
    return (*row[:-1], former[-1] if row[-1] == _NOT_RUN else row[-1])


def _rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """The rows of the table of families, as a former run wrote them."""
    # Before the table of families there is the one of columns.
    table = page.split("\n## ")[0].rpartition("\n\n")[2]
    rows = (tuple(line[2:-2].split(" | ")) for line in table.splitlines()[2:])
    return {row[0]: row for row in rows}


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
