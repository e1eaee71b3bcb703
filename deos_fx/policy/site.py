"""Read names of sites: ``projector``, ``decoder.<i>`` (after layer i) and ``vision.<i>``."""

from __future__ import annotations

import re

__all__ = ["SITE", "first_layer", "site_order", "split_site"]

# Digits of other scripts and leading zeros would be further names of the same site.
_LAYER = "(?:0|[1-9][0-9]{0,5})"
SITE = rf"^(?:projector|(?:vision|decoder)\.{_LAYER})$"
"""The pattern of a site's name."""


def split_site(site: str) -> tuple[str, int]:
    """Split the name of a site into its stage and its layer (0 for ``projector``).

    Raises:
        ValueError: If it is no such name.
    """
    if site == "projector":
        return site, 0
    pattern = rf"(vision|decoder)\.({_LAYER})"
    match = re.fullmatch(pattern, site) if isinstance(site, str) else None
    if match is None:
        raise ValueError(
            f"no site {site!r}; a site is 'projector', 'decoder.<i>' (after decoder layer i) or "
            f"'vision.<i>'"
        )
    return match[1], int(match[2])


def site_order(site: str) -> tuple[int, int]:
    """Return a key that sorts sites from the input of a model to its output."""
    stage, layer = split_site(site)
    return ("vision", "projector", "decoder").index(stage), layer


def first_layer(site: str) -> int:
    """Return the first decoder layer after a reduction at this site."""
    stage, layer = split_site(site)
    return layer + 1 if stage == "decoder" else 0
