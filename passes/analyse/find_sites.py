"""Find the places where visual tokens can be reduced.

A site is a value that every path from the visual features to the logits passes through (a
dominator of the data flow): only there does dropping a token drop it everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.errors import CaptureError
from deos_fx.models.families import PIXELS, is_encoder
from deos_fx.models.shapes_only import ShapesOnly, shaped
from deos_fx.operator import SCORES
from deos_fx.passes.lower.open_space import has_prompt_axis
from deos_fx.passes.rewrite.fold_masked_add import visual_rows

__all__ = ["Site", "Sites", "find_sites"]


@dataclass(frozen=True)
class Site:
    """One candidate place for a reduction.

    Attributes:
        name: ``vision.<i>``, ``projector`` or ``decoder.<i>``.
        node: Name of the graph node whose output is reduced.
        reason: Why the site cannot be used; empty if it can.
        scores: Names of the scores that can be computed there.
    """

    name: str
    node: str
    reason: str
    scores: tuple[str, ...]

    @property
    def available(self) -> bool:
        """Return whether a reduction can be inserted here."""
        return not self.reason


@dataclass(frozen=True)
class Sites:
    """The sites of a captured graph and the nodes that tie images to the prompt.

    Attributes:
        sites: All candidates, in order of depth.
        features: Name of the node of the visual features [I, V, d] just before they enter the
            prompt. Where the image encoder is one node: of the prompts [B, N, d] with the features
            in place.
        embeddings: Name of the node of the prompt's embeddings [B, N, d] before the features enter.
        tower_block: Name of the node of the vision block that the features come from; the same as
            ``features`` if there is none that could be observed.
        tokens_per_image: V of one image; 0 if that depends on its size.
        class_tokens: Number of tokens in front of the tower's patches (CLS); they are never
            reduced.
        merged: Whether ``features`` names the prompts, not the features alone.
    """

    sites: tuple[Site, ...]
    features: str
    embeddings: str
    tower_block: str
    tokens_per_image: int
    class_tokens: int
    merged: bool = False

    @property
    def sees_tower(self) -> bool:
        """Return whether the features come from a block of the tower that can be observed."""
        return self.tower_block != self.features

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise ValueError(
            f"No site {name!r} in this model. It has "
            f"{', '.join(site.name for site in self.sites if site.available)}."
        )

    def usable(self, name: str, scores: Iterable[str]) -> Site:
        """Return a site after checking that it can be reduced and has the scores.

        Args:
            name: Name of the site.
            scores: Names of the scores that a reduction uses there.

        Returns:
            The site.

        Raises:
            ValueError: If it does not exist, cannot be used, or lacks a score.
        """
        site = self[name]
        if not site.available:
            raise ValueError(f"{name} cannot be reduced: {site.reason}. Use another site.")
        for score in scores:
            if score not in site.scores:
                raise ValueError(f"{name} has no score {score!r}; it has {', '.join(site.scores)}.")
        return site

    def available(self) -> tuple[Site, ...]:
        """Return the sites that can be used, in order of depth."""
        return tuple(site for site in self.sites if site.available)


# Features that can be computed wherever a block can be observed. A site has the scores whose
# features it can compute.
_ANYWHERE = frozenset(
    {"tokens", "grid", "keys", "joint_keys", "attention_mutual", "attention_mutual_max"}
)
# Features at a site whose tokens are not those of a block that could be observed.
_OF_FEATURES = frozenset({"tokens", "grid", "text_tokens", "text_mask"})
# Features where the tower has a CLS token.
_OF_CLASS_TOKEN = frozenset({"attention_cls", "attention_cls_joint"})
# Features of the text, at the projector and in the decoder.
_OF_TEXT = frozenset({"text_tokens", "text_mask"})
# Features of queries and keys of the text, in the decoder alone.
_OF_LATER_TEXT = frozenset(
    {
        "text_keys",
        "attention_last",
        "attention_text",
        "attention_text_max",
        "attention_raters",
        "attention_raters_plus",
    }
)


def find_sites(graph_module: fx.GraphModule, decoder_layers: int, vision_blocks: int) -> Sites:
    """List every site of an annotated prefill graph.

    1. If the image encoder is one opaque node, there are no sites in the tower, and the projector
       is the prompt with the features in place.
    2. If the features are not made of one patch each, there are no sites in the tower either, and
       the projector is the features.
    3. Otherwise, blocks of the tower that everything passes are sites, too.

    Args:
        graph_module: A captured and annotated graph with the inputs ``input_ids`` and
            ``pixel_values`` or ``pixel_values_videos``.
        decoder_layers: Number of decoder layers of the model.
        vision_blocks: Number of blocks of its vision tower.

    Returns:
        The sites, each with the reason if it cannot be used.

    Raises:
        CaptureError: If the visual features never enter the prompt (for example in
            cross-attention models), or enter it in a way that cannot be followed.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    pixels = [nodes[name] for name in PIXELS if name in nodes]
    merge = _merge(nodes, pixels)
    features, embeddings = _operands(nodes, _merge(nodes, pixels[:1]), pixels)
    flow = _data_flow(graph_module.graph, merge)
    # Case 1: an opaque image encoder.
    if features in _encoded(nodes):
        if _length(merge) != _length(embeddings):
            raise CaptureError(
                f"{merge.name} is the first value made of images and prompt, and it is no prompt "
                "with the images in place. Use a model with image placeholders in its prompt."
            )
        reason = "the image encoder reads the sizes of images, so it is one node of the graph"
        if PIXELS[1] in nodes:
            reason = "the video encoder reads how many frames there are, so it is one node"
        sites = [Site(f"vision.{i}", f"vision_{i}", reason, ()) for i in range(vision_blocks)]
        late = merge in _reached([nodes["decoder_0"]])
        reason = "images enter the prompt behind the first decoder layer" if late else ""
        sites.append(Site("projector", merge.name, reason, _scores_from(_OF_FEATURES)))
        sites += _decoder_sites(nodes, flow, decoder_layers)
        return Sites(tuple(sites), merge.name, embeddings.name, merge.name, 0, 0, True)
    if any(node.target is visual_rows for node in merge.all_input_nodes):
        raise CaptureError(
            "The features of images are added to the embeddings of their placeholders, which has "
            "been verified only where the image encoder reads the sizes of images. Use a model "
            "whose features take the placeholders' places."
        )
    to_features = _dominators(flow, pixels[0].name, features.name)
    tower_block = _last_block(features, nodes)
    per_image = features.meta["shape"][1]
    class_tokens = None
    if tower_block is not None:
        class_tokens = _class_tokens(graph_module, tower_block, features)
    # Case 2: no block of the tower is known, or patches are mixed between the tower and the
    # features, so that a feature belongs to no single patch.
    if tower_block is None or class_tokens is None:
        reason = "the visual tokens are made of several patches each"
        sites = [Site(f"vision.{i}", f"vision_{i}", reason, ()) for i in range(vision_blocks)]
        sites.append(Site("projector", features.name, "", _scores_from(_OF_FEATURES)))
        sites += _decoder_sites(nodes, flow, decoder_layers)
        return Sites(tuple(sites), features.name, embeddings.name, features.name, per_image, 0)
    # Case 3: one patch, one feature.
    tower_length = tower_block.meta["shape"][1]
    of_image = _ANYWHERE | (_OF_CLASS_TOKEN if class_tokens == 1 else frozenset())
    in_tower = _scores_from(of_image | ({"class_token"} if class_tokens == 1 else set()))
    sites = []
    for i in range(vision_blocks):
        reason = _why_not_in_tower(f"vision_{i}", nodes, to_features, features, tower_length)
        sites.append(Site(f"vision.{i}", f"vision_{i}", reason, () if reason else in_tower))
    # At the projector, keys of the tower's last block are for similarities only, not for scores.
    at_projector = _scores_from((of_image | _OF_TEXT) - {"keys"})
    sites.append(Site("projector", features.name, "", at_projector))
    sites += _decoder_sites(nodes, flow, decoder_layers)
    return Sites(
        tuple(sites), features.name, embeddings.name, tower_block.name, per_image, class_tokens
    )


def _decoder_sites(nodes: dict[str, fx.Node], flow: nx.DiGraph, layers: int) -> list[Site]:
    """Make the site after every decoder layer."""
    attending = _scores_from(_ANYWHERE | _OF_TEXT | _OF_LATER_TEXT)
    # A convolution attends to nothing, so there is no attention to observe. Its mask says only
    # which tokens are padding.
    masks = [nodes[f"decoder_{i}"].kwargs.get("attention_mask") for i in range(layers)]
    conv = [isinstance(mask, fx.Node) and mask.meta.get("padding") for mask in masks]
    scores = [_scores_from(_OF_FEATURES) if state else attending for state in conv]
    reasons = [_why_not_in_decoder(i, nodes, flow, layers) for i in range(layers)]
    return [
        Site(f"decoder.{i}", f"decoder_{i}", reason, scores[i]) for i, reason in enumerate(reasons)
    ]


def _rank(node: fx.Node) -> int:
    """Return the number of axes of a node's value; -1 if it is not a tensor."""
    shape = node.meta["shape"]
    return len(shape) if all(isinstance(size, int) for size in shape) else -1


def _length(node: fx.Node) -> Any:
    """Return batch size and number of tokens."""
    return node.meta["shape"][:2]


def _class_tokens(graph_module: fx.GraphModule, block: fx.Node, features: fx.Node) -> int | None:
    """Count the tokens of a tower [I, c + V, d] that are not among the features [I, V, d].

    The nodes between the blocks and the features are run on shapes with one patch less. If the
    features have one token less as well, each is made of one patch.

    Args:
        graph_module: The annotated graph.
        block: The vision block that the features come from.
        features: Their node.

    Returns:
        c, 0 or 1; None if patches are mixed between the block and the features.
    """
    shape = block.meta["shape"]
    per_image = features.meta["shape"][1]
    if len(shape) != 3 or shape[1] - per_image not in (0, 1):
        return None
    towers = [node for node in graph_module.graph.nodes if node.name.startswith("vision_")]
    blocks = [node for node in towers if node.meta["shape"] == shape]
    between = _reached(blocks)
    with ShapesOnly():
        less, dtype = (shape[0], shape[1] - 1, shape[2]), block.meta["dtype"]
        one_less = torch.empty(less, dtype=dtype, device="meta")
        values = dict.fromkeys(blocks, one_less)
        for node in graph_module.graph.nodes:
            if node in between and node not in values and features in _reached([node]):
                try:
                    values[node] = _run(graph_module, node, values)
                except (KeyError, RuntimeError, ValueError, TypeError):
                    # The nodes do not run with this number of patches, or read other values.
                    return None
                if node is features:
                    break
    return shape[1] - per_image if values[features].shape[1] == per_image - 1 else None


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


def _scores_from(features: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the scores that need only these features."""
    return tuple(name for name, score in SCORES.items() if features.issuperset(score.features))


def _why_not_in_tower(
    name: str, nodes: dict[str, fx.Node], through: set[str], features: fx.Node, tokens: int
) -> str:
    """Say why a vision block's output cannot be reduced; empty if it can.

    Args:
        name: Name of the block's node.
        nodes: All nodes by name.
        through: Names of the nodes that every path from the pixels to the features passes.
        features: Node of the features.
        tokens: Number of tokens in the tower, class tokens included.
    """
    if name not in nodes or features not in _reached([nodes[name]]):
        return "its output is not used by the language model"
    if name not in through:
        return "the visual features are also made from earlier blocks, by a path around it"
    behind = _reached([nodes[name]])
    # Nodes between the block and the features, and on side paths from the block.
    beside = behind - _reached([features])
    if any(node.target is visual_rows for node in beside):
        return "features of earlier blocks also enter the decoder"
    # A value per patch from elsewhere (a mask, a rotary table) would still have the dropped ones.
    for node in beside - {nodes[name]}:
        for value in set(node.all_input_nodes) - behind:
            shapes = pytree.tree_leaves(value.meta["shape"])
            if value.op != "get_attr" and any(tokens in shape for shape in shapes):
                return f"later blocks read {value.name}, which has a value for every token"
    return ""


def _why_not_in_decoder(i: int, nodes: dict[str, fx.Node], flow: nx.DiGraph, layers: int) -> str:
    """Say why a decoder layer's output cannot be reduced; empty if it can."""
    if i == layers - 1:
        return "no decoder layer comes after it, so nothing would be saved"
    behind = nx.descendants(flow, f"decoder_{i}")
    if any(f"decoder_{later}" not in behind for later in range(i + 1, layers)):
        return "visual tokens reach later layers by a path around it"
    for name in behind - {"output"}:
        for source in nodes[name].all_input_nodes:
            # Values with one row per prompt token are re-indexed, so they may bypass the layer.
            around = source.name not in behind and source.name != f"decoder_{i}"
            if around and source.meta["content"] and not has_prompt_axis(source):
                return f"{name} reads {source.name}, in which visual tokens cannot be told apart"
    # Layers that read the keys of an earlier layer must see the same tokens as that layer.
    shared = [node.meta["shared"] for node in nodes.values() if "shared" in node.meta]
    for maker, reader in sorted(set().union(*shared)):
        if int(maker.removeprefix("decoder_")) <= i < int(reader.removeprefix("decoder_")):
            return f"{reader} attends to keys of {maker}, which still has what is dropped here"
    return ""


def _merge(nodes: dict[str, fx.Node], pixels: Sequence[fx.Node]) -> fx.Node:
    """Find the first value made of all images and videos with a row for every prompt token.

    A value that takes only the shape or the dtype of the prompt's embeddings is not one: it must
    depend on contents.

    Args:
        nodes: All nodes by name.
        pixels: The inputs with pixels.

    Returns:
        The node that joins features and embeddings.

    Raises:
        CaptureError: If there is none, or the graph lacks text or images.
    """
    if not pixels or "input_ids" not in nodes:
        raise CaptureError("Sites are found on a graph with both input_ids and pixel_values.")
    sources = [_reached([source]) for source in pixels]
    for node in nodes.values():
        of_prompt = node.op != "output" and isinstance(node.meta["prompt_axes"], int)
        if of_prompt and node.meta["content"] and all(node in behind for behind in sources):
            # The next node adds features with a row for every position to the embeddings.
            return next(iter(node.users)) if node.target is visual_rows else node
    raise CaptureError(
        "The visual features never join the prompt's embeddings: models that read images through "
        "cross-attention are not supported. Use a model with image placeholders in its prompt."
    )


def _operands(
    nodes: dict[str, fx.Node], merge: fx.Node, pixels: Sequence[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Find the two values that meet in the merge.

    Args:
        nodes: All nodes by name.
        merge: The node that `_merge` found.
        pixels: The inputs with pixels.

    Returns:
        The features [I, V, d], or a value made of an opaque encoder's output, and the embeddings
        [B, N, d].
    """
    from_images, encoded = _reached(pixels), _encoded(nodes)
    features = next(node for node in merge.all_input_nodes if node in from_images)
    if features.target is visual_rows:
        features = features.all_input_nodes[1]
    # Back from flat features [T, d] to those with an axis of images.
    while _rank(features) != 3 and features not in encoded:
        features = next(node for node in features.all_input_nodes if node in from_images)
    embeddings = next(
        node
        for node in merge.all_input_nodes
        if node not in from_images and _rank(node) == 3 and node.meta["shape"][2] > 1
    )
    return features, embeddings


def _encoded(nodes: dict[str, fx.Node]) -> set[fx.Node]:
    """Return the opaque image and video encoders and everything after them."""
    return _reached(node for node in nodes.values() if is_encoder(node))


def _last_block(features: fx.Node, nodes: dict[str, fx.Node]) -> fx.Node | None:
    """Return the deepest vision block that the features depend on, or None."""
    blocks = [node for name, node in nodes.items() if re.fullmatch(r"vision_\d+", name)]
    return next((block for block in blocks[::-1] if features in _reached([block])), None)


def _reached(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all their descendants."""
    found: set[fx.Node] = set()
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def _data_flow(graph: fx.Graph, merge: fx.Node) -> nx.DiGraph:
    """Build the graph of values that flow from node to node; reading a shape is no flow."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        # Values with one row per prompt token are re-indexed, so they are no path around a site.
        beside = node.target is visual_rows and node not in merge.all_input_nodes
        if node.meta["content"] and not beside:
            flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return flow


def _dominators(flow: nx.DiGraph, start: str, end: str) -> set[str]:
    """Return the names of the nodes that every path from `start` to `end` passes."""
    parents = nx.immediate_dominators(flow, start)
    through = {end}
    node = end
    while node != start:
        node = parents[node]
        through.add(node)
    return through
