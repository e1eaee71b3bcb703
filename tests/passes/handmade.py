"""A vision-language model as a graph built by hand, which tests bend as they like."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from deos_fx.models.blocks import Block
from deos_fx.passes.analyse.annotate_token_spaces import annotate_token_spaces
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import GraphNote, annotate, annotate_graph
from deos_fx.tokens.layout import PromptLayout

IMAGE, WIDTH, PATCHES, BLOCKS = 9, 6, 4, 2
PROMPT = torch.tensor([[1, *[IMAGE] * PATCHES, 2, 3]])
LAYOUT = PromptLayout(image_token=IMAGE, images=1, grid=(2, 2))


def no_change(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
    """In place of something between two blocks."""
    return hidden


class Handmade:
    """Two blocks of a tower, a projector, a merge of placeholders, decoder layers and a head.

    Args:
        class_tokens: Number of tokens in front of the patches, which the features leave out.
        layers: Number of decoder layers, if it is not that of the blocks of the tower.
        **between: What is put between two nodes: ``projected`` changes the features,
            ``vision_1`` and ``decoder_1`` what these blocks read.
    """

    def __init__(
        self,
        class_tokens: int = 0,
        layers: int = BLOCKS,
        **between: Callable[[fx.Graph, fx.Node], fx.Node],
    ) -> None:
        self.graph = fx.Graph()
        self.between = between
        self.modules: dict[str, nn.Module] = {}
        self.blocks: dict[Block, nn.Module] = {}
        input_ids, pixels = map(self.graph.placeholder, ("input_ids", "pixel_values"))
        hidden = self.stack("vision", pixels, BLOCKS)
        if class_tokens:
            every = slice(None)
            key = (every, slice(class_tokens, None))
            hidden = self.graph.call_function(getitem, (hidden, key))
        features = self.changed("projected", self.leaf("projector", hidden))
        self.embeddings = self.leaf("embedding", input_ids, nn.Embedding(10, WIDTH))
        flags = self.graph.call_function(torch.eq, (input_ids, IMAGE))
        mask = self.graph.call_method("unsqueeze", (flags, -1))
        self.merged = self.graph.call_method("masked_scatter", (self.embeddings, mask, features))
        hidden = self.stack("decoder", self.merged, layers)
        logits = self.leaf("head", hidden, nn.Linear(WIDTH, 10))
        self.graph.output({"logits": logits})
        tokens = PATCHES + class_tokens
        self.inputs = {"input_ids": PROMPT, "pixel_values": torch.randn(1, tokens, WIDTH)}

    def leaf(self, name: str, argument: fx.Node, module: nn.Module | None = None) -> fx.Node:
        """One module with one argument."""
        self.modules[name] = module or nn.Linear(WIDTH, WIDTH)
        return self.graph.create_node("call_module", name, (argument,), {}, name)

    def stack(self, stage: str, hidden: fx.Node, blocks: int) -> fx.Node:
        """The blocks of a stage, one after the other."""
        for i in range(blocks):
            block = Block(stage, i)
            hidden = self.leaf(block.name, self.changed(block.name, hidden))
            self.blocks[block] = self.modules[block.name]
            annotate(hidden, block=block)
        return hidden

    def changed(self, name: str, value: fx.Node) -> fx.Node:
        return self.between.get(name, no_change)(self.graph, value)

    def module(self, **inputs: Any) -> fx.GraphModule:
        """The graph module without dead nodes, annotated for these inputs and its own."""
        graph_module = fx.GraphModule(self.modules, self.graph)
        annotate_graph(graph_module, GraphNote(ModelOutput, self.blocks))
        return annotate_token_spaces(finish(graph_module), {**self.inputs, **inputs})

    def placed(self) -> fx.GraphModule:
        """The same with an input of position ids, which reductions need."""
        with self.graph.inserting_before(self.node("input_ids")):
            self.graph.placeholder("position_ids")
        self.inputs = {"position_ids": torch.arange(PROMPT.shape[1])[None], **self.inputs}
        return self.module()

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)


def getitem(value: Tensor, key: Any) -> Tensor:
    return value[key]


class Attending(nn.Module):
    """A block that is nothing but causal attention with one head, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.config = SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask[:, 0]
        return functional.scaled_dot_product_attention(
            hidden, hidden, hidden, mask, is_causal=mask is None
        )
