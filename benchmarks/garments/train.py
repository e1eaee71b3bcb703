"""Train the garment model: ``python -m benchmarks.garments.train --data DIR --output DIR``.

The recipe is that of the reference model, with longer stages: see ``deos_fx.reference.train``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deos_fx.reference.train import STAGES, options, run

from . import accuracy, make_examples
from .lessons import garment_task
from .photographs import read_wardrobe

STEPS = {"tower": 4000, "language": 2200, "join": 1600}


def main() -> None:
    """Train the model, save it and report its accuracy on held-out scenes."""
    parser = options(main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST")
    arguments = parser.parse_args()
    task = garment_task(read_wardrobe(arguments.data))
    stages = tuple(replace(stage, steps=STEPS[stage.name]) for stage in STAGES)
    model, processor = run(arguments, stages, task)
    examples = make_examples(1000, "test", data=arguments.data)
    for kind, right in accuracy(model.generate, processor, examples).items():
        print(f"{kind:14} {right:.3f}")


if __name__ == "__main__":
    main()
