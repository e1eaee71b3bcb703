"""Where visual tokens can be reduced, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import prompts, shared
from handmade import BLOCKS, PATCHES, WIDTH, Handmade
from torch import Tensor, fx, nn

from deos_fx.errors import CaptureError
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.blocks import Block
from deos_fx.models.facts import facts_of
from deos_fx.passes.analyse.find_sites import find_sites
from deos_fx.passes.analyse.sites import Encoder, Sites
from deos_fx.passes.captures import Captures
from deos_fx.passes.notes import annotate

LAST = "no decoder layer comes after it, so nothing would be saved"

Change = Callable[[fx.Graph, fx.Node], fx.Node]


def reasons(sites: Sites) -> dict[str, str]:
    return {site.name: site.reason for site in sites.sites}


def test_every_block_that_all_visual_tokens_pass_is_a_site() -> None:
    made = Handmade()
    sites = find_sites(made.module())
    assert reasons(sites) == {
        "vision.0": "",
        "vision.1": "",
        "projector": "",
        "decoder.0": "",
        "decoder.1": LAST,
    }
    assert sites.encoder is Encoder.PATCHWISE
    assert (sites.features, sites.tower_block, sites.class_tokens) == ("projector", "vision_1", 0)
    assert sites.embeddings == made.embeddings.name
    assert [site.node for site in sites.sites][:2] == ["vision_0", "vision_1"]
    assert "attention_cls" not in {score for site in sites.sites for score in site.scores}


def test_a_class_token_is_found() -> None:
    sites = find_sites(Handmade(class_tokens=1).module())
    assert sites.class_tokens == 1
    assert "cls_attention" in sites["vision.0"].scores


def pooled(graph: fx.Graph, features: fx.Node) -> fx.Node:
    pairs = graph.call_method("unflatten", (features, 1, (-1, 2)))
    return graph.call_method("mean", (pairs,), {"dim": 2})


def test_features_of_several_patches_have_no_sites_in_the_tower() -> None:
    made = Handmade(projected=pooled)
    made.inputs["pixel_values"] = torch.randn(1, 2 * PATCHES, WIDTH)
    sites = find_sites(made.module())
    assert sites.encoder is Encoder.MIXING
    assert sites["vision.0"].reason == "the visual tokens are not made of one patch each"
    assert sites["projector"].available and sites["decoder.0"].available
    assert sites["projector"].node == sites.features == sites.tower_block == "mean"


def with_their_mean(graph: fx.Graph, features: fx.Node) -> fx.Node:
    mean = graph.call_method("mean", (features,), {"dim": 1, "keepdim": True})
    return graph.call_function(torch.cat, ([mean, features], 1))


def test_an_added_token_does_not_hide_a_class_token_that_is_cut_off() -> None:
    # The tower and the features have equally many tokens, but not the same ones.
    sites = find_sites(Handmade(class_tokens=1, projected=with_their_mean).module())
    assert sites.encoder is Encoder.MIXING
    assert not sites["vision.0"].available
    assert sites["projector"].available


def with_one_in_front(graph: fx.Graph, features: fx.Node) -> fx.Node:
    flat = graph.call_method("flatten", (features, 0, 1))
    first = graph.call_method("narrow", (flat, 0, 0, 1))
    return graph.call_function(torch.cat, ([first, flat], 0))


def test_a_token_added_image_by_image_is_refused() -> None:
    # Features that are still per image have one token less than enters the prompt.
    with pytest.raises(CaptureError, match="has 5 vectors for the prompt, and projector, .* has 4"):
        find_sites(Handmade(projected=with_one_in_front).module())


class _Encoder(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels * 2


def opaque(made: Handmade) -> None:
    """Put an image encoder in the place of the tower."""
    made.modules["image_encoder"] = _Encoder()
    pixels = made.node("pixel_values")
    with made.graph.inserting_after(pixels):
        encoder = made.graph.create_node("call_module", "image_encoder", (pixels,), {})
    annotate(encoder, example=torch.empty(1, PATCHES, WIDTH))
    made.merged.replace_input_with(made.node("projector"), encoder)


def test_an_opaque_encoder_has_its_site_in_the_prompt() -> None:
    made = Handmade()
    opaque(made)
    sites = find_sites(made.module())
    assert sites.encoder is Encoder.OPAQUE
    assert sites.features == sites["projector"].node == "masked_scatter"
    assert "it is one node of the graph" in sites["vision.1"].reason
    assert len(sites.sites) == 2 * BLOCKS + 1


def around(name: str) -> Change:
    """Add the value that an earlier node has."""

    def change(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        early = next(node for node in graph.nodes if node.name == name)
        return graph.call_function(torch.add, (hidden, early))

    return change


def test_a_block_that_features_bypass_is_no_site() -> None:
    sites = find_sites(Handmade(projected=around("vision_0")).module())
    reason = "the visual features are also made from earlier blocks, by a path around it"
    assert (sites["vision.0"].reason, sites["vision.1"].reason) == ("", reason)


def test_a_block_that_nothing_reads_is_no_site() -> None:
    made = Handmade()
    made.node("projector").args = (made.node("vision_0"),)
    sites = find_sites(made.module())
    assert sites["vision.1"].reason == "its output is not used by the language model"
    assert sites.tower_block == "vision_0"


class _WithTable(nn.Module):
    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return hidden + table


def test_a_value_for_every_patch_from_elsewhere_is_in_the_way() -> None:
    made = Handmade()
    made.modules["vision_1"] = _WithTable()
    block = made.node("vision_1")
    with made.graph.inserting_before(block):
        table = made.graph.call_function(torch.zeros_like, (made.node("pixel_values"),))
    block.args = (*block.args, table)
    sites = find_sites(made.module())
    reason = "later blocks read zeros_like, which has a value for every token"
    assert (sites["vision.0"].reason, sites["vision.1"].reason) == (reason, "")


def test_a_value_of_the_prompt_may_bypass_a_layer() -> None:
    made = Handmade(decoder_1=around("masked_scatter"))
    assert find_sites(made.module())["decoder.0"].available


def with_mean(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
    merged = next(node for node in graph.nodes if node.name == "masked_scatter")
    mean = graph.call_method("mean", (merged,), {"dim": 1, "keepdim": True})
    return graph.call_function(torch.add, (hidden, mean))


def test_a_mean_over_the_prompt_may_not() -> None:
    sites = find_sites(Handmade(decoder_1=with_mean).module())
    reason = "add reads mean, in which visual tokens cannot be told apart"
    assert sites["decoder.0"].reason == reason


def test_a_layer_beside_the_others_is_no_site() -> None:
    made = Handmade()
    first, second, head = map(made.node, ("decoder_0", "decoder_1", "head"))
    second.args = (made.merged,)
    with made.graph.inserting_before(head):
        head.args = (made.graph.call_function(torch.add, (first, second)),)
    sites = find_sites(made.module())
    assert sites["decoder.0"].reason == "visual tokens reach later layers by a path around it"


def test_a_layer_whose_keys_a_later_one_reads_is_no_site() -> None:
    made = Handmade()
    annotate(made.merged, shared={(Block("decoder", 0), Block("decoder", 1))})
    reason = find_sites(made.module())["decoder.0"].reason
    assert reason == "decoder_1 attends to keys of decoder_0, which still has what is dropped here"


def test_images_that_never_enter_the_prompt_are_refused() -> None:
    made = Handmade()
    made.node("decoder_0").args = (made.embeddings,)
    with pytest.raises(CaptureError, match="never join the prompt's embeddings"):
        find_sites(made.module())


def test_a_site_that_a_model_does_not_have() -> None:
    sites = find_sites(Handmade().module())
    with pytest.raises(ValueError, match="No site 'decoder.7' in this model. It has vision.0, "):
        sites["decoder.7"]
    with pytest.raises(ValueError, match="decoder.1 cannot be reduced: no decoder layer comes"):
        sites.usable("decoder.1", ())
    with pytest.raises(ValueError, match="vision.0 has no score 'magic'; it has "):
        sites.usable("vision.0", ("magic",))
    # Its layers are no attention at all.
    with pytest.raises(ValueError, match="has no score 'magic' .the attention of its layer cannot"):
        sites.usable("decoder.0", ("magic",))


@pytest.mark.parametrize(("name", "rotated"), [("vipllava", True), ("blip-2", False)])
def test_attention_is_corrected_only_for_rotary_positions(name: str, rotated: bool) -> None:
    model = shared(name)
    found = Captures(model).serving(completed(Call.of(facts_of(model), prompts(name)))).sites
    assert found is not None
    scores = found["decoder.0"].scores
    assert ("calibrated_rater_attention" in scores) is rotated and "rater_attention" in scores
