"""Give a prefill graph an input that says which tokens a reduction may look at."""

from __future__ import annotations

from torch import fx

from deos_fx.passes.analyse.annotate_token_spaces import PROMPT_MASK
from deos_fx.passes.finish import finish

__all__ = ["mark_prompt"]


def mark_prompt(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Add the input ``prompt_mask`` [B, N]: 1 for real tokens before the answer, 0 for others.

    A model is trained and searched on prompts with their answers behind them, but it reduces
    before it answers. So scores that read the text must not see the answer: they read this mask in
    place of the attention mask.

    Args:
        graph_module: A captured prefill graph. Changed in place.

    Returns:
        The same graph module.
    """
    graph = graph_module.graph
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        graph.placeholder(PROMPT_MASK)
    return finish(graph_module)
