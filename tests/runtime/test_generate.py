"""transformers' `generate` in all its modes, against its own on the masked original model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from batches import BATCHES, batch_of
from closeness import assert_close
from families import FAMILIES, IMAGE, PAD, alone, prompts, shared
from masked import alive_of, masked_from
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    pipeline,
)

from deos_fx import reference
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache

STEPS = 4
NORM = {"scores": {"feature_norm": 1.0}}
# One cut ranks by the last token's attention: it must be that of the prompt, in every mode.
POLICY = Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)))
NAME = "vipllava"


def reduced_model(name: str = NAME) -> ReducedModel:
    return ReducedModel(shared(name), POLICY)


def copied(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in batch.items()}


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """Generate from a seed; greedy unless the options say otherwise."""
    torch.manual_seed(11)
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    output = model.generate(**copied(batch), **options, return_dict_in_generate=True)
    assert output.sequences.shape[1] > batch["input_ids"].shape[1]
    return output


def logits_of(output: Any) -> Tensor:
    return torch.stack(output.logits, dim=1)


# *** modes ***


class NoOddTokens(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(1, scores.shape[1], 2), -torch.inf)


class AfterTwo(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 2)


LENGTH = prompts(NAME, 2)["input_ids"].shape[1]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "max_length": {"max_new_tokens": None, "max_length": LENGTH + 3},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "processors": {"logits_processor": [NoOddTokens()]},
    "stopping": {"stopping_criteria": [AfterTwo(LENGTH)]},
    "end": {"eos_token_id": list(range(1, 100)), "pad_token_id": PAD},
    "config": {
        "max_new_tokens": None,
        "do_sample": None,
        "generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=PAD),
    },
    "dynamic cache": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")
def test_modes(mode: str) -> None:
    batch, reduced = prompts(NAME, 2), reduced_model()
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])
    options = {"output_scores": True, **MODES[mode]}
    ours = generate(reduced, batch, **options)
    with masked_from(shared(NAME), alive) as masked:
        theirs = generate(masked, batch, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert_close(a, b)
    if mode == "beams":
        assert_close(ours.sequences_scores, theirs.sequences_scores)


def test_positional_inputs_and_a_streamer() -> None:
    class Streamer:
        tokens: list[Tensor]

        def __init__(self) -> None:
            self.tokens, self.ended = [], False

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.reshape(-1))

        def end(self) -> None:
            self.ended = True

    batch, reduced, streamer = prompts(NAME), reduced_model(), Streamer()
    ids = batch.pop("input_ids")
    given: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    tokens = reduced.generate(ids, **copied(batch), **given, streamer=streamer)
    assert torch.equal(torch.cat(streamer.tokens), tokens[0])
    assert streamer.ended
    config = GenerationConfig(**given, pad_token_id=PAD)
    assert torch.equal(reduced.generate(ids, config, **copied(batch)), tokens)


def test_hidden_states_are_those_of_the_tokens_that_are_left() -> None:
    batch, reduced = prompts(NAME), reduced_model()
    ours = generate(reduced, batch, output_hidden_states=True)
    spaces = ours[CACHE].spaces
    with masked_from(shared(NAME), alive_of(ours[CACHE], batch["input_ids"])) as masked:
        theirs = generate(masked, batch, output_hidden_states=True)
    for step, (own, original) in enumerate(
        zip(ours.hidden_states, theirs.hidden_states, strict=True)
    ):
        for layer, (a, b) in enumerate(zip(own, original, strict=True)):
            if step == 0:
                # The input of a layer is in its space; the last one is the output of all.
                first = min(layer, len(own) - 2)
                space = next(space for space in reversed(spaces) if space.first_layer <= first)
                b = b[:, space.origin[0]]
                a = a[:, -b.shape[1] :] if a.shape == b.shape else _left_of(a, spaces, space)
            assert_close(a, b)


def _left_of(hidden: Tensor, spaces: list[Any], space: Any) -> Tensor:
    """Hidden states of an earlier space at the tokens of a later one."""
    earlier = next(other for other in spaces if other.origin.shape[1] == hidden.shape[1])
    return hidden[:, torch.isin(earlier.origin[0], space.origin[0])]


@pytest.mark.parametrize("by_config", [False, True])
def test_without_a_cache_the_text_is_reduced_anew(by_config: bool) -> None:
    batch = prompts(NAME, 2)
    reduced = ReducedModel(shared(NAME), Policy(POLICY.reductions[:1]))
    cached = generate(reduced, batch, output_logits=True)
    options: dict[str, Any] = {"use_cache": False}
    if by_config:
        settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD}
        config = GenerationConfig(**settings, use_cache=False, output_logits=True)
        torch.manual_seed(11)
        anew = reduced.generate(
            **copied(batch), generation_config=config, return_dict_in_generate=True
        )
    else:
        anew = generate(reduced, batch, output_logits=True, **options)
    assert anew.get(CACHE) is None
    assert torch.equal(anew.sequences, cached.sequences)
    assert_close(logits_of(anew), logits_of(cached))


@pytest.mark.parametrize("name", [NAME, "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_gives_the_same_tokens(name: str, how: str) -> None:
    batch, reduced = alone(name, prompts(name), 0), reduced_model(name)
    # A prompt that repeats itself, so that looking up finds something.
    repeated = batch["input_ids"][:, -5:].repeat(1, 3)
    batch["input_ids"] = torch.cat([batch["input_ids"], repeated], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch |= FAMILIES[name].extra(batch["input_ids"])
    given = {"max_new_tokens": 12, "output_logits": True, "repetition_penalty": 0.5}
    alone_output = generate(reduced, batch, **given)
    helper = {"prompt_lookup_num_tokens": 3, "assistant_model": shared(name)}
    helped = generate(reduced, batch, **given, **{how: helper[how]})
    assert torch.equal(helped.sequences, alone_output.sequences)
    assert_close(logits_of(helped), logits_of(alone_output))


def test_inference_mode() -> None:
    batch, reduced = prompts(NAME, 2), reduced_model()
    with torch.inference_mode():
        tokens = generate(reduced, copied(batch)).sequences
    assert torch.equal(generate(reduced, batch).sequences, tokens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_torch() -> None:
    batch, reduced = prompts(NAME, 2), reduced_model()
    expected = reduced(**batch).logits
    assert torch.equal(torch.compile(reduced, backend="eager")(**batch).logits, expected)
    model = copy.deepcopy(shared(NAME))
    for layer in model.get_decoder().layers[1:3]:
        layer.compile(backend="eager")
    assert_close(ReducedModel(model, POLICY)(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_pipeline() -> None:
    model, processor = reference.load()
    (example,) = reference.make_examples(1, "train")
    kept = ReducedModel(model, Policy((Reduction("decoder.1", 1.0),)))
    image, text = example.scene.image, f"{processor.image_token}{example.question.text}"
    ours, theirs = (
        pipeline("image-text-to-text", model=own, processor=processor)(
            images=[image], text=[text], max_new_tokens=4
        )
        for own in (kept, model)
    )
    assert ours == theirs


# *** what is refused ***

CONFIG = shared(NAME).config
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "static": ({"cache_implementation": "static"}, "hold different numbers of tokens"),
    "quantized": ({"cache_implementation": "quantized"}, "hold different numbers of tokens"),
    "offloaded": ({"cache_implementation": "offloaded"}, "hold different numbers of tokens"),
    "paged": ({"cache_implementation": "paged"}, "packs prompts of text"),
    "StaticCache": (
        {CACHE: StaticCache(config=CONFIG, max_cache_len=99)},
        "is a StaticCache: the layers",
    ),
    "DynamicCache": ({CACHE: DynamicCache()}, "is a DynamicCache: the layers"),
    "attentions": ({"output_attentions": True}, "output_attentions is not supported"),
    "early exit": ({"assistant_early_exit": 2}, "drafts tokens with layers of the model"),
    "hidden states of drafts": (
        {"prompt_lookup_num_tokens": 2, "output_hidden_states": True},
        "needs hidden states of every prompt position",
    ),
    "both": (
        {"use_cache": False, CACHE: ReducedCache(CONFIG.get_text_config())},
        "Leave one of the two out",
    ),
    "chunks": ({"prefill_chunk_size": 9}, "Chunked prefill cannot split"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(what: str) -> None:
    options, reason = REFUSED[what]
    with pytest.raises(ValueError, match=reason):
        generate(reduced_model(), prompts(NAME), **options)


def test_the_cache_gives_back_what_came_after_the_prompt() -> None:
    batch, reduced = prompts(NAME), reduced_model()
    output = generate(reduced, batch)
    cache, length = output[CACHE], batch["input_ids"].shape[1]
    held = [layer.keys.shape[2] for layer in cache.layers]
    cache.crop(-2)
    assert cache.get_seq_length() == length + STEPS - 3
    assert [layer.keys.shape[2] for layer in cache.layers] == [keys - 2 for keys in held]
    with pytest.raises(ValueError, match="reaches into the prompt"):
        cache.crop(-STEPS)


# *** turns of a chat ***


def next_turn(
    name: str, first: dict[str, Tensor], sequences: Tensor, words: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The whole conversation with a new text, as a processor gives it."""
    ids = torch.cat([sequences, words], dim=1)
    answered = sequences.shape[1] - mask.shape[1]
    more = (words != PAD).long()
    mask = torch.cat([mask, mask.new_ones(len(mask), answered), more], dim=1)
    return {**first, "input_ids": ids, "attention_mask": mask, **FAMILIES[name].extra(ids)}


def without_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if not name.startswith(("pixel", "image"))}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "name", [NAME, "gemma3", "qwen2_5_vl", "llava_next", "blip-2", "phi4_multimodal"]
)
def test_turns_of_a_chat(name: str, rows: int) -> None:
    """Each turn is what the masked original model says of the whole conversation, without a cache.

    The shorter question of the second row is padded on its left, in the middle of the conversation.
    """
    reduced, model = reduced_model(name), shared(name)
    first = prompts(name, rows)
    ours = generate(reduced, first, output_logits=True)
    alive = alive_of(ours[CACHE], first["input_ids"])
    generator = torch.Generator().manual_seed(5)
    mask = first["attention_mask"]
    for turn in range(2):
        words = torch.randint(1, 100, (rows, 5 - turn), generator=generator)
        words[1:, :2] = PAD
        conversation = next_turn(name, first, ours.sequences, words, mask)
        given = conversation if turn == 0 else without_images(conversation)
        seen = ours[CACHE].get_seq_length()
        ours = generate(reduced, given, **{CACHE: ours[CACHE]}, output_logits=True)
        with masked_from(model, alive):
            theirs = generate(model, conversation, output_logits=True)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert_close(logits_of(ours), logits_of(theirs))
        assert ours[CACHE].get_seq_length() == ours.sequences.shape[1] - 1 > seen
        mask = conversation["attention_mask"]


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "pixtral"])
def test_turns_of_a_batch_whose_prompts_differ(name: str) -> None:
    """Each conversation goes on as it does alone."""
    shown = [*BATCHES[name](), []]
    reduced, first = reduced_model(name), batch_of(name, shown)
    generator = torch.Generator().manual_seed(5)
    words = [torch.randint(1, 100, (len(shown), 6), generator=generator) for _ in range(2)]

    def chat(first: dict[str, Tensor], rows: slice) -> list[Any]:
        outputs, mask = [generate(reduced, first, output_logits=True)], first["attention_mask"]
        for question in words:
            past = outputs[-1]
            turn = next_turn(name, first, past.sequences, question[rows], mask)
            mask = turn["attention_mask"]
            cache = past[CACHE]
            outputs.append(generate(reduced, turn, **{CACHE: cache}, output_logits=True))
        return outputs

    together = chat(first, slice(None))
    for row, images in enumerate(shown):
        alone_first = batch_of(name, [images])
        ids = first["input_ids"][row][first["attention_mask"][row].bool()][None]
        alone_first |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ours, theirs in zip(together, chat(alone_first, slice(row, row + 1)), strict=True):
            assert torch.equal(ours.sequences[row, -STEPS:], theirs.sequences[0, -STEPS:])
            assert_close(logits_of(ours)[row], logits_of(theirs)[0])


def test_two_conversations_at_once() -> None:
    """What the model remembers of its latest prompt is not taken for that of another."""
    name = "qwen2_5_vl"
    reduced = reduced_model(name)
    long = prompts(name, 2)
    short = alone(name, long, 1)
    words = torch.tensor([[7, 8, 9]])
    expected = None
    for interrupted in (False, True):
        output = generate(reduced, short)
        if interrupted:
            generate(reduced, {**long, "image_grid_thw": torch.tensor([[1, 16, 8]] * 2)})
        mask = short["attention_mask"]
        conversation = next_turn(name, short, output.sequences, words, mask)
        turn = generate(reduced, conversation, **{CACHE: output[CACHE]}, output_logits=True)
        if expected is None:
            expected = logits_of(turn)
    assert torch.equal(logits_of(turn), expected)


def test_calls_continue_a_conversation_too() -> None:
    batch, reduced = prompts(NAME), reduced_model()
    output = generate(reduced, batch)
    words = torch.tensor([[5, 6, 7]])
    conversation = next_turn(NAME, batch, output.sequences, words, batch["attention_mask"])
    cache = output[CACHE]
    with masked_from(shared(NAME), alive_of(cache, batch["input_ids"])) as masked:
        expected = masked(**conversation).logits[:, -3:]
    new = conversation["input_ids"][:, cache.get_seq_length() :]
    mask = conversation["attention_mask"]
    logits = reduced(input_ids=new, attention_mask=mask, **{CACHE: cache}).logits
    assert_close(logits[:, -3:], expected)


def test_turns_that_do_not_continue_are_refused() -> None:
    batch, reduced = prompts(NAME), reduced_model()
    output = generate(reduced, batch)
    cache = output[CACHE]
    words = torch.tensor([[5, 6, 7]])
    turn = next_turn(NAME, batch, output.sequences, words, batch["attention_mask"])

    def refused(reason: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=reason):
            generate(reduced, {**turn, **changed}, **{CACHE: cache})

    refused("neither those of the cache nor", pixel_values=batch["pixel_values"] + 1)
    two = torch.cat([batch["pixel_values"]] * 2)
    refused("neither those of the cache nor", pixel_values=two)
    placeholders = torch.cat([turn["input_ids"], torch.tensor([[IMAGE] * 65])], dim=1)
    more = torch.ones_like(placeholders)
    refused("not those of the images given", input_ids=placeholders, attention_mask=more)
    seen = output.sequences[:, :-1]
    refused("do not continue", input_ids=seen[:, :0], attention_mask=torch.ones_like(seen))
    both = {name: torch.cat([turn[name]] * 2) for name in ("input_ids", "attention_mask")}
    refused("do not continue a cache of 1 row ", **both)
    with pytest.raises(ValueError, match="reads the whole text again"):
        generate(reduced, turn, **{CACHE: cache}, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("site", ["projector", "decoder.1"])
def test_masses_are_seen_in_windows_while_decoding(site: str) -> None:
    """A window holds the last keys of a space, and the bias of just these."""
    merge = Reduction(site, 0.5, gain=1.0, mass_bias=1.0, **NORM)
    reduced, batch = ReducedModel(shared("gemma3"), Policy((merge,))), prompts("gemma3", 2)
    cached = generate(reduced, batch, output_logits=True)
    anew = generate(reduced, batch, output_logits=True, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    assert_close(logits_of(cached), logits_of(anew))
