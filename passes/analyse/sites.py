"""The places where visual tokens can be reduced, as data."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from deos_fx.policy.site import split_site

__all__ = ["Encoder", "Site", "Sites"]


class Encoder(Enum):
    """How an image encoder looks in a captured graph, which decides what its features can do.

    Attributes:
        PATCHWISE: Its blocks are nodes, and each feature is made of one patch. There are sites in
            the tower, and the attention of its blocks can be observed.
        MIXING: Its features are not made of one patch each. The features can be reduced, but
            the tokens of its blocks are others.
        OPAQUE: It is one node, since it reads sizes into Python, or since groups of patches are
            reduced inside it. Its features can be reduced only when they are already in the prompt.
    """

    PATCHWISE = auto()
    MIXING = auto()
    OPAQUE = auto()


@dataclass(frozen=True)
class Site:
    """One candidate place for a reduction.

    Attributes:
        name: ``vision.<i>``, ``projector`` or ``decoder.<i>``.
        node: Name of the graph node whose output is reduced.
        reason: Why the site cannot be used; empty if it can.
        scores: Names of the scores that can be computed there.
        lacks: Why it lacks scores that other sites of its stage have; empty if it has them all.
    """

    name: str
    node: str
    reason: str
    scores: tuple[str, ...]
    lacks: str = ""

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
            prompt; if the encoder is `Encoder.OPAQUE`, of the prompts [B, N, d] with the features
            in place.
        embeddings: Name of the node of the prompts' embeddings [B, N, d] without the features.
        encoder: How the image encoder looks in the graph.
        tower_block: Name of the node of the vision block that the features come from; if the
            encoder is not `Encoder.PATCHWISE`, the same as ``features``.
        class_tokens: Number of tokens in front of the tower's patches (CLS); they are never
            reduced.
    """

    sites: tuple[Site, ...]
    features: str
    embeddings: str
    encoder: Encoder
    tower_block: str
    class_tokens: int = 0

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise ValueError(
            f"No site {name!r} in this model. It has "
            f"{', '.join(site.name for site in self.sites if site.available)}."
        )

    def in_groups(self, name: str) -> bool:
        """Return whether a token at a site is a group of patches in the model's own tower."""
        return split_site(name)[0] == "vision" and self.encoder is not Encoder.PATCHWISE

    def usable(self, name: str, scores: Iterable[str], observed: str = "") -> Site:
        """Return a site after checking that it can be reduced and has the scores.

        Args:
            name: Name of the site.
            scores: Names of the scores that a reduction uses there.
            observed: The site after the layer that the scores observe, if that is another one.

        Returns:
            The site.

        Raises:
            ValueError: If it does not exist, cannot be used, or lacks a score.
        """
        site = self[name]
        if not site.available:
            raise ValueError(f"{name} cannot be reduced: {site.reason}. Use another site.")
        seen = self[observed or name]
        for score in scores:
            if score not in seen.scores:
                why = f" ({seen.lacks})" if seen.lacks else ""
                raise ValueError(
                    f"{name} has no score {score!r}{why}; it has {', '.join(seen.scores)}."
                )
        return site

    def limited_to(self, names: Collection[str]) -> Sites:
        """Return the same sites, of which only some can be reduced.

        Args:
            names: Their names.

        Raises:
            ValueError: If one does not exist or cannot be reduced.
        """
        for name in names:
            self.usable(name, ())
        left = [
            replace(site, reason="it is not one of the sites to search")
            if site.available and site.name not in names
            else site
            for site in self.sites
        ]
        return replace(self, sites=tuple(left))

    def available(self) -> tuple[Site, ...]:
        """Return the sites that can be used, in order of depth."""
        return tuple(site for site in self.sites if site.available)
