"""Models whose visual tokens cannot be dropped are refused with the reason, before any compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import deos_fx
from deos_fx import Policy, ReducedModel
from deos_fx.errors import CaptureError
from deos_fx.models.facts import facts_of

CROSS, ENCODER = "through cross-attention", "encoder that its decoder"
OTHER = "no get_image_features"
REFUSED = {
    "blip": CROSS,
    "idefics": CROSS,
    "mllama": CROSS,
    "florence2": ENCODER,
    "pix2struct": ENCODER,
    "pp_formulanet": ENCODER,
    "t5gemma2": ENCODER,
    "udop": ENCODER,
    "instructblipvideo": OTHER,
}
NO_ANSWERS: list[tuple[Any, Any]] = [
    (hf.LlamaForCausalLM, hf.LlamaConfig),
    (hf.LlavaModel, hf.LlavaConfig),
    (hf.CLIPModel, hf.CLIPConfig),
    (hf.ViTForImageClassification, hf.ViTConfig),
    (hf.WhisperForConditionalGeneration, hf.WhisperConfig),
    (hf.VoxtralForConditionalGeneration, hf.VoxtralConfig),
]


@pytest.mark.parametrize("family", REFUSED)
def test_images_that_are_no_tokens_of_the_prompt(family: str) -> None:
    kind: Any = getattr(hf, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    with torch.device("meta"):
        model = kind(hf.AutoConfig.for_model(family))
    with pytest.raises(CaptureError, match=f"{REFUSED[family]}.* Use a model whose visual tokens"):
        facts_of(model)


@pytest.mark.parametrize(("kind", "config"), NO_ANSWERS)
def test_models_that_do_not_read_images_and_answer(kind: Any, config: Any) -> None:
    with torch.device("meta"):
        model = kind(config())
    with pytest.raises(ValueError, match="does not read images and answer in text. Give a vision"):
        facts_of(model)


def test_a_decoder_beside_the_one_that_reads() -> None:
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    config = hf.DiffusionGemmaConfig(text_config=experts, vision_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = hf.DiffusionGemmaForBlockDiffusion(config)
    with pytest.raises(CaptureError, match="BlockDiffusion reads images in an enc"):
        facts_of(model)


def test_several_models_in_one() -> None:
    with torch.device("meta"):
        model = hf.Qwen2_5OmniForConditionalGeneration(hf.Qwen2_5OmniConfig())
    with pytest.raises(ValueError, match="is several models, of which one .* Give model.thinker."):
        facts_of(model)


def test_caches_of_another_kind() -> None:
    with torch.device("meta"):
        model = hf.UnlimitedOcrForConditionalGeneration(hf.UnlimitedOcrConfig())
    with pytest.raises(CaptureError, match="a rule of its own .*ReferenceSlidingWindowLayer"):
        facts_of(model)


def test_a_config_without_a_placeholder() -> None:
    with torch.device("meta"):
        model = hf.Emu3ForConditionalGeneration(hf.Emu3Config(vocabulary_map={}))
    with pytest.raises(ValueError, match="names no image placeholder .*Set model.config.image_tok"):
        facts_of(model)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(vocab_size=50, **SMALL)),
        BertModel(BertConfig(vocab_size=50, **SMALL)),
        CLIPModel(
            CLIPConfig(
                text_config=SMALL | {"vocab_size": 50},
                vision_config=SMALL | {"image_size": 16, "patch_size": 8},
            )
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_model_that_answers_no_images(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} .*LlavaForConditionalGeneration"):
        deos_fx.transform(model)


@pytest.mark.parametrize("model", ["llava-1.5-7b", None, torch.nn.Linear(2, 2)])
def test_something_that_is_no_model(model):
    message = f"model is a {type(model).__name__}; .*from_pretrained"
    with pytest.raises(TypeError, match=message):
        deos_fx.transform(model)
    with pytest.raises(TypeError, match=message):
        ReducedModel(model, Policy())
