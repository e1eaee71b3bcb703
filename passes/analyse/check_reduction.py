"""Check that reductions can be inserted: sites, prompts, positions and masks allow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from deos_fx.attention.mask import attention_modules
from deos_fx.attention.observation import MADE_OF, OBSERVED
from deos_fx.forms.needs import required_features
from deos_fx.models.blocks import Block, counts_positions
from deos_fx.operator.select import SELECTORS
from deos_fx.passes.analyse.groups import OF_GROUPS
from deos_fx.passes.analyse.sites import Encoder, Site, Sites
from deos_fx.passes.graph import attends, blocks_after, blocks_of
from deos_fx.passes.notes import annotate, note_of, note_of_graph
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.tokens.layout import PromptLayout

__all__ = ["check_masks", "check_reduction"]


def check_reduction(
    graph_module: fx.GraphModule, sites: Sites, reduction: Reduction, layout: PromptLayout
) -> Site:
    """Refuse a reduction that cannot be inserted, before the graph is changed.

    Args:
        graph_module: A captured, annotated prefill graph.
        sites: Its sites.
        reduction: The reduction, which names its site.
        layout: The prompts.

    Returns:
        The reduction's site.

    Raises:
        ValueError: If the site cannot be used or lacks something that the reduction needs.
    """
    name = reduction.site
    # 1. The site exists, is available and has the scores.
    needs = required_features(reduction)
    stage, index = split_site(name)
    before_decoder = stage != "decoder"
    ahead = reduction.observe == "next" and not before_decoder
    site = sites.usable(name, reduction.scores, Block(stage, index).next.site if ahead else "")
    # Features that are observed in a block, whichever block it is (``keys``, ``keys@next``).
    hidden_from = sorted(need for need in needs if need.partition("@")[0] in (*OBSERVED, *MADE_OF))
    # 2. What is observed belongs to the tokens that are reduced.
    if stage == "projector" and hidden_from and sites.encoder is not Encoder.PATCHWISE:
        raise ValueError(
            f"{name} has no {', '.join(hidden_from)}: its tokens are not those of a block of the "
            "vision tower. Use scores and similarities of the features themselves."
        )
    deeper = [tier.selector for tier in reduction.selection if _is_of_decoder_alone(tier.selector)]
    if before_decoder and deeper:
        raise ValueError(
            f"{name}: the selector {deeper[0]!r} compares visual tokens with the text as the "
            "decoder sees both, so it works at decoder.<i> only. Choose such a site, or another "
            "selector."
        )
    _check_groups(note_of_graph(graph_module).blocks, sites, reduction, needs)
    # 3. Features that are already at their placeholders cannot change their order.
    if before_decoder and sites.encoder is Encoder.OPAQUE and reduction.order != "position":
        raise ValueError(
            f"{name}: the features of this model enter the prompt in the order of the image. Use "
            "order='position'."
        )
    # 4. The tokens have places on a grid. For a random choice, any places that differ will do.
    placeless = set(reduction.scores) == {"random"} and reduction.selector == "top_k"
    if "grid" in needs and not layout.placed and not placeless:
        raise ValueError(
            f"{name}: rows and columns of the visual tokens are not known for images of these "
            "sizes. Use scores, similarities and a selector that do not need the grid."
        )
    if "sides" in needs and layout.grids:
        raise ValueError(
            f"{name}: a learned preference by place needs images of one size, and these have "
            f"{', '.join(map(str, layout.sizes))} tokens. Leave 'place' out."
        )
    if reduction.mass_bias and stage != "vision" and _choose_keys(graph_module):
        raise ValueError(
            f"{name}: masses of tokens bias no attention, since layers of this model choose the "
            "keys that a token sees by an index, and a bias would change what they choose. Use "
            "mass_bias=0."
        )
    nodes = {node.name: node for node in graph_module.graph.nodes}
    # 5. A row is one prompt.
    if layout.packed:
        _check_packed(reduction, needs, layout.packed)
    # 6. The layers that are observed attend.
    for need in () if before_decoder else hidden_from:
        _check_attends(nodes[site.node], name, need)
    # 7. The rule for positions fits the images, and the positions of this model.
    if reduction.position == "grid" and layout.grids:
        raise ValueError(
            f"{name}: position 'grid' works for images of one size, and these have "
            f"{', '.join(map(str, layout.sizes))} tokens. Use position='keep'."
        )
    layer = note_of_graph(graph_module).blocks.get(Block("decoder", 0))
    if reduction.position != "compact" and layer is not None and counts_positions(layer):
        raise ValueError(
            f"position {reduction.position!r} works where layers are given positions, and those of "
            "this model count the tokens that they get: use position='compact'."
        )
    # Position ids [B, N] are one number per token; with several coordinates they have a third axis.
    ids = nodes["position_ids"]
    if reduction.position != "keep" and len(note_of(ids).shape) != 2:
        raise ValueError(
            f"position {reduction.position!r} works where a position is one number, and this "
            "model's have several coordinates: use position='keep'."
        )
    return site


def _choose_keys(graph_module: fx.GraphModule) -> bool:
    """Return whether layers of the decoder choose the keys that a token sees."""
    layers = blocks_of(graph_module.graph, "decoder").values()
    return any(note_of(layer).indexes for layer in layers)


def _check_groups(
    blocks: Mapping[Block, nn.Module],
    sites: Sites,
    reduction: Reduction,
    needs: frozenset[str],
) -> None:
    """Refuse what groups of patches in the vision tower do not have.

    Args:
        blocks: The blocks of the model.
        sites: The sites.
        reduction: The reduction.
        needs: Names of the features that it reads.
    """
    if not sites.in_groups(reduction.site):
        return
    others = sorted(needs - OF_GROUPS - {"sides"})
    if others:
        raise ValueError(
            f"{reduction.site} has no {', '.join(others)}: several patches make a visual token. "
            "Use scores and similarities of the patches themselves and of this block."
        )
    unseen = sorted(needs & OBSERVED.keys())
    if unseen and not attention_modules(blocks[Block("vision", split_site(reduction.site)[1])]):
        raise ValueError(
            f"{reduction.site} has no {', '.join(unseen)}: no part of its block names an attention "
            "implementation, so its attention cannot be observed. Use scores and similarities of "
            "the patches themselves."
        )
    if reduction.mass_bias:
        raise ValueError(
            f"{reduction.site}: masses of groups of patches bias no attention, since the tower's "
            "own code runs its later blocks, with windows and lengths in place of a mask of keys. "
            "Use mass_bias=0."
        )
    if sites.encoder is Encoder.MIXING:
        raise ValueError(
            f"{reduction.site}: the graph was captured for reductions after the vision tower. "
            "Use a reduced model, which captures what its policy needs."
        )


def _is_of_decoder_alone(selector: str) -> bool:
    """Return whether a selector reads hidden states after the final norm of the decoder."""
    return any(name.startswith("normed_") for name in SELECTORS[selector].features)


def _check_attends(layer: fx.Node, site: str, need: str) -> None:
    """Refuse a feature of attention of a decoder layer that does not attend.

    Args:
        layer: The layer before the site.
        site: Name of the site.
        need: Name of the feature, at the layer or the next one: ``keys``, ``keys@next``.
    """
    observed = layer
    if need.endswith("@next"):
        observed = blocks_after(layer, "decoder")[0]
    if not attends(observed):
        raise ValueError(
            f"{site} has no {need}: {observed.name} does not attend. Use scores and similarities "
            "of the hidden states themselves, or another site."
        )


def _check_packed(reduction: Reduction, needs: frozenset[str], given: str) -> None:
    """Refuse a reduction that treats a row as one prompt where it holds several samples.

    Args:
        reduction: The reduction.
        needs: Names of the features that it reads.
        given: The input that marks packed samples, in words.
    """
    of_text = sorted(need for need in needs if need.startswith(("text_", "normed_text")))
    if split_site(reduction.site)[0] == "decoder":
        reason = "the visual tokens of a row are ranked together in the decoder"
    elif of_text:
        reason = f"{', '.join(of_text)} are of all text of a row"
    elif reduction.position != "keep":
        reason = f"position {reduction.position!r} counts what is dropped in the whole row"
    else:
        return
    raise ValueError(
        f"{reduction.site}: {reason}, and there is {given}. Give every sample a row of its own, "
        "with an attention_mask [B, N] if rows are padded."
    )


def check_masks(graph_module: fx.GraphModule, packed: str) -> None:
    """Check that the model's masks stay right where tokens are dropped.

    Masks that have to be made in the original prompt, although they look plain, lose that mark.

    Args:
        graph_module: A captured, annotated prefill graph. Its annotations may change.
        packed: The input that marks packed samples, in words; empty where every row is one prompt.

    Raises:
        ValueError: If the model does not keep packed samples apart, or has other masks than plain
            causal ones and a kernel that takes them as sizes.
    """
    if packed:
        _see_borders(graph_module, packed)
    # After that: masks of packed samples are no longer plain.
    _check_kernels(graph_module)


def _see_borders(graph_module: fx.GraphModule, given: str) -> None:
    """Let masks be made in the original prompt, where positions say where samples begin.

    A mask that is not marked as plain stays in the original space (see `OpenSpaces`). In a reduced
    space, the gaps that dropped tokens leave in the positions would look like borders of samples.

    Args:
        graph_module: The graph. Its annotations change.
        given: The input that marks packed samples, in words.

    Raises:
        ValueError: If the model's masks do not keep the samples apart.
    """
    # Samples are told apart by a mask [B, 1, N, N], which is correct as it is, or by position ids.
    by_mask = bool(graph_module.graph.find_nodes(op="placeholder", target="attention_mask"))
    for node in graph_module.graph.find_nodes(op="call_module"):
        # Only masks that the decoder reads: `plain` is None for all other nodes.
        if note_of(node).plain is None or not _is_of_decoder(node):
            continue
        builder: Any = graph_module.get_submodule(str(node.target))
        if note_of(node).padding or not (by_mask or builder.keeps_apart(node.kwargs)):
            raise ValueError(
                f"There is {given}, and this model does not keep the samples of a row apart by "
                f"that (in its {node.name}). Give every sample a row of its own."
            )
        annotate(node, plain=False)


def _is_of_decoder(mask: fx.Node) -> bool:
    """Return whether decoder layers read a mask, or another mask that is made of it."""
    layers = blocks_of(mask.graph, "decoder").values()
    of_masks = [user for user in mask.users if note_of(user).is_mask]
    return any(user in layers for user in mask.users) or any(map(_is_of_decoder, of_masks))


def _check_kernels(graph_module: fx.GraphModule) -> None:
    """Refuse kernels that take windows and blocks as sizes, which reductions change."""
    for node in graph_module.graph.find_nodes(op="call_module"):
        # Plain causal masks are made anew in each space, in which sizes are right.
        if note_of(node).plain is not False:
            continue
        builder: Any = graph_module.get_submodule(str(node.target))
        implementation = str(builder.config.get_text_config()._attn_implementation)
        if implementation.startswith(("flash", "kernels")):
            raise ValueError(
                f"The attention implementation {implementation!r} has no mask of windows, "
                "blocks of image tokens and packed samples: where tokens were dropped it would "
                "count them wrongly. "
                "Load the model with attn_implementation='sdpa'."
            )
