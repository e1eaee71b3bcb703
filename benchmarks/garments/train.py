"""Train the garment model: ``python -m benchmarks.garments.train --data DIR --output DIR``.

The recipe is that of the reference model, with longer stages: see ``deos_fx.reference.train``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from deos_fx.reference.train import STAGES, join_lesson, options, run

from . import accuracy, make_examples
from .lessons import garment_task
from .photographs import read_wardrobe

_TOWER, _LANGUAGE, _JOIN = STAGES
# What garments are is harder to see than digits, so descriptions matter up to the end.
GARMENT_STAGES = (
    replace(_TOWER, steps=4000),
    replace(_LANGUAGE, steps=2200),
    replace(_JOIN, steps=1700, rate=4e-4, lesson=partial(join_lesson, least=1.0)),
)


def main() -> None:
    """Train the model, save it and report its accuracy on held-out scenes."""
    parser = options(main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST")
    arguments = parser.parse_args()
    task = garment_task(read_wardrobe(arguments.data))
    model, processor = run(arguments, GARMENT_STAGES, task)
    examples = make_examples(1000, "test", data=arguments.data)
    for kind, right in accuracy(model.generate, processor, examples).items():
        print(f"{kind:14} {right:.3f}")


if __name__ == "__main__":
    main()
