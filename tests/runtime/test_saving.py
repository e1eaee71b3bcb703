"""Reduced models in folders: loaded as saved, or refused when they are saved."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from families import prompts, shared
from learned import learned_at
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import inputs, shared_llava, tiny_llava
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION

from deos_fx import transform
from deos_fx.contents import record_of, write_record
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.mark import mark, unmarked
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}
POLICY = Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)))


def adapted(**options: Any) -> Any:
    """A PeftModel, whose adapters are no identity."""
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **options}
    return get_peft_model(tiny_llava(), LoraConfig(**settings)).eval()


def with_native_adapters() -> Any:
    if Version(metadata.version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers adds adapters with peft {MIN_PEFT_VERSION} or newer")
    model = tiny_llava()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


def without_native_adapters() -> Any:
    """What transformers leaves of a layer that had an adapter is not the layer."""
    model = with_native_adapters()
    model.delete_adapter("default")
    return model


def merged_in_place() -> Any:
    model = adapted()
    model.merge_adapter()
    return model.get_base_model()


def disabled() -> Any:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model.get_base_model()


def resized_past_its_config() -> Any:
    model = tiny_llava()
    model.set_input_embeddings(nn.Embedding(150, 64))
    return model


def of_two_precisions() -> Any:
    model = tiny_llava().to(torch.bfloat16)
    for module in model.model.vision_tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "adapters": (lambda: adapted().get_base_model(), "unknown: lm_head.base_layer.*merge_and_un"),
    "disabled adapters": (disabled, "unknown: lm_head.base_layer"),
    "adapters merged in place": (merged_in_place, "unknown: lm_head.base_layer"),
    "a copied head": (
        lambda: adapted(modules_to_save=["lm_head"], target_modules=["q_proj"]).get_base_model(),
        "missing: lm_head.weight",
    ),
    "native adapters": (with_native_adapters, "writes the adapters alone.*merge_and_unload"),
    "native adapters deleted": (without_native_adapters, "unknown: .*q_proj.base_layer"),
    "an embedding of another size": (resized_past_its_config, "resized: .*embed_tokens.weight"),
    "two precisions": (of_two_precisions, r"layer_norm1.* rounded to torch.bfloat16.*model\.to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_loaded_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    model = make()
    earlier = ReducedModel(tiny_llava(), POLICY)
    earlier.save_pretrained(tmp_path / "reduced")
    kept = {entry.name: entry.read_bytes() for entry in (tmp_path / "reduced").iterdir()}
    with pytest.raises(ValueError, match=message):
        ReducedModel(model, POLICY).save_pretrained(tmp_path / "reduced")
    now = {entry.name: entry.read_bytes() for entry in (tmp_path / "reduced").iterdir()}
    assert now == kept


def resized(count: int) -> Any:
    model = tiny_llava()
    model.resize_token_embeddings(count)
    return model


def resized_and_tied() -> Any:
    model = copy.deepcopy(shared("gemma3"))
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + 3)
    return model


def untied() -> Any:
    model = copy.deepcopy(shared("gemma3"))
    model.lm_head.weight = nn.Parameter(1 + model.lm_head.weight.detach())
    return model


SAVED: dict[str, tuple[str, Callable[[], Any]]] = {
    "adapters merged": ("", lambda: adapted().merge_and_unload()),
    "adapters taken away": ("", lambda: adapted().unload()),
    "a larger vocabulary": ("", lambda: resized(140)),
    "a smaller vocabulary": ("", lambda: resized(125)),
    "a larger vocabulary, tied": ("gemma3", resized_and_tied),
    "a head that is no more tied": ("gemma3", untied),
}


@pytest.mark.parametrize("case", SAVED)
def test_loaded_as_saved(case: str, tmp_path: Path) -> None:
    name, make = SAVED[case]
    model = make().eval()
    batch = prompts(name, 2) if name else inputs(model, 2)
    ReducedModel(model, POLICY).save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, ReducedModel(model, POLICY)(**batch).logits)
        assert torch.equal(again.model(**batch).logits, model(**batch).logits)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs about the entry of a config that says how weights are compressed."""
    logger = logging.getLogger("transformers.quantizers.auto")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_transformers_says_that_it_loads_the_whole_model(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    model = tiny_llava()
    ReducedModel(model, POLICY).save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert warned.text == ""
    assert not hasattr(again.config, "quantization_config")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert "deos_fx.ReducedModel.from_pretrained applies" in warned.text
    batch = inputs(model, 2)
    with torch.no_grad():
        assert torch.equal(whole(**batch).logits, model(**batch).logits)
    # Such a model can be adapted, saved, reduced and saved again.
    adapted = get_peft_model(whole, LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    ReducedModel(adapted.merge_and_unload(), POLICY).save_pretrained(tmp_path / "again")
    ReducedModel.from_pretrained(tmp_path / "again")


def test_how_weights_are_quantised_stays_in_the_config(tmp_path: Path) -> None:
    entry = {"quant_method": "torchao", "quant_type": {"default": {}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    mark(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"quantization_config": entry}
    config = tiny_llava().config
    config.quantization_config = entry
    assert unmarked(config).quantization_config == entry


def test_learned_parts_are_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny_llava(layers=3)
    policy = Policy((learned_at("projector", 20), learned_at("decoder.1", 9)))
    ReducedModel(model, policy).save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert again.policy == policy
    batch = inputs(model, 2)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, ReducedModel(model, policy)(**batch).logits)


def test_saved_after_a_change_as_it_is_then(tmp_path: Path) -> None:
    """Adapters that come after the first call are refused, and merged ones are in what is saved."""
    model = tiny_llava()
    batch, reduced = inputs(model), ReducedModel(model, POLICY)
    reduced(**batch)
    peft_model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    with pytest.raises(ValueError, match="merge_and_unload"):
        reduced.save_pretrained(tmp_path)
    peft_model.merge_and_unload()
    reduced.save_pretrained(tmp_path)
    right = ReducedModel(model, POLICY)(**batch).logits
    assert torch.equal(ReducedModel.from_pretrained(tmp_path)(**batch).logits, right)


def recorded_anew(folder: Path) -> None:
    """Let the record say that the files are right as they are."""
    record = record_of(folder)
    write_record(folder, {name: record[name] for name in record.keys() - {"files", "sha256"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held, head: held.pop(head), "missing: lm_head.weight"),
        (lambda held, head: held.update(more=held[head] + 0), "unknown: more"),
        (lambda held, head: held.update({head: torch.ones(3, 64)}), "resized: lm_head.weight"),
    ],
)
def test_nothing_is_drawn_anew_on_loading(change: Any, message: str, tmp_path: Path) -> None:
    ReducedModel(tiny_llava(), POLICY).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    held = load_file(weights)
    change(held, next(name for name in held if name.endswith("lm_head.weight")))
    save_file(held, weights, metadata={"format": "pt"})
    recorded_anew(tmp_path)
    with pytest.raises(ValueError, match=f"does not hold the weights of the model.*{message}"):
        ReducedModel.from_pretrained(tmp_path)


# *** folders ***


@pytest.fixture(scope="module")
def reduced() -> ReducedModel:
    return transform(shared_llava(2))


def test_saving_below_a_file(tmp_path, reduced):
    file = tmp_path / "file"
    file.write_text("something")
    for target in (file, file / "below"):
        with pytest.raises(OSError, match="cannot write the folder .*file"):
            reduced.save_pretrained(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "something"


def test_saving_to_an_unwritable_folder(tmp_path, reduced, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # A folder's mode does not stop root, who may be running this.
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError, match="cannot write the folder .*model: Permission denied"):
        reduced.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_interrupted_save_leaves_the_earlier_model(tmp_path, reduced, monkeypatch):
    reduced.save_pretrained(tmp_path / "model")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()}

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(Policy, "save", fail)
    other = ReducedModel(tiny_llava(2, seed=1), Policy())
    for target in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path / target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()} == before


def test_loading_what_is_no_reduced_model(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder. Give a folder that"):
        ReducedModel.from_pretrained(tmp_path / "missing")
    tiny_llava(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no deos_fx.json.* call deos_fx.transform"):
        ReducedModel.from_pretrained(tmp_path)


def test_loading_a_damaged_reduced_model(tmp_path, reduced):
    reduced.save_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    recorded_anew(tmp_path)
    with pytest.raises(ValueError, match="policy.json is not a policy file"):
        ReducedModel.from_pretrained(tmp_path)
    for note, message in (
        ("{", "deos_fx.json is damaged: not JSON"),
        ("[]", "deos_fx.json is damaged: it is no object"),
        ("{}", 'does not say "deos_fx": "reduced_model"'),
        ('{"deos_fx": "reduced_model", "version": 9}', "version 9, and this release reads"),
        ('{"deos_fx": "reduced_model", "version": 1}', "lacks the field 'packages'. Save the"),
    ):
        (tmp_path / "deos_fx.json").write_text(note)
        with pytest.raises(ValueError, match=message):
            ReducedModel.from_pretrained(tmp_path)
