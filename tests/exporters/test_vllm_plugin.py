"""The example plugin for vLLM: what it computes, and its classes against vLLM's sources."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

EXAMPLE = Path(__file__).parents[2] / "examples/vllm"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("deos_fx_vllm")


def _folder(path: Path, images: int = 1) -> str:
    """Write a folder whose graph adds up the columns of an image: 3 tokens of width 4."""
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, 4, 5])
    features = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, [3, 4])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [0, 3])
    node = helper.make_node("ReduceSum", ["pixel_values", "axes"], ["image_features"], keepdims=0)
    graph = helper.make_graph([node], "vision", [pixels], [features], [axes])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path / "vision.onnx")
    record = {"images": [{"placeholders": 9, "left": 3}] * images}
    (path / "deos_fx.json").write_text(json.dumps(record))
    return str(path)


def test_the_graph_encodes_images_one_by_one(plugin: Any, tmp_path: Path) -> None:
    vision = importlib.import_module("deos_fx_vllm.vision")
    folder = _folder(tmp_path)
    assert vision.tokens_per_image(folder) == 3
    pixels = torch.randn(2, 3, 4, 5)
    found = vision.VisionGraph(folder)(pixels.half())
    assert found.dtype == torch.half
    torch.testing.assert_close(found, pixels.half().float().sum(dim=3).half())


def test_an_export_of_several_images_is_refused(plugin: Any, tmp_path: Path) -> None:
    vision = importlib.import_module("deos_fx_vllm.vision")
    with pytest.raises(ValueError, match="exported for prompts of 2 images"):
        vision.tokens_per_image(_folder(tmp_path, 2))


def test_the_entry_point_registers_a_class_by_name(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, str] = {}
    vllm: Any = types.ModuleType("vllm")
    vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["deos_fx"].split(":")
    getattr(importlib.import_module(module), function)()
    ((architecture, place),) = registered.items()
    assert architecture == "LlavaForConditionalGeneration"
    module, name = place.split(":")
    assert name in _classes(EXAMPLE / f"{module.replace('.', '/')}.py")


# *** against the sources of vLLM, which are read and not run ***


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _source(module: str) -> Path:
    """Return the file of a module of vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    path = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _methods(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, list[str]]:
    """Return the arguments of all methods of a class, also of inherited ones in the same file."""
    own: dict[str, list[str]] = {}
    for base in classes[name].bases:
        found = next((n.id for n in ast.walk(base) if isinstance(n, ast.Name)), "")
        own |= _methods(found, classes) if found in classes else {}
    for node in classes[name].body:
        if isinstance(node, ast.FunctionDef):
            own[node.name] = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
    return own


def test_names_that_the_plugin_imports_are_in_the_sources() -> None:
    tree = ast.parse((EXAMPLE / "deos_fx_vllm/model.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    taken = [(node.module, a.name) for node in imports for a in node.names]
    of_vllm = [(module, name) for module, name in taken if module and module.startswith("vllm")]
    assert of_vllm
    for module, name in of_vllm:
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
        names = {getattr(node, "id", getattr(node, "name", "")) for node in ast.walk(tree)}
        assert name in names, f"{module} has no {name}"


def test_methods_that_the_plugin_overrides_have_the_same_arguments() -> None:
    theirs = _classes(_source("vllm.model_executor.models.llava"))
    ours = _classes(EXAMPLE / "deos_fx_vllm/model.py")
    for name, base in (
        ("ReducedLlavaInfo", "LlavaProcessingInfo"),
        ("ReducedLlava", "LlavaForConditionalGeneration"),
    ):
        inherited = _methods(base, theirs)
        for method, arguments in _methods(name, ours).items():
            assert inherited[method] == arguments


def test_the_registry_takes_what_the_plugin_gives() -> None:
    registry = _classes(_source("vllm.model_executor.models.registry"))
    assert _methods("_ModelRegistry", registry)["register_model"][1:] == ["model_arch", "model_cls"]
    assert '"vllm.general_plugins"' in _source("vllm.plugins").read_text(encoding="utf-8")
