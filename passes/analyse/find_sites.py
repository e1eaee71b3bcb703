"""Find the places where visual tokens can be reduced.

A site is a value that every path from the visual features to the logits passes through (a dominator
of the data flow). Only at such a value does dropping a token drop it everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.attention.mask import attention_modules
from deos_fx.attention.observation import OBSERVED
from deos_fx.errors import CaptureError
from deos_fx.models.blocks import Block
from deos_fx.models.families import PIXELS
from deos_fx.models.shapes_only import ShapesOnly, shaped
from deos_fx.operator import SCORES
from deos_fx.passes.analyse.flow import (
    Sweep,
    data_flow,
    dominators,
    encoded,
    find_merge,
    find_operands,
)
from deos_fx.passes.analyse.groups import OF_GROUPS, UNUSED
from deos_fx.passes.analyse.sites import Encoder, Site, Sites
from deos_fx.passes.capture.handed_on import HandedOn
from deos_fx.passes.graph import attends, blocks_of, made_of, reached
from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.passes.rewrite.fold_masked_add import visual_rows

__all__ = ["find_sites"]


def _observed(*queries: str) -> frozenset[str]:
    """Return the features that are observed of queries of these kinds."""
    return frozenset(name for name, (_, of) in OBSERVED.items() if of in queries)


# A site has the scores whose features it can compute.
#
# Features of queries and keys of the text, in the decoder alone.
_OF_LATER_TEXT = _observed("last", "text", "raters") | {"text_keys"}
# Features wherever a block can be observed.
_ANYWHERE = (_observed("", "visual") | {"tokens", "grid"}) - _OF_LATER_TEXT
# Features at a site whose tokens are not those of any block.
_OF_FEATURES = frozenset({"tokens", "grid", "text_tokens", "text_mask"})
# Features of a tower with a CLS token.
_OF_CLASS_TOKEN = _observed("class")
# Features of layers that are given rotary tables.
_OF_ROTATED = frozenset(name for name, (observed, _) in OBSERVED.items() if observed.gravity)
# Features of the text, at the projector and in the decoder.
_OF_TEXT = frozenset({"text_tokens", "text_mask"})


def find_sites(
    graph_module: fx.GraphModule, in_groups: Callable[[], Mapping[int, str]] | None = None
) -> Sites:
    """List every site of an annotated prefill graph.

    1. If the image encoder is one opaque node, the projector is the prompt with the features in
       place.
    2. If the features are not made of one patch each, the projector is the features.
    3. Otherwise, blocks of the tower that everything passes are sites, too.

    In the first two cases, blocks of the tower are sites where whole groups of patches make a
    visual token each.

    Args:
        graph_module: A captured and annotated graph with the inputs ``input_ids`` and
            ``pixel_values`` or ``pixel_values_videos``.
        in_groups: Says for each vision block, by its index, why groups of patches cannot be reduced
            after it; empty if they can. None if nothing is known of such groups.

    Returns:
        The sites, each with the reason if it cannot be used.

    Raises:
        CaptureError: If the visual features never enter the prompt (for example in
            cross-attention models), or enter it in a way that cannot be followed.
    """
    graph = graph_module.graph
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    pixels = [inputs[name] for name in PIXELS if name in inputs]
    # With images and videos, the last merge has both. The features are looked for at the first one.
    merge = find_merge(graph, pixels)
    features, embeddings = find_operands(find_merge(graph, pixels[:1]), pixels)
    if len(pixels) > 1:
        # Images and videos come from an encoder each.
        in_groups = None
    flow = data_flow(graph, merge)
    in_decoder = _decoder_sites(graph_module, flow)
    if features in encoded(graph):
        # Case 1: an opaque image encoder.
        # The merge must have a row for every prompt token.
        if note_of(merge).shape[:2] != note_of(embeddings).shape[:2]:
            raise CaptureError(
                f"{merge.name} is the first value made of images and prompt, and it is no prompt "
                "with the images in place. Use a model with image placeholders in its prompt."
            )
        reason = "the image encoder reads the sizes of images, so it is one node of the graph"
        if PIXELS[1] in inputs:
            reason = "the video encoder reads how many frames there are, so it is one node"
        # Some models add images to the hidden states between two layers.
        late = merge in reached([blocks_of(graph, "decoder")[0]])
        why_not = "images enter the prompt after the first decoder layer" if late else ""
        projector = Site("projector", merge.name, why_not, _scores_from(_OF_FEATURES))
        return Sites(
            (*_sites_of_groups(graph_module, in_groups, reason), projector, *in_decoder),
            merge.name,
            embeddings.name,
            Encoder.OPAQUE,
            merge.name,
        )
    if any(node.target is visual_rows for node in merge.all_input_nodes):
        raise CaptureError(
            "The features of images are added to the embeddings of their placeholders, which has "
            "been verified only where the image encoder reads the sizes of images. Use a model "
            "whose features take the placeholders' places."
        )
    tower_block = _last_block(features)
    class_tokens = None
    if tower_block is not None:
        class_tokens = _class_tokens(graph_module, tower_block, features)
    if tower_block is None or class_tokens is None:
        # Case 2: no block of the tower is known, or patches are mixed between the tower and the
        # features, so no feature belongs to a single patch.
        reason = "the visual tokens are not made of one patch each"
        projector = _projector(features, embeddings, _OF_FEATURES)
        return Sites(
            (*_sites_of_groups(graph_module, in_groups, reason), projector, *in_decoder),
            features.name,
            embeddings.name,
            Encoder.MIXING,
            features.name,
        )
    # Case 3: one patch, one feature.
    of_image = _ANYWHERE | (_OF_CLASS_TOKEN if class_tokens == 1 else frozenset())
    in_tower = _scores_from(of_image | ({"class_token"} if class_tokens == 1 else set()))
    tokens = note_of(tower_block).shape[1]
    # Blocks whose output nothing uses have no node, and so no entry in `reasons`.
    reasons = _why_not_in_tower(graph, dominators(flow, pixels[0], features), features, tokens)
    vision = [
        _site_after(block, reason, () if reason else in_tower)
        for block in _blocks(graph_module, "vision")
        for reason in [reasons.get(block.index, UNUSED)]
    ]
    # At the projector, keys of the tower's last block are for similarities only, not for scores.
    projector = _projector(features, embeddings, (of_image | _OF_TEXT) - {"keys"})
    return Sites(
        (*vision, projector, *in_decoder),
        features.name,
        embeddings.name,
        Encoder.PATCHWISE,
        tower_block.name,
        class_tokens,
    )


def _blocks(graph_module: fx.GraphModule, stage: str) -> list[Block]:
    """Return the model's blocks of a stage, in order."""
    return sorted(block for block in note_of_graph(graph_module).blocks if block.stage == stage)


def _site_after(block: Block, reason: str, scores: tuple[str, ...]) -> Site:
    """Make the site after a block."""
    return Site(block.site, block.name, reason, scores)


def _projector(features: fx.Node, embeddings: fx.Node, known: frozenset[str]) -> Site:
    """Make the site of the visual features.

    Args:
        features: Their node.
        embeddings: Node of the embeddings of the text.
        known: The features that scores have there.
    """
    if note_of(features).shape[-1] == note_of(embeddings).shape[-1]:
        return Site("projector", features.name, "", _scores_from(known))
    # Case: some module still follows that makes the features as wide as the text (Llama 4).
    scores = _scores_from(known - _OF_TEXT)
    return Site("projector", features.name, "", scores, "its tokens are not as wide as the text's")


def _sites_of_groups(
    graph_module: fx.GraphModule, in_groups: Callable[[], Mapping[int, str]] | None, unknown: str
) -> list[Site]:
    """Make the sites of a tower of which groups of patches make a visual token each.

    Args:
        graph_module: The annotated graph.
        in_groups: As in `find_sites`.
        unknown: The reason where nothing is known of groups.
    """
    blocks = _blocks(graph_module, "vision")
    reasons = in_groups() if in_groups and blocks else {}
    modules = note_of_graph(graph_module).blocks
    sites = []
    for block in blocks:
        reason = reasons.get(block.index, unknown)
        seen = bool(attention_modules(modules[block]))
        features = OF_GROUPS if seen else OF_GROUPS - OBSERVED.keys()
        sites.append(_site_after(block, reason, () if reason else _scores_from(features)))
    return sites


def _decoder_sites(graph_module: fx.GraphModule, flow: nx.DiGraph) -> list[Site]:
    """Make the site after every decoder layer."""
    graph, modules = graph_module.graph, note_of_graph(graph_module).blocks
    features = _ANYWHERE | _OF_TEXT | _OF_LATER_TEXT
    rotated, attending = _scores_from(features), _scores_from(features - _OF_ROTATED)
    attending_to_nothing = _scores_from(_OF_FEATURES)
    layers = blocks_of(graph, "decoder")
    reasons = _why_not_in_decoder(graph, layers, flow)
    sites = []
    for i, layer in layers.items():
        block = Block("decoder", i)
        if not attention_modules(modules[block]) and attends(layer):
            # Case: attention without a name of an implementation, which cannot be observed.
            unseen = Site(block.site, block.name, reasons[i], attending_to_nothing, _NO_SEAM)
            sites.append(unseen)
        elif attends(layer):
            scores = rotated if _is_rotated(layer) else attending
            sites.append(_site_after(block, reasons[i], scores))
        else:
            # Case: a convolution, a layer with a state, or one that looks at each token alone.
            none = Site(block.site, block.name, reasons[i], attending_to_nothing, _NO_ATTENTION)
            sites.append(none)
    return sites


def _is_rotated(layer: fx.Node) -> bool:
    """Return whether a layer is given rotary tables [B, N, D], by which attention is corrected."""
    tables = pytree.tree_leaves(layer.kwargs.get("position_embeddings"))
    nodes = [table for table in tables if isinstance(table, fx.Node)]
    shapes = pytree.tree_leaves([note_of(node).shape for node in nodes])
    return bool(shapes) and all(len(shape) == 3 for shape in shapes)


def _scores_from(features: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the scores that need only these features."""
    return tuple(name for name, score in SCORES.items() if features.issuperset(score.features))


# *** the tower ***


def _last_block(features: fx.Node) -> fx.Node | None:
    """Return the deepest vision block that the features depend on, or None."""
    # A model may leave out the last blocks of its tower.
    needed = made_of(features)
    blocks = [block for block in blocks_of(features.graph, "vision").values() if block in needed]
    return blocks[-1] if blocks else None


def _class_tokens(graph_module: fx.GraphModule, block: fx.Node, features: fx.Node) -> int | None:
    """Count the tokens of a tower [I, c + V, d] that are not among the features [I, V, d].

    The nodes between the blocks and the features are run on shapes with one patch less. If the
    features have one token less as well, and no node adds tokens to those it takes, each feature is
    made of one patch. An added token could hide that another one was cut off.

    Args:
        graph_module: The annotated graph.
        block: The vision block that the features come from.
        features: Their node.

    Returns:
        c, 0 or 1; None if patches are mixed between the block and the features.
    """
    shape = note_of(block).shape
    per_image = note_of(features).shape[1]
    if len(shape) != 3 or shape[1] - per_image not in (0, 1):
        # Case: there is not one feature for each patch, a CLS token aside.
        return None
    towers = blocks_of(graph_module.graph, "vision").values()
    # A tower may have stages of other widths: only blocks of this shape get the shorter value.
    blocks = [node for node in towers if note_of(node).shape == shape]
    between = reached(blocks) & made_of(features)
    with ShapesOnly():
        less, dtype = (shape[0], shape[1] - 1, shape[2]), note_of(block).dtype
        one_less = torch.empty(less, dtype=dtype, device="meta")
        values = dict.fromkeys(blocks, one_less)
        # In the order of the graph, so every input of a node is known before the node.
        for node in graph_module.graph.nodes:
            if node in between and node not in values:
                try:
                    values[node] = _run(graph_module, node, values)
                except (KeyError, RuntimeError, ValueError, TypeError):
                    # Case: the nodes do not run with one patch less (they arrange patches in a
                    # square), or they read values from elsewhere.
                    return None
                taken = [values[source] for source in node.all_input_nodes if source in values]
                most = max(map(_tokens, taken))
                # What is made of sizes alone takes no tokens; what joins it to some does.
                if most and _tokens(values[node]) > most:
                    return None
    return shape[1] - per_image if values[features].shape[1] == per_image - 1 else None


def _tokens(value: Any) -> int:
    """Return the number of tokens of a value [I, T, ...], or of the largest of several."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return max((tensor.shape[1] for tensor in tensors if tensor.ndim > 1), default=0)


def _run(graph_module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Run one node on shapes, given the values of its inputs."""
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_module":
        return shaped(graph_module.get_submodule(target))(*args, **kwargs)
    return (
        getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_method"
        else target(*args, **kwargs)
    )


_NO_SEAM = "the attention of its layer cannot be observed: no scores by attention or keys"

_NO_ATTENTION = "its layer does not attend: no scores by attention or keys"


def _why_not_in_tower(
    graph: fx.Graph, through: set[fx.Node], features: fx.Node, tokens: int
) -> dict[int, str]:
    """Say for each vision block in the graph why its output cannot be reduced; empty if it can.

    1. Nothing that the language model reads depends on it.
    2. Some path from the pixels to the features goes around it.
    3. Other features than those at the projector (DeepStack's) are made after it.
    4. A value with a row per patch that comes from elsewhere (a mask, a rotary table) is read after
       it, and would still have the rows of dropped patches.

    Args:
        graph: The annotated graph.
        through: The nodes that every path from the pixels to the features passes.
        features: Node of the features.
        tokens: Number of tokens in the tower, class tokens included.
    """
    used, later = made_of(features), reached([features])
    other_features = graph.find_nodes(op="call_function", target=visual_rows)
    # What comes after a block, up to the features, and on side paths from the block.
    sweep = Sweep(lambda node: (user for user in node.users if user not in later))
    reasons = {}
    for i, block in reversed(blocks_of(graph, "vision").items()):
        reasons[i] = ""
        if block not in used:
            reasons[i] = UNUSED  # Case 1.
        elif block not in through:
            # Case 2.
            reasons[i] = (
                "the visual features are also made from earlier blocks, by a path around it"
            )
        else:
            sweep.back_to(block)
            if any(node in sweep.after for node in other_features):
                # Case 3.
                reasons[i] = "features of earlier blocks also enter the decoder"
            for value in sweep.beside:
                shapes = pytree.tree_leaves(note_of(value).shape)
                per_patch = value.op != "get_attr" and any(tokens in shape for shape in shapes)
                if per_patch and not reasons[i]:
                    # Case 4.
                    reasons[i] = (
                        f"later blocks read {value.name}, which has a value for every token"
                    )
    return reasons


# *** the decoder ***

_OF_KEYS = "attends to keys of"


def _why_not_in_decoder(
    graph: fx.Graph, layers: Mapping[int, fx.Node], flow: nx.DiGraph
) -> dict[int, str]:
    """Say for each decoder layer why its output cannot be reduced; empty if it can.

    1. No layer comes after it.
    2. Some later layer does not depend on it.
    3. A value from elsewhere is read after it, and the visual tokens in this value cannot be told
       apart. (A value with one row per prompt token can be re-indexed, so it may go around the
       layer.)
    4. A later layer attends to the keys of this layer or an earlier one, or reads what that hands
       on, so both must have the same tokens.
    """
    pairs = sorted(
        (maker, reader, "takes what is handed on by" if node.target is HandedOn else _OF_KEYS)
        for node in graph.nodes
        for maker, reader in note_of(node).shared or ()
    )
    # From the last layer to the first, as a sweep wants it.
    sweep = Sweep(flow.successors)
    reasons = {}
    for i, layer in sorted(layers.items(), reverse=True):
        whole = sweep.back_to(layer)
        mixed = (
            (reader, source)
            for source, reader in sweep.beside.items()
            if note_of(source).content and not note_of(source).has_prompt_axis
        )
        sharing = (pair for pair in pairs if pair[0].index <= i < pair[1].index)
        reasons[i] = ""
        if i == max(layers):
            # Case 1.
            reasons[i] = "no decoder layer comes after it, so nothing would be saved"
        elif not whole:
            # Case 2.
            reasons[i] = "visual tokens reach later layers by a path around it"
        elif (found := next(mixed, None)) is not None:
            # Case 3.
            reader, source = found
            reasons[i] = (
                f"{reader.name} reads {source.name}, in which visual tokens cannot be told apart"
            )
        elif (two := next(sharing, None)) is not None:
            # Case 4.
            maker, later, takes = two
            reasons[i] = f"{later.name} {takes} {maker.name}, which still has what is dropped here"
    return reasons
