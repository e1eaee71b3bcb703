"""Tell lmms-eval of the model ``deos_fx``: the entry point in the group ``lmms_eval.models``."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["MANIFEST"]

# The classes are imported when the model is chosen, so that listing models stays quick.
MANIFEST = ModelManifest(
    model_id="deos_fx",
    chat_class_path="deos_fx.harness.lmms.ChatModel",
    simple_class_path="deos_fx.harness.lmms.SimpleModel",
)
