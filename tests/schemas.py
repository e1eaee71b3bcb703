"""Write the schemas of the files that are read, as JSON Schema.

.venv/bin/python tests/schemas.py docs/schemas
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deos_fx.exporters.schema import GenaiFile, ManifestFile
from deos_fx.passes.search.schema import SearchFile
from deos_fx.policy.schema import LatencyFile, PolicyFile
from deos_fx.runtime.schema import NoteFile

SCHEMAS = {
    "policy": PolicyFile,
    "latency": LatencyFile,
    "onnx": ManifestFile,
    "genai": GenaiFile,
    "search": SearchFile,
    "reduced_model": NoteFile,
}
"""What a file says in its entry ``deos_fx`` -> its schema."""


def published(name: str) -> str:
    """Return a schema as it is published."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | SCHEMAS[name].model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCHEMAS:
        (folder / f"{name}.json").write_text(published(name), encoding="utf-8")
