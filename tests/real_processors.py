"""Folders with the real processors of several families, and a small tokenizer for each.

The files are those that `save_pretrained` writes. They are written by hand, since processors of
videos cannot be made without torchvision. The chat templates are short, in the families' manner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import FAMILIES
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from deos_fx.data.processors import load_processor

_CORPUS = [
    "user assistant model system User: Assistant:",
    "what is at the top left? seven, a red one; seven or eight.",
    "how many digits are there? there are three of them",
] * 4


class Real(NamedTuple):
    """A family.

    Attributes:
        name: The class of the processor.
        special: Its special tokens by their names; ``pad`` and ``eos`` among them.
        image: Settings of its image processor.
        video: The class of its processor of videos, if it has one.
        template: Its chat template.
        settings: Settings of the processor itself.
    """

    name: str
    special: dict[str, str]
    image: dict[str, Any]
    video: str
    template: str
    settings: dict[str, Any] = {}


def _parts(image: str) -> str:
    """A loop over the parts of a message."""
    return (
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + image
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    )


def _chatml(image: str, before: str = "") -> str:
    """Turns between <|im_start|> and <|im_end|>."""
    return (
        before + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}" + _parts(image) + "<|im_end|>{% endgeneration %}"
        "{% else %}" + _parts(image) + "<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


_SMOLVLM = (
    "<|im_start|>{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}Assistant:{% generation %} "
    + _parts("<image>")
    + "<end_of_utterance>{% endgeneration %}{% else %}User:"
    + _parts("<image>")
    + "<end_of_utterance>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<start_of_turn>model\n"
    "{% generation %}" + _parts("<start_of_image>") + "<end_of_turn>{% endgeneration %}\n"
    "{% else %}<start_of_turn>{{ m['role'] }}\n" + _parts("<start_of_image>") + "<end_of_turn>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_CHATML_TOKENS = {"pad": "<|endoftext|>", "eos": "<|im_end|>", "start": "<|im_start|>"}

REAL = {
    "qwen2_5_vl": Real(
        "Qwen2_5_VLProcessor",
        _CHATML_TOKENS
        | {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "begin": "<|vision_start|>",
            "end": "<|vision_end|>",
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64},
        },
        "Qwen2VLVideoProcessor",
        _chatml(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|im_start|>system\nyou are a model<|im_end|>\n",
        ),
    ),
    "internvl": Real(
        "InternVLProcessor",
        _CHATML_TOKENS
        | {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 28, "width": 28},
            "max_patches": 4,
        },
        "InternVLVideoProcessor",
        _chatml("<IMG_CONTEXT>\n"),
        {"image_seq_length": 4},
    ),
    "smolvlm": Real(
        "SmolVLMProcessor",
        {
            "pad": "<|endoftext|>",
            "eos": "<end_of_utterance>",
            "start": "<|im_start|>",
            "image": "<image>",
            "fake": "<fake_token_around_image>",
            "global": "<global-img>",
        },
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 56},
            "max_image_size": {"longest_edge": 28},
        },
        "SmolVLMVideoProcessor",
        _SMOLVLM,
        {"image_seq_len": 4},
    ),
    "llava_onevision": Real(
        "LlavaOnevisionProcessor",
        _CHATML_TOKENS | {"image": "<image>", "video": "<video>"},
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        },
        "LlavaOnevisionVideoProcessor",
        _chatml("<image>"),
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "gemma3": Real(
        "Gemma3Processor",
        {
            "pad": "<pad>",
            "eos": "<eos>",
            "bos": "<bos>",
            "turn": "<start_of_turn>",
            "end": "<end_of_turn>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
        "",
        _GEMMA,
        {"image_seq_length": 4},
    ),
}


def small_tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """A BPE of bytes, which joins words with the space before them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[*special.values()]
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    named = {name: token for name, token in special.items() if name.endswith("_token")}
    usual = {f"{name}_token": special[name] for name in ("pad", "eos", "bos") if name in special}
    others = [token for name, token in special.items() if f"{name}_token" not in usual]
    extra = named or others
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=extra, **usual)


def write_processor(
    family: str, folder: Path, template: str | None = None, image: dict[str, Any] | None = None
) -> Path:
    """Write the files of a family's processor.

    Args:
        family: The family, a key of `REAL`.
        folder: The folder.
        template: A chat template in place of the family's; an empty one leaves it out.
        image: Further settings of the image processor.
    """
    real = REAL[family]
    small_tokenizer(real.special).save_pretrained(folder)
    config = {"processor_class": real.name, "image_processor": real.image | (image or {})}
    config |= real.settings
    if real.video:
        # The sizes of frames matter to nothing but a comparison of the files.
        config["video_processor"] = {"video_processor_type": real.video, "merge_size": 2}
    (folder / "processor_config.json").write_text(json.dumps(config))
    chosen = real.template if template is None else template
    if chosen:
        (folder / "chat_template.jinja").write_text(chosen)
    return folder


def write_qwen(folder: Path, min_pixels: int = 64, max_pixels: int = 10**6) -> tuple[Any, Any]:
    """Write a small Qwen2.5-VL with random weights, and its processor of images of any size.

    Args:
        folder: The folder of both.
        min_pixels: Pixels of the smallest image; a visual token is 8 x 8.
        max_pixels: Pixels of the largest image.

    Returns:
        The model and the processor.
    """
    config = FAMILIES["qwen2_5_vl"].config()
    vision = config.vision_config
    image = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    }
    processor = load_processor(write_processor("qwen2_5_vl", folder, image=image))
    tokenizer = processor.tokenizer
    special = REAL["qwen2_5_vl"].special
    names = {"image": "image", "video": "video", "vision_start": "begin", "vision_end": "end"}
    for name, key in names.items():
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(special[key]))
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return model, processor


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
