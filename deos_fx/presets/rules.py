"""Say how each preset is fitted to a model and a budget, and which of its options can be tuned.

Depths are kept in proportion: layer 2 of 32 becomes layer 1 of 10, and a preset of the vision tower
ends at the block whose output the language model uses. That is block 22 of the 24 of CLIP ViT-L in
LLaVA-1.5, and the last one in a model that uses the last. What a method ranks by is replaced where
the model lacks it, as long as the method stays itself; otherwise the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from deos_fx.presets.decoder_rules import DECODER_RULES
from deos_fx.presets.projector_rules import PROJECTOR_RULES
from deos_fx.presets.rule import Rule
from deos_fx.presets.tower_rules import TOWER_RULES

__all__ = ["RULES"]

RULES: Mapping[str, Rule] = {**DECODER_RULES, **PROJECTOR_RULES, **TOWER_RULES}
