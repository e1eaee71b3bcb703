"""Features of attention against the model's own attention weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_onnx_close
from oracle import masked_keys
from tiny import IMAGE, VISUAL, call_of, inputs, shared_llava, tiny_llava
from torch import Tensor, fx
from transformers import LlavaForConditionalGeneration

from deos_fx import tokens
from deos_fx.attention.observation import OBSERVED, Observation
from deos_fx.attention.seam import ObservedBlock, PeekedBlock
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.upstream import CACHE
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import annotate_graph, note_of_graph
from deos_fx.passes.observe.site_features import PromptFeatures, PromptText, TowerFeatures
from deos_fx.passes.pipeline import Captured, capture_call, run_graph
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache

LAYERS = 4
TOWER_BLOCK = 1


class Features:
    """The features of one site of a fresh graph, evaluated."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        given: Mapping[str, Any],
        *,
        images: int = 1,
        alive: bool = False,
    ) -> None:
        self.model = model
        self.images = images
        call = call_of(model, {"use_cache": False, **given})
        self.given = call.inputs
        self.captured: Captured = capture_call(model, self.given)
        self.graph_module = self.captured.graph_module
        self.graph = self.graph_module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        layout = call.layout
        ids = self.nodes["input_ids"]
        with self.graph.inserting_after(ids):
            count = images * VISUAL
            self.visual = self.call(tokens.visual_positions, ids, layout.image_token, count)
        with self.graph.inserting_after(self.visual):
            self.alive = self.graph.placeholder("alive") if alive else None

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def at(self, site: str, *needs: str, reduced: tuple[str, ...] = ()) -> dict[str, Tensor]:
        sites = self.captured.sites
        assert sites is not None
        block = self.nodes[sites.tower_block if site == "projector" else site.replace(".", "_")]
        if site.startswith("decoder"):
            text = self.text(self.nodes["decoder_0"].args[0], self.nodes["decoder_0"])
            features: Any = PromptFeatures(
                self.graph_module,
                site,
                block,
                needs,
                self.call,
                visual=self.visual,
                padding=lambda: self.nodes.get("attention_mask"),
                text=text,
                alive=self.alive,
                reduced=reduced,
            )
        else:
            features = TowerFeatures(
                self.graph_module,
                site,
                block,
                needs,
                self.call,
                class_tokens=sites.class_tokens,
                text=self.text(self.nodes[sites.embeddings], None),
                images=self.images,
                alive=self.alive,
                reduced=reduced,
            )
        anchor = self.nodes[sites.features].next if site == "projector" else features.anchor
        with self.graph.inserting_before(anchor):
            made = {need: features[need] for need in needs}
        self.graph.output_node().args = (made,)
        finish(self.graph_module)
        with torch.no_grad():
            return run_graph(self.graph_module, self.given)

    def text(self, embeddings: Any, before: fx.Node | None) -> PromptText:
        mask = self.nodes.get("attention_mask")
        return PromptText(self.call, embeddings, self.visual, mask, self.alive, before)


def features_at(
    model: LlavaForConditionalGeneration, given: Mapping[str, Any], site: str, *needs: str
) -> dict[str, Tensor]:
    images = len(given["pixel_values"]) // len(given["input_ids"])
    return Features(model, given, images=images).at(site, *needs)


class Truth:
    """The attention weights, keys and states that the model itself reports."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.model = shared_llava(LAYERS, "eager")
        self.ids = given["input_ids"]
        self.mask = given.get("attention_mask", torch.ones_like(self.ids))
        self.projected: dict[str, Tensor] = {}
        core = self.model.model
        blocks = [("decoder", core.language_model.layers)]
        blocks += [("vision", core.vision_tower.encoder.layers)]
        handles = [
            getattr(block.self_attn, kind).register_forward_hook(self._note(f"{stage}.{i}", kind))
            for stage, stack in blocks
            for i, block in enumerate(stack)
            for kind in ("q_proj", "k_proj")
        ]
        handles.append(core.language_model.layers[0].register_forward_pre_hook(self._note_input))
        with torch.no_grad():
            output = self.model(**given, output_attentions=True, output_hidden_states=True)
            tower = core.vision_tower(given["pixel_values"], output_attentions=True)
        for handle in handles:
            handle.remove()
        self.hidden = output.hidden_states
        self.decoder = output.attentions
        self.vision = tower.attentions

    def _note(self, name: str, kind: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            self.projected[f"{name}.{kind}"] = output

        return hook

    def _note_input(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.embeddings = args[0]

    def visual(self, row: int) -> Tensor:
        return (self.ids[row] == IMAGE).nonzero()[:, 0]

    def text(self, row: int) -> Tensor:
        return ((self.ids[row] != IMAGE) & (self.mask[row] == 1)).nonzero()[:, 0]

    def question(self, row: int) -> Tensor:
        text = self.text(row)
        return text[text > self.visual(row).max()]

    def raters(self, row: int) -> Tensor:
        """SparseVLM: text tokens called up by the image more than average, one prompt at a time."""
        question = self.question(row)
        seen, asked = self.embeddings[row, self.visual(row)], self.embeddings[row, question]
        called = (seen @ asked.T).softmax(dim=1).mean(dim=0)
        return question[called > called.mean()]

    def gravity(self, row: int, dim: int) -> Tensor:
        """[N, N]: products of all-ones queries and keys after rotation, over sqrt(D)."""
        positions = (self.mask[row].cumsum(0) - 1).clamp(min=0)
        theta = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        distance = (positions[:, None] - positions[None]).float()
        return 2 * (distance[..., None] * theta).cos().sum(dim=-1) / math.sqrt(dim)


CASES = [
    pytest.param({"batch": 1, "padding": None}, id="one"),
    pytest.param({"batch": 3, "padding": "left"}, id="three, padded left"),
    pytest.param({"batch": 2, "padding": "right"}, id="two, padded right"),
    pytest.param({"batch": 2, "images": 2, "layout": "between"}, id="text between two images"),
]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_prompt_features(case: dict[str, Any], attn: str) -> None:
    model = shared_llava(LAYERS, attn)
    given = inputs(model, text=6, **case)
    truth = Truth(given)
    needs = ("attention_last", "attention_text", "attention_text_max", "attention_raters")
    needs += ("attention_mutual", "attention_mutual_max", "joint_keys", "keys", "text_mask")
    seen = features_at(model, given, "decoder.1", *needs, "text_tokens")
    for row in range(len(given["input_ids"])):
        attention, visual, text = truth.decoder[1][row], truth.visual(row), truth.text(row)
        mean, most = attention.mean(dim=0), attention.amax(dim=0)
        expected = {
            "attention_last": mean[truth.text(row).max(), visual],
            "attention_text": mean[text][:, visual].mean(dim=0),
            "attention_text_max": most[text][:, visual].mean(dim=0),
            "attention_raters": mean[truth.raters(row)][:, visual].mean(dim=0),
            "attention_mutual": mean[visual][:, visual].mean(dim=0),
            "attention_mutual_max": most[visual][:, visual].mean(dim=0),
        }
        for name, value in expected.items():
            assert_close(seen[name][row], value)
        there = seen["text_mask"][row].bool()
        states = truth.hidden[2][row, truth.question(row)]
        assert_close(seen["text_tokens"][row][there], states)
    assert seen["joint_keys"].shape[-1] == 2 * seen["keys"].shape[-1]
    halves = seen["joint_keys"].unflatten(-1, (2, -1)).mean(dim=-2)
    assert_close(halves, seen["keys"])


@pytest.mark.parametrize("case", CASES)
def test_raters_with_gravity_and_strongest_heads(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_heads = (Observation(strongest=2, gravity=True), "raters")
    monkeypatch.setitem(OBSERVED, "attention_raters_plus", two_heads)
    model = shared_llava(LAYERS)
    given = inputs(model, text=6, **case)
    truth = Truth(given)
    seen = features_at(model, given, "decoder.2", "attention_raters_plus")
    for row in range(len(given["input_ids"])):
        corrected = truth.decoder[2][row] / truth.gravity(row, 16)
        rows = corrected[:, truth.raters(row)][:, :, truth.visual(row)]
        best = rows.sum(dim=(1, 2)).topk(2).indices
        expected = rows[best].mean(dim=(0, 1))
        # Where the cosines of a distance nearly cancel, dividing by their sum amplifies that angles
        # of 100 radians are rounded.
        assert_close(seen["attention_raters_plus"][row], expected, 64)


@pytest.mark.parametrize("batch, images", [(1, 1), (3, 1), (2, 2)])
def test_tower_features(batch: int, images: int) -> None:
    model = shared_llava(LAYERS)
    given = inputs(model, batch, images)
    truth = Truth(given)
    needs = ("attention_cls", "attention_cls_joint", "attention_mutual", "joint_keys", "keys")
    for site in ("vision.1", "projector"):
        seen = features_at(model, given, site, *needs)
        attention = truth.vision[TOWER_BLOCK]
        keys = truth.projected["vision.1.k_proj"]
        joint = truth.projected["vision.1.q_proj"][:, :1] @ keys.mT * keys.shape[-1] ** -0.5
        expected = {
            "attention_cls": attention.mean(dim=1)[:, 0, 1:],
            "attention_cls_joint": joint.softmax(dim=-1)[:, 0, 1:],
            "attention_mutual": attention.mean(dim=(1, 2))[:, 1:],
            "joint_keys": keys[:, 1:],
            "keys": keys[:, 1:].unflatten(-1, (4, -1)).mean(dim=-2),
        }
        for name, value in expected.items():
            assert_close(seen[name], value)


def test_text_at_the_projector_is_that_of_each_image_s_prompt() -> None:
    model = shared_llava(LAYERS)
    given = inputs(model, 2, 2)
    truth = Truth(given)
    seen = features_at(model, given, "projector", "text_tokens", "text_mask")
    for image in range(4):
        row = image // 2
        there = seen["text_mask"][image].bool()
        expected = truth.embeddings[row, truth.question(row)]
        assert_close(seen["text_tokens"][image][there], expected)


def test_class_token_of_a_vision_site() -> None:
    model = shared_llava(LAYERS)
    seen = features_at(model, inputs(model), "vision.0", "class_token", "keys")
    assert seen["class_token"].shape == (1, 1, 48)


@pytest.mark.parametrize("case", CASES)
def test_next_layer_and_earlier_layers(case: dict[str, Any]) -> None:
    model = shared_llava(LAYERS)
    given = inputs(model, **case)
    truth = Truth(given)
    needs = ("attention_last", "attention_last@next", "attention_last@decoder.0", "keys@next")
    seen = features_at(model, given, "decoder.1", *needs)
    for name, layer in zip(needs, (1, 2, 0), strict=False):
        for row in range(len(given["input_ids"])):
            last = truth.text(row).max()
            expected = truth.decoder[layer][row].mean(dim=0)[last, truth.visual(row)]
            assert_close(seen[name][row], expected)


def test_blocks_that_are_not_in_the_graph_can_be_peeked_into() -> None:
    model = shared_llava(LAYERS)
    given = inputs(model, 2)
    truth = Truth(given)
    seen = features_at(
        model, given, "projector", "attention_cls@next", "joint_keys@next", "attention_cls@vision.0"
    )
    for name, block in (("attention_cls@next", 2), ("attention_cls@vision.0", 0)):
        expected = truth.vision[block].mean(dim=1)[:, 0, 1:]
        assert_close(seen[name], expected)
    expected = truth.projected["vision.2.k_proj"][:, 1:]
    assert_close(seen["joint_keys@next"], expected)


def test_each_block_is_observed_once() -> None:
    model = shared_llava(LAYERS)
    site = Features(model, inputs(model))
    needs = ("attention_last", "attention_text", "keys", "joint_keys", "text_keys")
    site.at("decoder.1", *needs, *(f"{name}@next" for name in needs), "keys@decoder.1")
    modules = [m for m in site.graph_module.modules() if isinstance(m, ObservedBlock)]
    assert [type(module) for module in modules] == [ObservedBlock, PeekedBlock]
    assert [len(module.observe) for module in modules] == [4, 4]


def test_a_peek_leaves_the_cache_alone() -> None:
    model = shared_llava(LAYERS)
    given = inputs(model)
    site = Features(model, {**given, "use_cache": True})
    cache = site.given[CACHE] = ReducedCache(model.config.get_text_config())
    site.at("decoder.1", "attention_last", "attention_last@next")
    length = given["input_ids"].shape[1]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [length, length, 0]


@pytest.mark.parametrize(
    "site, need, reduced, message",
    [
        ("decoder.2", "keys@decoder.1", ("decoder.1",), "decoder.2 observes .* decoder.1"),
        ("decoder.2", "keys@decoder.3", (), "can observe 'next' and decoder.0 to decoder.2"),
        ("decoder.2", "keys@vision.1", (), "can observe 'next' and decoder.0"),
        ("decoder.2", "keys@soon", (), "cannot observe 'soon'"),
        ("decoder.2", "tokens@next", (), "only attention and keys"),
        ("decoder.2", "attention_cls", (), "no CLS token"),
        ("projector", "keys", ("vision.1",), "projector observes .* vision.1, but vision.1 is"),
        ("projector", "attention_last", (), "no text"),
        ("decoder.2", "attention_cls_joint", (), "no CLS token"),
        ("projector", "attention_of_nobody", (), "no feature 'attention_of_nobody'"),
    ],
)
def test_what_cannot_be_observed(
    site: str, need: str, reduced: tuple[str, ...], message: str
) -> None:
    model = shared_llava(LAYERS)
    with pytest.raises(ValueError, match=message):
        Features(model, inputs(model)).at(site, need, reduced=reduced)


def test_nothing_comes_behind_the_last_block() -> None:
    model = shared_llava(LAYERS)
    features = Features(model, inputs(model))
    note = note_of_graph(features.graph_module)
    blocks = {block: module for block, module in note.blocks.items() if block.name != "vision_2"}
    annotate_graph(features.graph_module, replace(note, blocks=blocks))
    with pytest.raises(ValueError, match="no block comes after vision.1"):
        features.at("projector", "keys@next")


def test_a_peek_exports() -> None:
    """What leaves the block early leaves nothing behind in the tracer."""
    model = shared_llava(LAYERS)
    site = Features(model, inputs(model, 2, text=6))
    site.at("decoder.1", "attention_last@next", "attention_raters_plus@next", "attention_mutual")
    length = torch.export.Dim("length", min=VISUAL + 2)
    names = [node.target for node in site.graph.find_nodes(op="placeholder")]
    program = torch.export.export(
        site.graph_module,
        (),
        {name: site.given[name] for name in names},
        dynamic_shapes={name: None if name == "pixel_values" else {1: length} for name in names},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    longer = call_of(model, {**inputs(model, 2, text=9), "use_cache": False}).inputs
    given = {name: longer[name] for name in names}
    with torch.no_grad():
        expected, seen = site.graph_module(**given), program.module()(**given)
    for name, value in expected.items():
        assert_close(seen[name], value)
    weights = {name for name, _ in program.named_parameters()}
    assert any("decoder_2" in name and "q_proj" in name for name in weights)


HALF = ("decoder.1", "attention_last@next", "attention_raters_plus", "attention_mutual_max")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype: torch.dtype) -> None:
    model = tiny_llava(LAYERS).to(dtype)
    given = inputs(model, 2)
    full = features_at(shared_llava(LAYERS), inputs(shared_llava(LAYERS), 2), *HALF)
    for name, value in features_at(model, given, *HALF).items():
        assert value.dtype == torch.float32
        assert (value - full[name]).abs().max() < 0.05


def test_closed_gates_do_not_vote() -> None:
    """A relaxed graph keeps every token, but those that a static one drops must not be asked."""
    model = shared_llava(LAYERS)
    truth = Truth(inputs(model))
    open_gates = (torch.arange(VISUAL) % 3 == 0).float()[None]
    for site in ("decoder.1", "projector"):
        features = Features(model, inputs(model), alive=True)
        features.given["alive"] = open_gates
        seen = features.at(site, "attention_mutual")["attention_mutual"][0]
        asked = open_gates[0].nonzero()[:, 0]
        if site == "projector":
            rows = truth.vision[TOWER_BLOCK][0].mean(dim=0)[[0, *(asked + 1).tolist()]]
            expected = rows.mean(dim=0)[1:]
        else:
            visual = truth.visual(0)
            expected = truth.decoder[1][0].mean(dim=0)[visual[asked]][:, visual].mean(dim=0)
        assert_close(seen, expected)


def test_ranking_by_the_next_layer_equals_masking_in_the_original() -> None:
    """PyramidDrop with original positions, several cuts, padded: see `oracle.masked_keys`."""
    model, eager = shared_llava(5), shared_llava(5, "eager")
    given = inputs(model, 2)
    counts = {0: 32, 2: 9}
    alive: dict[int, Tensor] = {}
    now = given["attention_mask"].bool()
    for layer, count in counts.items():
        with masked_keys(eager, alive), torch.no_grad():
            attention = eager(**given, output_attentions=True).attentions[layer + 1]
        now = now.clone()
        for row in range(2):
            there = (now[row] & (given["input_ids"][row] == IMAGE)).nonzero()[:, 0]
            last = int(given["attention_mask"][row].nonzero().max())
            best = attention[row, :, last, there].mean(dim=0).topk(count).indices
            now[row, there] = False
            now[row, there[best]] = True
        alive |= {later: now for later in range(layer + 1, 5)}
    with masked_keys(eager, alive), torch.no_grad():
        expected = eager(**given).logits
    policy = Policy(
        tuple(Reduction(f"decoder.{i}", count, observe="next") for i, count in counts.items())
    )
    with torch.no_grad():
        output = ReducedModel(model, policy)(**given)
    origin = output[CACHE].spaces[-1].origin
    for row in range(2):
        left = now[row].nonzero()[:, 0]
        places = [origin[row].tolist().index(int(p)) for p in left]
        assert_close(output.logits[row, places], expected[row, left])


def test_towers_without_class_token_that_hand_no_arguments_on() -> None:
    model = shared_llava(LAYERS, tower="siglip")
    given = inputs(model, 2)
    seen = features_at(model, given, "vision.0", "attention_mutual", "attention_mutual@next")
    eager = shared_llava(LAYERS, "eager", tower="siglip")
    with torch.no_grad():
        tower = eager.model.vision_tower(given["pixel_values"], output_attentions=True)
    for name, block in (("attention_mutual", 0), ("attention_mutual@next", 1)):
        assert_close(seen[name], tower.attentions[block].mean(dim=(1, 2)))
    with pytest.raises(ValueError, match="no CLS token"):
        features_at(model, given, "projector", "attention_cls")


@pytest.mark.slow
def test_what_is_observed_survives_an_export(tmp_path: Path) -> None:
    """Peeks in tower and decoder, raters, products and earlier layers in ONNX Runtime."""
    policy = Policy(
        (
            Reduction("projector", 40, scores={"joint_cls_attention": 1.0}, observe="next"),
            Reduction("decoder.0", 20, scores={"calibrated_rater_attention": 1.0}, observe="next"),
            Reduction("decoder.2", 8, scores={"agreed_attention": 1.0}, observe="decoder.1"),
        )
    )
    model = shared_llava(LAYERS)
    reduced = ReducedModel(model, policy)
    folder = export_onnx(reduced, tmp_path / "model")
    given = inputs(model, 3, text=4)
    runtime = OnnxModel.from_pretrained(folder, "cpu")
    assert_onnx_close(*(each(**given).logits[:, -5:] for each in (runtime, reduced)))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (folder / "weights.data").stat().st_size < 1.01 * weights
