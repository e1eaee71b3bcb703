"""Where the tokens of LLaVA-NeXT and LLaVA-OneVision lie, against transformers' own packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, built, shared
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from deos_fx.inputs.items import IMAGES, items_of
from deos_fx.models.facts import facts_of
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

PRUNE = Policy((Reduction("projector", 8, scores={"feature_norm": 1.0}),))

# Pixels of a tile's side, patches on it, and what is at the end of a row in place of a place.
PIXELS, SIDE, END = 16, 4, -1.0


def _packed(model: Any, size: tuple[int, int], tiles: int) -> Tensor:
    """Pack places as the model packs features: picture, row and column [N, 3], or the end."""
    pinpoints, cells = model.config.image_grid_pinpoints, torch.arange(SIDE).float()
    own = torch.cartesian_prod(torch.zeros(1), cells, cells)
    _, columns = get_anyres_image_grid_shape(size, pinpoints, PIXELS)
    for tile in range(tiles - 1):
        row, column = divmod(tile, columns)
        shift = torch.tensor([1.0, SIDE * row, SIDE * column])
        own = torch.cat([own, own[: SIDE**2] + shift])
    further = ["default"] if model.config.model_type == "llava_next" else []
    newline = torch.full((3,), END)
    places, _ = model.model.pack_image_features(
        [own.unflatten(0, (tiles, -1))], [size], *further, image_newline=newline
    )
    return places[0]


def _prompt(model: Any, size: tuple[int, int], tiles: int, images: int = 1) -> dict[str, Tensor]:
    image = [IMAGE] * len(_packed(model, size, tiles))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, tiles, 3, PIXELS, PIXELS, generator=generator)
    return {
        "input_ids": torch.tensor([[1, 5, *(image + [6]) * images, 7]]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([size] * images),
    }


@pytest.mark.parametrize("size", [(32, 32), (20, 40), (30, 13), (16, 32)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_whole_image_and_its_tiles_put_together(name: str, size: tuple[int, int]) -> None:
    model = shared(name)
    tiles = int(image_size_to_num_patches(size, model.config.image_grid_pinpoints, PIXELS))
    batch, packed = _prompt(model, size, tiles), _packed(model, size, tiles)
    explanation = ReducedModel(model, PRUNE).explain(**batch)
    places = packed[packed[:, 0] != END].int()
    # The padding that transformers cuts off lies on both sides.
    places[SIDE**2 :, 1:] -= places[SIDE**2 :, 1:].amin(dim=0)
    drawn = [
        [picture, *divmod(patch, columns)]
        for picture, (rows, columns) in enumerate(explanation.grids)
        for patch in range(rows * columns)
    ]
    assert drawn == places.tolist()
    # Each step counts the patches of its own picture.
    positions = (batch["input_ids"][0] == IMAGE).nonzero().flatten()[packed[:, 0] != END]
    whole, put_together = explanation.steps()
    kept = [*whole[0].kept, *(SIDE**2 + patch for patch in put_together[0].kept)]
    assert positions[kept].tolist() == explanation[0].kept[0].tolist()


def test_several_images_in_one_prompt() -> None:
    model = shared("llava_next")
    explanation = ReducedModel(model, PRUNE).explain(**_prompt(model, (32, 32), 5, images=2))
    assert explanation.grids == ((4, 4), (8, 8)) * 2
    kept = [len(step.kept) for (step,) in explanation.steps()]
    assert kept[0] + kept[1] == kept[2] + kept[3] == 8


def test_images_without_tiles() -> None:
    """LLaVA-OneVision makes no tiles of several images; an end is behind each."""
    model = shared("llava_onevision")
    batch = _prompt(model, (16, 16), 1, images=2) | {"batch_num_images": torch.tensor([2])}
    explanation = ReducedModel(model, PRUNE).explain(**batch)
    assert explanation.grids == ((4, 4), (4, 4))


@pytest.mark.parametrize(("more", "pictures"), [(0, ((4, 4), (8, 8))), (1, ())])
def test_tokens_behind_the_last_end_of_a_row(
    more: int, pictures: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model that is known puts any there; where they lie would be a guess."""
    model = built(FAMILIES["llava_next"].config())
    batch, pack = _prompt(model, (32, 32), 5), model.model.pack_image_features

    def packed(*args: Any, **options: Any) -> Any:
        features, lengths = pack(*args, **options)
        return [torch.cat([one, one[:more]]) for one in features], lengths + more

    monkeypatch.setattr(model.model, "pack_image_features", packed)
    (item,) = items_of(facts_of(model), batch, IMAGES, [88 + more])
    assert (item.tokens, item.pictures, item.closed) == (88 + more, pictures, not more)
