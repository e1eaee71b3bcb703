"""Features of the visual tokens at a site, as nodes of the graph.

A feature is asked for by name: ``keys`` are those of the block before the site, ``keys@next`` those
of the block after it, ``keys@vision.5`` those of an earlier block. All blocks in question start to
observe at once, when the features of a site are made. What is computed from the observations (such
as the values at the visual tokens) gets nodes when a feature is first looked up, so a feature that
nothing reads leaves no node.

Cost of an observation, in FLOPs for each row of the batch, with N tokens, H heads, H_kv key heads
of size D, width d, T text tokens, V visual tokens and c class tokens:

    keys, joint_keys, text_keys             0
    attention_last, attention_cls           2 H D N
    attention_cls_joint                     2 H D N
    attention_text, attention_text_max      2 H D N T
    attention_raters                        2 H D N T, and 2 d V T once for all sites
    attention_raters_plus                   2 (H + 2) D N T, and 2 d V T once for all sites
    attention_mutual, attention_mutual_max  2 H D N V; in the vision tower 2 H D N N, N = V + c
    anything @next, once                    what the next block does before it attends: mostly
                                            2 d (H + 2 H_kv) D N for queries, keys and values

Observations are shared: two features that read the same attention of the same queries of one block
cost it once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from deos_fx.attention.observation import MADE_OF, OBSERVED, Observation
from deos_fx.models.blocks import Block
from deos_fx.passes.graph import block_after, blocks_of
from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.passes.observe.observe_block import AskedNodes, observe_attention, peek_block
from deos_fx.policy.site import SITE, site_order, split_site

__all__ = ["Emit", "Maker", "SiteFeatures"]

Emit = Callable[..., Any]
"""Emits a call_function node, from a function and its arguments, at the place of insertion."""
Maker = Callable[[], Any]
"""Makes a feature at the place of insertion."""


class SiteFeatures(dict[str, Any]):
    """Features of the visual tokens at a site; a feature becomes graph nodes when it is looked up.

    The constructor lets every block in question observe what is needed from it, once. Until a
    feature is looked up, no node is added after the site, so the users of ``hidden`` are still the
    original ones.

    Args:
        graph_module: The graph. Changed in place.
        site: Name of the site.
        block: Node of the block before the site; at the projector, of the vision block that the
            features come from.
        needs: Names of the features that will be looked up, with ``@where`` if they are observed
            at another block.
        call: Emits nodes.
        reduced: Sites that were reduced before this one.
        makers: Features that are not observed (``grid``, ...).

    Attributes:
        hidden: Node of the hidden states after the block.
        anchor: The node to insert before; it stands after everything that is observed.

    Raises:
        ValueError: If a name is unknown, or asks for a block that does not exist or that saw
            other tokens than this site.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        site: str,
        block: fx.Node,
        needs: Iterable[str],
        call: Emit,
        *,
        reduced: Sequence[str] = (),
        makers: Mapping[str, Maker] | None = None,
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.site = site
        self.block = block
        self.call = call
        self.makers = dict(makers or {})
        # Name of the queries -> their nodes.
        self._asked: dict[str, AskedNodes] = {}
        # Place, observation and name of the queries -> node of what was observed.
        self._seen: dict[tuple[str, Observation, str], fx.Node] = {}
        # Names and places are checked before the graph is changed.
        wanted = self._wanted(needs)
        for where in wanted:
            self._check_space(where, reduced)
        # The next block reads tokens after the site, so it is not observed where it runs, but
        # peeked into before, when one of its features is looked up.
        self._after = wanted.pop("next", [])
        if self._after:
            self._bring_forward()
        self.hidden, self.anchor = block, block.next
        # From front to back: queries are made once, before the first block that is observed.
        for where in sorted(wanted, key=self._depth):
            self._observe(where, wanted[where])

    def __missing__(self, name: str) -> Any:
        """Make a feature when it is first looked up."""
        base, where = self._parts(name)
        if name in self.makers:
            # Case: whoever made these features gives it.
            self[name] = self.makers[name]()
        elif base in OBSERVED:
            # Case: it is observed, in the next block only now.
            if where == "next" and ("next", *OBSERVED[base]) not in self._seen:
                self._peek()
            self[name] = self._of_visual(base, self._seen[where, *OBSERVED[base]])
        else:
            # Case: it is made of other values at the site.
            self[name] = self._other(name)
        return self[name]

    # *** differences between kinds of sites ***

    def _ask(self, queries: str, hidden: fx.Node) -> AskedNodes:
        """Emit the nodes that say which queries are observed, at the place of insertion.

        Args:
            queries: Their name in `OBSERVED`: ``last``, ``text``, ``class``, ...
            hidden: Hidden states that the block gets.
        """
        raise NotImplementedError

    def _of_visual(self, name: str, seen: fx.Node) -> Any:
        """Read an observation of all tokens at the tokens that the feature is about.

        Args:
            name: Name of the feature.
            seen: Node of the observation.
        """
        raise NotImplementedError

    def _other(self, name: str) -> Any:
        """Make a feature that needs no observation of attention.

        Raises:
            ValueError: If there is no such feature.
        """
        raise ValueError(f"{self.site} has no feature {name!r}.")

    # *** observations of blocks ***

    @property
    def _own(self) -> Block:
        """Return the block before the site; only sites after a block can observe something."""
        block = note_of(self.block).block
        assert block is not None, f"{self.block.name} is no block"
        return block

    def _parts(self, name: str) -> tuple[str, str]:
        """Split the name of a feature into its own name and the place of observation.

        The place is empty for the block before the site, however it was written.
        """
        base, _, where = name.partition("@")
        return base, "" if where and where == self._own.site else where

    def _wanted(self, needs: Iterable[str]) -> dict[str, list[tuple[Observation, str]]]:
        """Sort what is needed by place of observation, without duplicates.

        Returns:
            Place -> observations there, each with the name of its queries.

        Raises:
            ValueError: If a place is given for a feature that is not observed.
        """
        wanted: dict[str, list[tuple[Observation, str]]] = {}
        for need in sorted(needs):
            name, where = self._parts(need)
            # Instead of a feature that is computed from another one, the other has to be observed.
            name = MADE_OF.get(name, name)
            if name in OBSERVED:
                there = wanted.setdefault(where, [])
                if OBSERVED[name] not in there:
                    there.append(OBSERVED[name])
            elif where:
                known = ", ".join(OBSERVED)
                raise ValueError(f"{need!r}: only attention and keys can be observed: {known}.")
        return wanted

    def _depth(self, where: str) -> tuple[int, int]:
        """Return a sort key for places of observation, from front to back."""
        return site_order(where or self._own.site)

    def _check_space(self, where: str, reduced: Sequence[str]) -> None:
        """Refuse to observe a block whose tokens are not those at the site.

        Args:
            where: The place of observation.
            reduced: Sites that were reduced before this one.

        Raises:
            ValueError: If there is no such block before the site, or a reduction between the two.
        """
        own = self._own
        # The next block is peeked into with the tokens of this site.
        observed = own.site if where in ("", "next") else where
        stage, index = split_site(observed) if re.match(SITE, observed) else ("", 0)
        if stage != own.stage or index > own.index:
            raise ValueError(
                f"{self.site} cannot observe {where!r}: it can observe 'next' and {own.stage}.0 to "
                f"{own.site}."
            )
        # Sites are reduced from front to back, so the last one is the deepest.
        # A reduction right after the observed block lies in between as well.
        if reduced and site_order(observed) <= site_order(reduced[-1]):
            raise ValueError(
                f"{self.site} observes the attention of {observed}, but {reduced[-1]} is reduced "
                f"in between: its tokens are others. Observe a block after {reduced[-1]}, or take "
                "one of the two reductions away."
            )

    def _observe(self, where: str, wanted: list[tuple[Observation, str]]) -> None:
        """Let the block before the site, or an earlier one, report observations."""
        graph = self.graph_module.graph
        block = self.block
        if where:
            stage, index = split_site(where)
            block = blocks_of(graph, stage)[index]
        # The hidden states that the block gets. Queries are made of these, before it runs.
        given: Any = block.args[0]
        with graph.inserting_before(block):
            asked = [(item, self._queries(of, given)) for item, of in wanted]
        seen, hidden, anchor = observe_attention(self.graph_module, block, asked)
        if block is self.block:
            # The site lies after everything that its own block reports.
            self.hidden, self.anchor = hidden, anchor
        for key, node in zip(wanted, seen, strict=True):
            self._seen[where, *key] = node

    def _queries(self, of: str, hidden: fx.Node) -> AskedNodes | None:
        """Return the nodes of the queries of a name; None without a name.

        They are made once: every block that is observed for this site sees the same tokens.
        """
        if of and of not in self._asked:
            self._asked[of] = self._ask(of, hidden)
        return self._asked[of] if of else None

    def _bring_forward(self) -> None:
        """Move inputs of the next block, such as the mask of its kind of layer, before this block.

        A peek into the next block stands right after this block and takes the same inputs, so they
        must be made before. Nodes that depend on this block stay where they are.
        """
        following = self._next_block()
        # Everything that the next block needs and that is made after this block.
        # A block without a node has no inputs to move.
        stack = [] if following is None else following.all_input_nodes
        late: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node > self.block and node not in late:
                late.add(node)
                stack.extend(node.all_input_nodes)
        for node in sorted(late):
            # In the order of the graph, so that the inputs of a node have moved before it, if they
            # can. A node that reads this block, or one that cannot move, stays.
            if self.block not in node.all_input_nodes and not late.intersection(
                node.all_input_nodes
            ):
                self.block.prepend(node)
                late.remove(node)

    def _next_block(self) -> fx.Node | None:
        """Return the node of the next block of the stage, if it is in the graph."""
        return block_after(self.block, self._own.stage)

    def _peek(self) -> None:
        """Observe the next block of the stage, which may be missing in the graph.

        A tower whose last blocks are not used has such blocks.

        Raises:
            ValueError: If the stage has no next block.
        """
        following = self._own.next
        blocks = note_of_graph(self.graph_module).blocks
        # Not whether it has a node: a peek runs the module itself.
        if following not in blocks:
            raise ValueError(
                f"{self.site} cannot observe 'next': no block comes after {self._own.site}."
            )
        # The peek takes the other arguments of the next block or, if that has no node, those of
        # this block.
        like = self._next_block() or self.block
        peek = f"{following.name}_at_{self.site.replace('.', '')}"
        asked = [(item, self._queries(of, self.hidden)) for item, of in self._after]
        seen = peek_block(self.graph_module, blocks[following], peek, like, self.hidden, asked)
        for key, node in zip(self._after, seen, strict=True):
            self._seen["next", *key] = node
