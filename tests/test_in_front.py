"""A model that puts images in front of the text itself: its prompts have no placeholders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from families import PAD, prompts, shared
from masked import assert_pruning_is_masking
from masked_tower import tower_masked
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import deos_fx
from deos_fx.data import Record, batches
from deos_fx.exporters.genai import export_genai
from deos_fx.inputs.call import Call
from deos_fx.inputs.example import example_inputs
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.search.answers import answered
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM: dict[str, Any] = {"scores": {"feature_norm": 1.0}}
VISUAL = 65


@pytest.fixture(scope="module")
def model() -> Any:
    return shared("git")


def reduce(model: Any, *reductions: Reduction) -> ReducedModel:
    return ReducedModel(model, Policy(reductions))


@pytest.mark.parametrize("position", ["keep", "compact", "grid"])
def test_no_rule_moves_a_text_that_counts_alone(model: Any, position: str) -> None:
    reductions = [
        Reduction("projector", 0.5, position="keep" if position == "grid" else position, **NORM),
        Reduction("decoder.2", 0.25, position=position, **NORM),
    ]
    assert_pruning_is_masking(model, reduce(model, *reductions), prompts("git", 2))


def test_patches_are_dropped_in_the_tower(model: Any) -> None:
    reduced = reduce(model, Reduction("vision.0", 0.25, **NORM))

    def tower(alive: Tensor) -> Any:
        return tower_masked(model, 0, alive[:, :VISUAL])

    assert_pruning_is_masking(model, reduced, prompts("git", 2), tower=tower)


def test_later_text_goes_on_as_in_the_original(model: Any) -> None:
    batch, reduced = prompts("git", 2), reduce(model)
    words = torch.tensor([[5, 6], [7, 8]])
    longer = torch.cat([batch["attention_mask"], torch.ones_like(words)], dim=1)
    for given in ({"attention_mask": longer}, {}):
        ours, theirs = reduced(**batch), model(**batch)
        ours = reduced(input_ids=words, **given, **{CACHE: ours[CACHE]})
        theirs = model(input_ids=words, **given, **{CACHE: theirs[CACHE]})
        assert torch.equal(ours.logits, theirs.logits)


def test_beams_and_captions_are_those_of_the_original(model: Any) -> None:
    batch, reduced = prompts("git", 2), reduce(model)
    for given in (batch | {"num_beams": 2}, {"pixel_values": batch["pixel_values"]}):
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(reduced.generate(**given, **options), model.generate(**given, **options))


def test_the_loss_is_that_of_the_text(model: Any) -> None:
    batch = prompts("git", 2)
    ids = batch["input_ids"]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 4, -100)
    # The very first word is predicted by an image, which the model leaves out.
    for asked in (labels, ids):
        assert torch.equal(
            reduce(model)(**batch, labels=asked).loss, model(**batch, labels=asked).loss
        )
    reduced = reduce(
        model, Reduction("projector", 0.5, **NORM), Reduction("decoder.1", 0.2, **NORM)
    )
    output = reduced(**batch)
    following = functional.pad(labels[:, 1:], (VISUAL, 1), value=-100)
    following = following.gather(1, output[CACHE].spaces[-1].origin)
    expected = functional.cross_entropy(output.logits.flatten(0, 1), following.flatten())
    assert_close(reduced(**batch, labels=labels).loss, expected)


def test_costs_are_what_torch_counts(model: Any) -> None:
    batch = prompts("git", 2)
    reductions = (
        Reduction("vision.0", 0.75, gain=1.0, mass_bias=1.0, **NORM),
        Reduction("decoder.1", 0.4, scores={"novelty": 1.0}, gain=1.0),
    )
    for reduced in (reduce(model), reduce(model, *reductions)):
        cost = reduced.cost(**batch).after
        # The first call captures.
        reduced(**batch)
        with FlopCounterMode(display=False) as counter:
            layers = reduced(**batch)[CACHE].layers
        assert cost.flops == counter.get_total_flops()
        assert cost.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    observed = Policy((Reduction("decoder.1", 0.5, observe="next", scores={"key_norm": 1.0}),))
    with pytest.raises(ValueError, match="names an attention implementation"):
        ReducedModel(model, observed).cost(**batch)


def test_a_search_compares_with_the_models_own_answers(model: Any) -> None:
    batch = prompts("git", 2)
    call = answered(Call.of(facts_of(model), batch))
    text = call.inputs["input_ids"][:, VISUAL:]
    tokens = model.generate(**batch, max_new_tokens=16, do_sample=False)
    assert torch.equal(text, tokens)
    assert torch.equal(call.inputs["labels"][:, -16:], tokens[:, -16:])
    assert (call.inputs["input_ids"][:, :VISUAL] < 0).all() and call.layout.sizes == (VISUAL,)


def test_an_example_is_words_and_an_image(model: Any) -> None:
    inputs = example_inputs(model)
    logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] + VISUAL
    reduced = deos_fx.transform(model, policy=deos_fx.presets.fit("merge", 16, model))
    reduced.capture(**inputs)
    assert reduced(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] + 16


def test_prompts_are_written_without_placeholders_and_not_ended() -> None:
    class Tokenizer:
        bos_token, eos_token, unk_token_id, padding_side = None, "[SEP]", 0, "left"
        chat_template = None

        def convert_tokens_to_ids(self, token: str) -> int:
            return 0

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [{1: "[CLS]", 2: "[SEP]"}[i] for i in ids]

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            ids = [3 + len(word) for word in text.replace("[CLS]", "").split()]
            start = [1] if add_special_tokens or text.startswith("[CLS]") else []
            ids = start + ids + ([2] if add_special_tokens else [])
            return type("Encoding", (), {"input_ids": ids})

    class Processor:
        tokenizer = Tokenizer()
        given: list[Any] = []

        def __call__(self, text: list[str], add_special_tokens: bool = True, **_: Any) -> Any:
            self.given.append((text, add_special_tokens))
            ids = self.tokenizer(text[0], add_special_tokens).input_ids
            return {"input_ids": torch.tensor([ids])}

    processor = Processor()
    from PIL import Image

    image = Image.new("RGB", (4, 4))
    (asked,) = batches(processor, [Record(image, "what is this?")], 1)
    assert asked["input_ids"].tolist() == [[1, 7, 5, 8]]
    (told,) = batches(processor, [Record(image, "what is this?", "cat")], 1)
    assert told["input_ids"].tolist() == [[1, 7, 5, 8, 6, 2]]
    assert told["labels"].tolist() == [[-100, -100, -100, -100, 6, 2]]


REFUSED = {
    "takes flags .B, N. of real tokens of the text": lambda batch: {
        "attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool)
    },
    "one image of each prompt": lambda batch: {"pixel_values": batch["pixel_values"][:1]},
    "of the config's size": lambda batch: {"pixel_values": torch.zeros(2, 3, 64, 64)},
    "frames of a video one by one": lambda batch: {"pixel_values": torch.zeros(2, 2, 3, 32, 32)},
    "go back inside a row": lambda batch: {
        "position_ids": torch.arange(12).remainder(6).expand(2, -1),
        "attention_mask": None,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(model: Any, message: str) -> None:
    batch = prompts("git", 2)
    batch["input_ids"] = batch["input_ids"].clamp(min=PAD + 1)
    with pytest.raises(ValueError, match=message):
        reduce(model)(**batch | REFUSED[message](batch))


def test_what_comes_later_is_text(model: Any, tmp_path: Any) -> None:
    batch, reduced = prompts("git", 1), reduce(model, Reduction("projector", 0.5, **NORM))
    cache = reduced(**batch)[CACHE]
    words = {"input_ids": torch.tensor([[5, 6]]), CACHE: cache}
    with pytest.raises(ValueError, match="puts images in front of the whole text"):
        reduced(**words, pixel_values=batch["pixel_values"] + 1)
    longer = torch.cat([batch["input_ids"], words["input_ids"]], dim=1)
    with pytest.raises(ValueError, match="Call the model with the new tokens"):
        reduced.generate(input_ids=longer, **{CACHE: cache}, max_new_tokens=2)
    policy = Policy((Reduction("projector", 0.5, position="compact", **NORM),))
    with pytest.raises(ValueError, match="writes them over placeholders in the prompt"):
        export_genai(ReducedModel(model, policy), tmp_path / "genai")


def test_scores_by_attention_are_refused_where_it_cannot_be_observed(model: Any) -> None:
    with pytest.raises(ValueError, match="attention of its layer cannot be observed"):
        reduce(model, Reduction("decoder.1", 0.5, scores={"key_norm": 1.0}))(**prompts("git"))
    merged = reduce(model, Reduction("decoder.1", 1.0, gain=1.0, mass_bias=1.0, **NORM))
    batch = prompts("git", 2)
    assert_close(merged(**batch).logits, model(**batch).logits)
