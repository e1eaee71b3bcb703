"""Tiny models of many families, built through transformers' own configs, and prompts for them.

Weights are drawn with fan-in scale, see tiny.py. Every image has 64 visual tokens (8 x 8) unless
the family has separators among them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor

from deos_fx.models.families import auto_class

PAD, IMAGE, VIDEO, START, END, BREAK, VOCABULARY = 0, 120, 121, 122, 123, 124, 128
LAYERS = 5


class Family(NamedTuple):
    """How a family is built.

    Attributes:
        config: Makes the config.
        pixels: Inputs of a batch that belong to the images.
        block: Token ids that stand for one image.
        extra: Further inputs, made from the token ids.
    """

    config: Callable[[], Any]
    pixels: Callable[[int], dict[str, Tensor]]
    block: list[int] = [IMAGE] * 64
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}


def _text(kind: Any = hf.LlamaConfig, **more: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    return kind(**sizes | more)


def _sizes(layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        **more,
    }


def _clip(image: int = 32) -> Any:
    return hf.CLIPVisionConfig(**_sizes(3, image_size=image, patch_size=4, projection_dim=32))


def _siglip(image: int, patch: int) -> Any:
    sizes = _sizes(image_size=image, patch_size=patch)
    return hf.SiglipVisionConfig(**sizes, vision_use_head=False)


def _pixtral(patch: int) -> Any:
    # The rotary frequencies of the tower are for heads of a multiple of 4.
    return hf.PixtralVisionConfig(**_sizes(image_size=32, patch_size=patch, head_dim=16))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _plain(side: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"pixel_values": _noise(batch, 3, side, side)}


def _sized(*shape: int, height: int, width: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {
        "pixel_values": _noise(batch, *shape),
        "image_sizes": torch.tensor([[height, width]] * batch),
    }


def _grid(*patch: int, **more: int) -> Callable[[int], dict[str, Tensor]]:
    """8 x 16 patches of an image, merged by twos: 4 x 8 visual tokens."""
    return lambda batch: {
        "pixel_values": _noise(batch * 128, *patch),
        "image_grid_thw": torch.tensor([[1, 8, 16]] * batch),
        **{name: torch.tensor([value] * batch) for name, value in more.items()},
    }


# Patches of 4 x 4 pixels in 2 frames.
_patches = _grid(3 * 2 * 16)


def _types(ids: Tensor) -> dict[str, Tensor]:
    """1 for images and 2 for videos, which GLM writes as images between marks of their own."""
    within = (ids == BREAK).cumsum(dim=1) > (ids == BREAK + 1).cumsum(dim=1)
    images, videos = ids == IMAGE, (ids == VIDEO) | (ids == IMAGE) & within
    return {"mm_token_type_ids": (images | videos).int() + videos}


_WINDOWS = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
_ANYRES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "image_token_index": IMAGE}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_MERGING = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _qwen(config: Any, text: dict[str, Any], vision: dict[str, Any], **ids: int) -> Any:
    words = _text(dict, rope_parameters=dict(_MROPE)) | text
    return config(text_config=words, vision_config=_MERGING | vision, **_TOKENS, **ids)


_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
_WIDE = {"hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
_SHORT = [START, *[IMAGE] * 32, END]


def _idefics(config: Any) -> Any:
    vision = _sizes(image_size=32, patch_size=2)
    return config(vision_config=vision, text_config=_text(), image_token_id=IMAGE, scale_factor=2)


def _idefics_pixels(batch: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, 1, 32, 32, dtype=torch.int64)
    return {"pixel_values": _noise(batch, 1, 3, 32, 32), "pixel_attention_mask": mask}


FAMILIES: dict[str, Family] = {
    "llava": Family(
        lambda: hf.LlavaConfig(
            vision_config=_clip(),
            text_config=_text(),
            image_token_index=IMAGE,
        ),
        _plain(32),
    ),
    "vipllava": Family(
        lambda: hf.VipLlavaConfig(
            vision_config=_clip(),
            text_config=_text(),
            image_token_index=IMAGE,
            vision_feature_layers=[-2, -3],
        ),
        _plain(32),
    ),
    "llava_next": Family(
        lambda: hf.LlavaNextConfig(vision_config=_clip(16), text_config=_text(), **_ANYRES),
        _sized(5, 3, 16, 16, height=32, width=32),
        [IMAGE] * (16 + 8 * 9),
    ),
    "llava_onevision": Family(
        lambda: hf.LlavaOnevisionConfig(
            vision_config=_siglip(16, 4),
            text_config=_text(hf.Qwen2Config),
            video_token_id=VIDEO,
            **_ANYRES,
        ),
        _sized(5, 3, 16, 16, height=32, width=32),
        [IMAGE] * (16 + 8 * 9),
    ),
    "pixtral": Family(
        lambda: hf.LlavaConfig(
            vision_config=_pixtral(4),
            text_config=_text(hf.MistralConfig, sliding_window=None),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _sized(3, 32, 32, height=16, width=32),
        [*[IMAGE] * 8, BREAK] * 4,
    ),
    "mistral3": Family(
        lambda: hf.Mistral3Config(
            vision_config=_pixtral(2),
            text_config=_text(hf.MistralConfig, sliding_window=None),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        _sized(3, 32, 32, height=32, width=32),
    ),
    "internvl": Family(
        lambda: hf.InternVLConfig(
            vision_config=_sizes(image_size=[32, 32], patch_size=[2, 2]),
            text_config=_text(hf.Qwen2Config),
            image_token_id=IMAGE,
        ),
        _plain(32),
    ),
    "aya_vision": Family(
        lambda: hf.AyaVisionConfig(
            vision_config=_siglip(32, 2),
            text_config=_text(hf.Cohere2Config, **_WINDOWS),
            image_token_index=IMAGE,
            downsample_factor=2,
        ),
        _plain(32),
    ),
    "got_ocr2": Family(
        lambda: hf.GotOcr2Config(
            vision_config=_sizes(
                image_size=64,
                patch_size=2,
                output_channels=8,
                global_attn_indexes=[1],
                mlp_dim=64,
                window_size=6,
            ),
            text_config=_text(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        _plain(64),
    ),
    "idefics3": Family(lambda: _idefics(hf.Idefics3Config), _idefics_pixels),
    "smolvlm": Family(lambda: _idefics(hf.SmolVLMConfig), _idefics_pixels),
    "paligemma": Family(
        lambda: hf.PaliGemmaConfig(
            vision_config=_siglip(32, 4),
            text_config=_text(hf.GemmaConfig, head_dim=16),
            image_token_index=IMAGE,
            projection_dim=64,
        ),
        _plain(32),
        extra=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
    "gemma3": Family(
        lambda: hf.Gemma3Config(
            vision_config=_siglip(32, 4),
            text_config=_text(
                hf.Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=16, **_WINDOWS
            ),
            image_token_index=IMAGE,
            mm_tokens_per_image=64,
        ),
        _plain(32),
        extra=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "qwen2_vl": Family(
        lambda: _qwen(
            hf.Qwen2VLConfig,
            {},
            {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "qwen2_5_vl": Family(
        lambda: _qwen(
            hf.Qwen2_5_VLConfig,
            {},
            {**_WIDE, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "qwen3_vl": Family(
        lambda: _qwen(
            hf.Qwen3VLConfig,
            {"head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
            {
                **_WIDE,
                "depth": 3,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "glm4v": Family(
        lambda: _qwen(
            hf.Glm4vConfig,
            {},
            {**_WIDE, "depth": 2, "image_size": 32},
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=BREAK,
            video_end_token_id=BREAK + 1,
        ),
        _patches,
        _SHORT,
        _types,
    ),
}


def _family(name: str) -> Family:
    return (FAMILIES | TWINS)[name]


_PER_LAYER = ("layer_types", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern")


@functools.cache
def shared(name: str, layers: int | None = None) -> Any:
    """One model of a family, possibly with fewer decoder layers, for all tests that leave it as it
    is."""
    config = _family(name).config()
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        for per_layer in _PER_LAYER:
            # Some configs compute them, some have none, and some have one number for all layers.
            with contextlib.suppress(AttributeError, TypeError):
                setattr(text, per_layer, getattr(text, per_layer)[:layers])
    return built(config)


def built(config: Any) -> Any:
    """A model of a config, with drawn weights."""
    torch.manual_seed(0)
    # Some activations make their parameters in bfloat16; a model that is loaded has one precision.
    model = auto_class(config).from_config(config).float()
    generator = torch.Generator().manual_seed(1)
    for path, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if path.endswith("A_log"):
            # A state that forgets slowly, so that tokens long ago matter.
            parameter.data.copy_(noise - 3)
        elif parameter.ndim == 1:
            parameter.data.add_(0.1 * noise)
        elif parameter.ndim == 2 and "embed" in path:
            # Tied weights that are large let a model repeat its input.
            parameter.data.copy_(
                noise * (0.1 if getattr(config, "tie_word_embeddings", False) else 0.5)
            )
        else:
            parameter.data.copy_(noise * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def prompts(name: str, batch: int = 1) -> dict[str, Tensor]:
    """Prompts of one image each; every further one is 2 tokens shorter and padded on the left."""
    family = _family(name)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(batch):
        words = torch.randint(1, 100, (8 + 2 * (batch - row),), generator=generator)
        rows.append(torch.cat([words[:3], torch.tensor(family.block).long(), words[3:]]))
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad(rows, padding_value=PAD), pad([torch.ones_like(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **family.pixels(batch),
        **family.extra(ids),
    }


def alone(name: str, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of a padded batch, without padding."""
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real][None]
    count = len(batch["input_ids"])
    images = {
        # A strip of images has them side by side.
        key: value.chunk(count, -1)[row]
        if len(value) == 1
        else value.unflatten(0, (count, -1))[row]
        for key, value in batch.items()
        if key in _family(name).pixels(1)
    }
    extra = _family(name).extra(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **extra}


def continued(name: str, prompt: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """One prompt without padding, with more tokens [1, t] after it."""
    ids = torch.cat([prompt["input_ids"], tokens], dim=1)
    return (
        prompt
        | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        | _family(name).extra(ids)
    )


import more_families1  # noqa: E402 - they are made of what is above
import more_families2  # noqa: E402
import more_families3  # noqa: E402
import more_families4  # noqa: E402
import more_families5  # noqa: E402
import more_families6  # noqa: E402
import more_families7  # noqa: E402

_MORE = more_families1.MORE | more_families2.MORE | more_families3.MORE | more_families4.MORE
_MORE |= more_families6.MORE | more_families7.TWINS
_LIKE_OTHERS = more_families1.TWINS | more_families2.TWINS | more_families3.TWINS
_LIKE_OTHERS |= more_families6.MORE.keys() | more_families7.TWINS.keys()
FAMILIES |= {name: family for name, family in _MORE.items() if name not in _LIKE_OTHERS}
TWINS = {name: _MORE[name] for name in _LIKE_OTHERS}
STATEFUL = more_families1.STATEFUL + more_families3.STATEFUL + more_families4.STATEFUL
STATEFUL += more_families6.STATEFUL + more_families7.STATEFUL
"""Families for which hiding keys is no reference: layers keep a state, or count positions."""
NEWER = Version(hf.__version__) >= Version("5.24")
# transformers 5.24 gives layers of Inkling 2 a table of all pairs of tokens, which is refused.
REFUSED = {"inkling2"} if NEWER else set()
"""Families that a newer transformers than 5.23 has in a form that is refused."""
ONLY_NEWER = more_families5.TWINS | more_families6.ONLY_NEWER | more_families7.ONLY_NEWER
"""Families that transformers 5.23 does not have."""
OF_TIMM = more_families7.OF_TIMM
"""Families that are complete only where timm is installed."""
STOOD_IN = set() if more_families7.HAS_TIMM else OF_TIMM.keys() & TWINS.keys()
"""Those whose tower something else stands in for here."""
if NEWER:
    TWINS |= ONLY_NEWER
    # transformers 5.24.0 fails in the forward of Llama 4 itself, with images and without.
    del FAMILIES["llama4"]
