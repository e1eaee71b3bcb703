"""Images in later turns of a chat, against the masked original model on the whole conversation."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from closeness import assert_close, roundings_of
from families import FAMILIES, IMAGE, PAD, TWINS, VOCABULARY, prompts, shared
from masked import masked_from
from masked_tower import tower_masked
from shortened import shortened_from
from torch import Tensor

from deos_fx.exporters.session_cache import SessionCache
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

STEPS = 3
NORM = {"scores": {"feature_norm": 1.0}}
POLICIES = {
    "projector": Policy((Reduction("projector", 0.5, **NORM),)),
    "attention": Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.5))),
    "next": Policy((Reduction("decoder.0", 0.5, observe="next"),)),
    "tower": Policy((Reduction("vision.0", 0.5, **NORM), Reduction("decoder.2", 0.5, **NORM))),
    "deep": Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.5, **NORM))),
    "nothing": Policy(),
}
# An index chooses 8 of all keys, those of earlier turns among them. Since transformers 5.24.
INDEXED = [
    case
    for case in (("dots3_note", 2, "attention"), ("hy_v4_vl", 2, "attention"))
    if case[0] in TWINS
]


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **{name: value.clone() for name, value in batch.items()},
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        # Marks of images in an answer would change the types of later tokens.
        suppress_tokens=[*range(IMAGE, VOCABULARY)],
        **options,
    )


def logits_of(output: Any) -> Tensor:
    return torch.stack(output.logits, dim=1)


def media(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs about images."""
    return {name: batch[name] for name in batch if name.startswith(("pixel", "image"))}


def other_images(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Images of the same sizes as those of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in media(batch).items()
    }


class Chat:
    """A conversation that a processor would give: a prompt with images and text in every turn."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows = name, rows
        self.prompt = prompts(name, rows)
        self.images = [media(self.prompt)]
        self.ids, self.mask = self.prompt["input_ids"], self.prompt["attention_mask"]

    def whole(self) -> dict[str, Tensor]:
        """All that has been said and shown so far; images in the order of the rows."""
        joined = {
            name: torch.cat(
                [turn[name].unflatten(0, (self.rows, -1)) for turn in self.images], dim=1
            ).flatten(0, 1)
            for name in self.images[0]
        }
        extra = (FAMILIES | TWINS)[self.name].extra(self.ids)
        return {"input_ids": self.ids, "attention_mask": self.mask, **joined, **extra}

    def show(self, answered: Tensor, seed: int) -> None:
        """After an answer, the same prompt about other images."""
        self.images.append(other_images(self.prompt, seed))
        self.say(answered, self.prompt["input_ids"])

    def say(self, answered: Tensor, words: Tensor) -> None:
        """After an answer, more words; some are padding."""
        more = answered.shape[1] - self.ids.shape[1]
        self.ids = torch.cat([answered, words], dim=1)
        real = (words != PAD).long()
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.rows, more), real], dim=1)


def alive_of(cache: Any) -> dict[int, Tensor]:
    """First layer -> which tokens of all turns it and those after it hold."""
    nothing = torch.zeros(cache.rows, cache.prompt_length, dtype=torch.bool)
    return {space.first_layer: nothing.scatter(1, space.origin, True) for space in cache.spaces}


@pytest.mark.parametrize(
    ("name", "rows", "policy"),
    [
        ("vipllava", 1, "next"),
        ("vipllava", 2, "attention"),
        ("gemma3", 2, "attention"),
        ("qwen2_5_vl", 2, "attention"),
        ("qwen2_5_vl", 1, "projector"),
        ("qwen3_vl", 2, "nothing"),
        ("qwen2_vl", 2, "tower"),
        *INDEXED,
    ],
)
def test_each_turn_is_the_masked_original_on_all_that_was_said(
    name: str, rows: int, policy: str
) -> None:
    reduced, model, chat = (
        ReducedModel(shared(name), POLICIES[policy]),
        shared(name),
        Chat(name, rows),
    )
    ours = generate(reduced, chat.whole())
    for turn in range(3):
        if turn < 2:
            chat.show(ours.sequences, turn)
        else:
            chat.say(ours.sequences, torch.tensor([[7, 8, 9]]).expand(rows, -1))
        ours = generate(reduced, chat.whole(), **{CACHE: ours[CACHE]})
        cache = ours[CACHE]
        held = {keys.keys.shape[2] for keys in cache.layers if not keys.is_sliding}
        lengths = {space.origin.shape[1] for space in cache.spaces}
        assert len(held) >= len(lengths) and max(held) <= cache.get_seq_length()
        alive = alive_of(cache)
        tower: Any = contextlib.nullcontext()
        if policy == "tower":
            # A token of Qwen2-VL is made of the next four patches.
            visual = chat.ids[:, : cache.prompt_length] == IMAGE
            kept = alive[0][visual].repeat_interleave(4)
            tower = tower_masked(model, 0, kept[None])
        with masked_from(model, alive), tower:
            theirs = generate(model, chat.whole())
        assert torch.equal(ours.sequences, theirs.sequences)
        assert_close(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("name", ["vipllava", "qwen2_5_vl"])
def test_calls_bring_images_too(name: str) -> None:
    """A call gives the new tokens and their images alone."""
    reduced, chat = ReducedModel(shared(name), POLICIES["attention"]), Chat(name, 2)
    first = reduced(**chat.whole())
    start = chat.ids.shape[1]
    chat.show(chat.ids, 5)
    whole = chat.whole()
    new = {
        key: value[:, start:] if value.shape == chat.ids.shape else value
        for key, value in whole.items()
    }
    new |= chat.images[1] | {"attention_mask": chat.mask}
    output = reduced(**new, **{CACHE: first[CACHE]})
    cache = output[CACHE]
    assert cache is first[CACHE] and cache.get_seq_length() == chat.ids.shape[1]
    if name == "vipllava":
        # Without positions, the original counts padding as well, as the reduced model does.
        whole |= {"position_ids": torch.arange(chat.ids.shape[1])[None]}
    with masked_from(shared(name), alive_of(cache)) as masked:
        expected = masked(**whole).logits
    left = cache.spaces[-1].origin[:, -output.logits.shape[1] :]
    real = chat.mask.gather(1, left).bool()
    assert_close(
        output.logits[real], expected.gather(1, left[..., None].expand_as(output.logits))[real]
    )


@pytest.mark.parametrize("rule", ["keep", "compact", "grid"])
@pytest.mark.parametrize("name", ["vipllava", "gemma3"])
def test_merged_turns_are_those_of_one_prompt(name: str, rule: str) -> None:
    """Images that are merged before the decoder, each alone, are the same in one prompt.

    So are masses that bias attention, and positions, also in the space of a later reduction.
    """
    merge = Reduction("projector", 0.25, gain=1.0, mass_bias=1.0, position=rule, **NORM)
    again = Reduction("decoder.1", 0.25, mass_bias=1.0, position=rule, **NORM)
    reduced, chat = ReducedModel(shared(name), Policy((merge, again))), Chat(name, 2)
    output = generate(reduced, chat.whole())
    chat.show(output.sequences, 3)
    turn = generate(reduced, chat.whole(), **{CACHE: output[CACHE]})
    at_once = generate(reduced, chat.whole())
    assert torch.equal(turn.sequences, at_once.sequences)
    assert_close(logits_of(turn), logits_of(at_once))


@pytest.mark.parametrize("observe", ["", "next"])
def test_tokens_are_ranked_by_attention_over_all_turns(observe: str) -> None:
    name = "vipllava"
    cut = Reduction("decoder.0", 16, scores={"last_text_attention": 1.0}, observe=observe)
    reduced, chat = ReducedModel(shared(name), Policy((cut,))), Chat(name, 1)
    first = reduced(**chat.whole())
    alive = alive_of(first[CACHE])
    start = chat.ids.shape[1]
    chat.show(chat.ids, 5)
    new = chat.images[1] | {"input_ids": chat.ids[:, start:], "attention_mask": chat.mask}
    cache = reduced(**new, **{CACHE: first[CACHE]})[CACHE]
    eager = copy.deepcopy(shared(name))
    eager.set_attn_implementation("eager")
    # The cut of the second turn is after layer 0, so `next` ranks by all of its tokens.
    alive = {1: torch.cat([alive[1], torch.ones_like(alive[1])], dim=1)}
    with masked_from(eager, alive) as masked:
        attention = masked(**chat.whole(), output_attentions=True).attentions[observe == "next"]
    received = attention[0, :, -1].mean(dim=0)
    shown = [p for p in range(start, chat.ids.shape[1]) if chat.ids[0, p] == IMAGE]
    best = sorted(shown, key=lambda p: float(received[p]), reverse=True)[:16]
    left = cache.spaces[0].origin[0]
    assert sorted(best) == [p for p in left.tolist() if p in shown]


def test_images_that_do_not_fit_are_refused() -> None:
    name = "qwen2_5_vl"
    reduced, chat = ReducedModel(shared(name), POLICIES["projector"]), Chat(name, 1)
    output = generate(reduced, chat.whole())
    chat.show(output.sequences, 4)
    held = output[CACHE].get_seq_length()
    changed = chat.whole()
    changed["pixel_values"] = changed["pixel_values"] + 1
    with pytest.raises(ValueError, match="has 2 images, but input_ids"):
        generate(reduced, changed, **{CACHE: output[CACHE]})
    # A call that is refused leaves the cache as it was.
    assert output[CACHE].get_seq_length() == held
    # The images of the new tokens alone are enough.
    alone = generate(reduced, chat.whole() | chat.images[1], **{CACHE: output[CACHE]})
    again = generate(reduced, Chat(name, 1).whole())
    whole = generate(reduced, chat.whole(), **{CACHE: again[CACHE]})
    assert torch.equal(alone.sequences, whole.sequences)


@pytest.mark.parametrize(("name", "policy"), [("qwen3_5", "deep"), ("qwen4_exp", "projector")])
def test_layers_with_a_state_go_on_from_that_of_earlier_turns(name: str, policy: str) -> None:
    """They have no keys to mask: the model's own layers run on what is left of all turns."""
    reduced, chat = ReducedModel(shared(name), POLICIES[policy]), Chat(name, 1)
    ours = generate(reduced, chat.whole())
    for turn in range(3):
        if turn < 2:
            chat.show(ours.sequences, turn)
        else:
            chat.say(ours.sequences, torch.tensor([[7, 8, 9]]))
        ours = generate(reduced, chat.whole(), **{CACHE: ours[CACHE]})
        cache, images = ours[CACHE], media(chat.whole())
        ids = ours.sequences
        new = torch.arange(cache.prompt_length, ids.shape[1])
        kept = {space.first_layer: torch.cat([space.origin[0], new]) for space in cache.spaces}
        extra = (FAMILIES | TWINS)[name].extra(ids)
        with shortened_from(shared(name), kept):
            logits = shared(name)(input_ids=ids, **images, **extra, use_cache=False).logits
        assert_close(logits_of(ours), logits[:, -STEPS - 1 : -1], roundings_of(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nemotron_h_omni", "hold no keys of their own"),
        ("llava_falcon_h1", "keep keys and a state at once"),
        ("llava_jamba", "forget their state when several tokens come at once"),
        ("glm5_next", "does not attend by a mask and a cache alone"),
    ],
)
def test_models_that_cannot_are_refused(name: str, reason: str) -> None:
    reduced, batch = ReducedModel(shared(name), POLICIES["projector"]), prompts(name)
    cache = reduced(**batch)[CACHE]
    later = batch | {"attention_mask": torch.cat([batch["attention_mask"]] * 2, dim=1)}
    with pytest.raises(ValueError, match=reason):
        reduced(**later, **{CACHE: cache})
    exported = SessionCache(reduced.config.get_text_config())
    assert "on an empty cache" in exported.why_no_images(1)


def test_rows_without_new_images_are_refused() -> None:
    name = "vipllava"
    reduced, chat = ReducedModel(shared(name), POLICIES["projector"]), Chat(name, 2)
    cache = reduced(**chat.whole())[CACHE]
    ids = prompts(name, 2)["input_ids"].clone()
    ids[1][ids[1] == IMAGE] = 5
    mask = torch.cat([chat.mask, torch.ones_like(ids)], dim=1)
    pixels = chat.images[0]["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"Rows \[1\] of this later turn have no images"):
        reduced(input_ids=ids, attention_mask=mask, pixel_values=pixels, **{CACHE: cache})
