"""The files of an export: names and version of the format, the manifest, and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.contents import EXPORT_FILES, RECORD, record_of, verify
from deos_fx.passes.lower.lower_decode import DecodeSpace, decode_spaces
from deos_fx.policy.counts import tokens_per_layer
from deos_fx.policy.policy import Policy
from deos_fx.reading import as_record

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "AGAIN",
    "FORMAT",
    "IMAGES",
    "PACKAGES",
    "POLICY",
    "VERSION",
    "WEIGHTS",
    "check_policy",
    "check_spaces",
    "dropped_tokens",
    "read_manifest",
    "spaces_of",
    "write_graphs",
    "write_weights",
]

AGAIN = "Export it again with example_inputs like these (deos-fx export --image FILE)."
"""What helps where prompts are not those that a model was exported for."""


# *** the manifest ***

# What a manifest says of itself.
FORMAT, VERSION = "onnx", 4

# The weights of all graphs; the values of images that the image encoder was exported for.
WEIGHTS, IMAGES, POLICY = "weights.data", "images.safetensors", "policy.json"

# Packages whose versions the manifest records.
PACKAGES = ("torch", "transformers", "onnx", "onnxscript")

# What the prefill graph gives of each token space.
_OF_SPACES = ("origin_", "key_bias_", "shift_")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an export, and compare the files in the folder with it.

    Args:
        folder: The folder of the export.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: If the folder has no manifest.
        ValueError: If it does not fit its schema, or the folder is incomplete or damaged.

    Warns:
        UserWarning: If an earlier version has written it, without the hashes of its files.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {RECORD}: it is not a folder that deos_fx.export_onnx wrote"
        )
    from deos_fx.exporters.schema import ManifestFile

    record = record_of(folder)
    cure = "Export the model again, or use the release that wrote it."
    manifest = as_record(path, record, ManifestFile, "the manifest of an export", cure)
    verify(folder, record, EXPORT_FILES)
    return manifest.model_dump()


def spaces_of(manifest: Mapping[str, Any]) -> list[DecodeSpace]:
    """Return the token spaces of the graphs, in order of depth."""
    names = [field.name for field in fields(DecodeSpace)]
    return [DecodeSpace(**{name: space[name] for name in names}) for space in manifest["spaces"]]


def dropped_tokens(policy: Policy, sizes: Sequence[int], layers: int) -> list[int]:
    """Return how many visual tokens of a prompt are not in each token space.

    Args:
        policy: The policy.
        sizes: Visual tokens of each image of the prompt.
        layers: Layers of the decoder.
    """
    # A reduction after the last layer leaves a space without layers.
    left = tokens_per_layer(policy, sizes, layers + 1)
    return [sum(sizes) - left[space.first_layer] for space in decode_spaces(policy)]


def check_policy(folder: Path, manifest: Mapping[str, Any]) -> Policy:
    """Compare the policy in an export with its manifest.

    Args:
        folder: The folder of the export.
        manifest: Its manifest.

    Returns:
        The policy.

    Raises:
        ValueError: If the policy is missing or damaged, or leaves other token spaces than the
            graphs have.
    """
    if not (folder / POLICY).is_file():
        raise ValueError(f"{folder} has no {POLICY}; export the model again")
    policy = Policy.load(folder / POLICY)
    spaces, exported = decode_spaces(policy), spaces_of(manifest)
    if exported != list(spaces):
        raise ValueError(
            f"{folder / POLICY} is not the policy of these graphs: it leaves {spaces}, and they "
            f"have {exported}; export the model again"
        )
    return policy


def check_spaces(
    folder: Path, manifest: Mapping[str, Any], outputs: Iterable[str], inputs: Iterable[str]
) -> None:
    """Refuse a manifest whose token spaces are not those of the graphs.

    Args:
        folder: The folder of the export.
        manifest: Its manifest.
        outputs: Names of the outputs of its prefill graph.
        inputs: Names of the inputs of its decode graph.

    Raises:
        ValueError: If the two come from different exports.
    """
    expected, moved = set(), set()
    for k, space in enumerate(manifest["spaces"], start=1):
        expected |= {f"origin_{k}"}
        expected |= {f"key_bias_{k}"} if space["biased"] else set()
        expected |= {f"shift_{k}"} if space["position"] == "grid" else set()
        moved |= {f"position_ids_{k}"} if space["position"] != "keep" else set()
    found = {name for name in outputs if name.startswith(_OF_SPACES)}
    needed = {name for name in inputs if name.startswith("position_ids_")}
    if found != expected or not needed <= moved:
        named, has = (", ".join(sorted(x)) or "none" for x in (expected | moved, found | needed))
        raise ValueError(
            f"{folder / RECORD} names spaces with {named}, but the graphs have {has}: they come "
            "from two exports. Export the model again."
        )


# *** the weights ***

# Smaller constants stay in the graph. The others start at a multiple of the page size, so that a
# runtime can map them into memory.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def write_graphs(programs: Mapping[str, onnx_ir.Model], folder: Path) -> None:
    """Write every graph under its name, and their weights once, in a file that they refer to.

    Args:
        programs: The graphs by name. Changed in place.
        folder: The folder to write to.
    """
    import onnx_ir

    # Weights before graphs, which refer to the file.
    write_weights(list(programs.values()), folder)
    for name, program in programs.items():
        onnx_ir.save(program, folder / f"{name}.onnx")


def write_weights(programs: Sequence[onnx_ir.Model], folder: Path) -> None:
    """Write every large constant of all graphs once, and let the graphs refer to the file.

    Two constants are the same if their bytes are equal. Neither names nor object identities tell
    this, since the exporter folds transposes into new constants.

    Args:
        programs: The graphs. Changed in place.
        folder: The folder to write the file to.
    """
    import onnx_ir

    # Hash of the bytes -> where they are in the file.
    places: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for value in (v for program in programs for v in program.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _EXTERNAL_BYTES:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in places:
                # Fill up with zeros to the next page.
                file.write(bytes(-file.tell() % _ALIGNMENT))
                places[key] = file.tell()
                file.write(data)
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS,
                places[key],
                len(data),
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
