"""The public names, their signatures, and that nothing else leaks from the package."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest

import deos_fx

PROMISED = {
    "Budget",
    "OnnxModel",
    "Policy",
    "ReducedModel",
    "SearchFront",
    "SearchResult",
    "export_onnx",
    "presets",
    "search",
    "transform",
}
PRESETS = ("fastv", "pyramid_drop", "merge", "avg_pool", "redistribute")
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def modules():
    """Every module of the package but ``__main__``, which runs the command line when imported."""
    found = pkgutil.walk_packages(deos_fx.__path__, "deos_fx.")
    return [info.name for info in found if not info.name.endswith("__main__")]


def test_promised_names_are_public():
    assert set(deos_fx.__all__) >= PROMISED


def test_nothing_leaks():
    names = {name for name in vars(deos_fx) if not name.startswith("_")}
    submodules = {name.split(".")[1] for name in modules()}
    assert names - submodules <= set(deos_fx.__all__)
    assert len(deos_fx.__all__) < 20


@pytest.mark.parametrize("name", sorted(deos_fx.__all__))
def test_public_name_is_documented(name):
    value = getattr(deos_fx, name)
    if isinstance(value, str):
        return
    assert inspect.getdoc(value), f"deos_fx.{name} has no docstring"


@pytest.mark.parametrize("name", modules())
def test_module_imports_and_keeps_its_promises(name):
    if name in ("deos_fx.harness.lmms", "deos_fx.harness.plugin"):
        # The only modules that need an extra of their own; their tests have it.
        pytest.importorskip("lmms_eval.api", reason="lmms-eval is not installed")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
    assert not missing


def test_transform_signature():
    parameters = inspect.signature(deos_fx.transform).parameters
    assert list(parameters)[:5] == ["model", "policy", "budget", "data", "example_inputs"]
    for name in ("policy", "budget", "data", "example_inputs"):
        assert parameters[name].kind is KEYWORD_ONLY
        assert parameters[name].default is None


def test_search_signature():
    parameters = inspect.signature(deos_fx.search).parameters
    assert list(parameters)[:3] == ["model", "data", "budget"]
    for name in ("budget", "budgets"):
        assert parameters[name].kind is KEYWORD_ONLY
    for member in ("policy", "history", "report"):
        fields = {field.name for field in dataclasses.fields(deos_fx.SearchResult)}
        assert member in fields or hasattr(deos_fx.SearchResult, member)


def test_budget_and_policy_signatures():
    budget = inspect.signature(deos_fx.Budget).parameters
    assert list(budget) == ["visual_tokens", "flops", "kv_cache", "latency_ms", "latency_table"]
    assert all(parameter.default is None for parameter in budget.values())
    for member in ("to_json", "from_json", "save", "load"):
        assert callable(getattr(deos_fx.Policy, member))
    assert deos_fx.Policy() == deos_fx.Policy.from_json(deos_fx.Policy().to_json())


def test_reduced_model_members():
    for member in ("generate", "cost", "explain", "save_pretrained", "from_pretrained"):
        assert callable(getattr(deos_fx.ReducedModel, member))
    assert hasattr(deos_fx.ReducedModel, "graph_module")


def test_onnx_signatures():
    export = inspect.signature(deos_fx.export_onnx).parameters
    assert list(export)[:3] == ["reduced", "dir", "example_inputs"]
    load = inspect.signature(deos_fx.OnnxModel.from_pretrained).parameters
    assert list(load)[:2] == ["dir", "device"]
    assert load["device"].default is None
    assert callable(deos_fx.OnnxModel.generate)
    assert "__call__" in vars(deos_fx.OnnxModel)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_cites_its_source(name):
    assert isinstance(deos_fx.presets, ModuleType)
    preset = getattr(deos_fx.presets, name)
    text = inspect.getdoc(preset)
    assert re.search(r"\bSources?:|\barXiv \d{4}\.\d+", text), f"{name} cites no source"
    assert isinstance(preset(), deos_fx.Policy)


def test_former_modules_hand_on_the_public_names():
    places = {"Policy": "policy", "Reduction": "policy", "ReducedModel": "reduced_model"}
    for name, module in places.items():
        former = importlib.import_module(f"deos_fx.{module}")
        assert getattr(former, name) is getattr(deos_fx, name)
