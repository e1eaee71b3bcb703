"""The record of what one reduction did to a batch of prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SiteExplanation"]


@dataclass(frozen=True, eq=False, repr=False)
class SiteExplanation:
    """The effect of one reduction: in B prompts, K of V visual tokens stayed.

    Positions are indices into the original prompt, padding included. All tensors are on the CPU.

    Attributes:
        site: The site of the reduction.
        positions_in: [B, V] positions of the visual tokens that came in.
        kept: [B, K] positions of the tokens that stayed, in their order; -1 for a copy of the CLS
            token.
        dropped: [B, V - K] positions of the others; -1 for a copy of the CLS token.
        destination: [B, K, V] how much of the content of each incoming token was added to each
            kept one, g P u of the operator; 0 for kept tokens. None if nothing was transferred.
        mass: [B, K] how many original tokens each kept one stands for.
        scores: [B, V] scores that ranked the incoming tokens; None if only their places did.
        remaining: [B, M] positions of everything that is left of the prompt, text included. Tokens
            that are not in the order of the image stand at its first placeholders, or at its last
            ones if the prompt ends there.
    """

    site: str
    positions_in: Tensor
    kept: Tensor
    dropped: Tensor
    destination: Tensor | None
    mass: Tensor
    scores: Tensor | None
    remaining: Tensor

    def __repr__(self) -> str:
        kept, incoming = self.kept.shape[1], self.positions_in.shape[1]
        went = "dropped" if self.destination is None else "merged into them"
        return (
            f"SiteExplanation({self.site}: {kept} of {incoming} visual tokens kept, the others "
            f"{went}, masses {self.mass.min():.3g} to {self.mass.max():.3g})"
        )
