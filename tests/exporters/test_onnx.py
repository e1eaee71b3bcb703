"""Exported graphs in ONNX Runtime equal the PyTorch static model, on CPU (invariant 7).

Exporting takes seconds, so each policy is exported once, and policies combine what can be combined.
Every check runs at another batch size and text length than the graphs were traced with.
"""

import contextlib
import functools
import json
import logging
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version

import onnx
import pytest
import tiny
import torch
from closeness import assert_onnx_close
from learned import learned_at
from onnx_families import assert_a_chat_is_the_same
from torch.export import Dim

from deos_fx import presets
from deos_fx.contents import write_record
from deos_fx.exporters import session, session_cache
from deos_fx.exporters.check import check_export
from deos_fx.exporters.graphs.example import example_of
from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

LAYERS, STEPS = 2, 6


def _joined(*presets_of_one):
    """One policy of presets with one reduction each, some of them changed a little."""
    pairs = (preset if isinstance(preset, tuple) else (preset, {}) for preset in presets_of_one)
    return Policy(tuple(replace(policy.reductions[0], **change) for policy, change in pairs))


# Policy and images per prompt; together they have every regime, selector and kind of token space.
CASES = {
    "prune, two images": (Policy((Reduction("decoder.0", 16),)), 2),
    "pool, merge with mass, compact": (
        Policy(
            (
                Reduction(
                    "projector", 16, selector="grid", gain=1, similarity={"grid": 1}, mass_bias=1
                ),
                Reduction("decoder.0", 6, gain=1, mass_bias=0.5, position="compact"),
            )
        ),
        1,
    ),
    "tower, projector, decoder, grid positions": (
        Policy(
            (
                Reduction(
                    "vision.0",
                    48,
                    scores={"key_norm": 1, "cls_attention": 1},
                    gain=1,
                    similarity={"key": 1},
                    mass_bias=1,
                ),
                Reduction("vision.1", 30, position="grid"),
                Reduction("projector", 20, gain=1, mass_bias=0.5),
                Reduction("decoder.0", 9, position="grid"),
            )
        ),
        2,
    ),
    "ToMe, VisionZip, DivPrune, SparseVLM+": (
        _joined(
            presets.tome(12, 1, 64),
            presets.visionzip(20, 8, 1),
            (presets.divprune(14), {"position": "compact"}),
            presets.sparsevlm_plus((0,), (6,)),
        ),
        1,
    ),
    "EViT, PruMerge, CDPruner, PyramidDrop": (
        _joined(
            presets.evit(0.7, (0,), 64),
            presets.prumerge(24, 1),
            (presets.cdpruner(12), {"position": "compact"}),
            (presets.pyramid_drop((1,), (0.1,)), {"site": "decoder.0"}),
        ),
        2,
    ),
    "learned parts in the tower, VisPruner, DART": (
        _joined(
            Policy((learned_at("vision.0", 48),)),
            presets.vispruner(32, 0.5, 1),
            (presets.dart(), {"site": "decoder.0", "keep": 12}),
        ),
        1,
    ),
    "learned parts, reweight": (
        Policy(
            (
                learned_at("projector", 12),
                Reduction(
                    "decoder.0",
                    5,
                    scores={"text_attention": 1, "novelty": 1, "key_norm": 1},
                    gain=0.5,
                    temperature=0.3,
                    similarity={"feature": 1, "key": 1},
                    weighting="score",
                    reweight=0.1,
                    residual=True,
                ),
            )
        ),
        1,
    ),
}


# Selectors that pick one token after the other.
SEQUENTIAL = ("greedy", "max_min", "determinantal", "coverage", "distinct")

# An export takes half a minute: the rest is for .ci/run.
QUICK = (
    "prune, two images",
    "pool, merge with mass, compact",
    "tower, projector, decoder, grid positions",
)
every_case = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES],
)


@contextlib.contextmanager
def warned():
    """Collect what torch logs as warnings."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("torch").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("torch").removeHandler(handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of an exported case, exported on first use."""

    @functools.cache
    def export(name):
        policy, images = CASES[name]
        model = tiny.shared_llava(LAYERS)
        # One image per prompt is also what an export without example inputs is for.
        example = tiny.inputs(model, 1, images) if images > 1 else None
        target = tmp_path_factory.mktemp("onnx") / "model"
        with warned() as messages:
            assert export_onnx(ReducedModel(model, policy), target, example) == target
        # Nobody can do anything about what torch thinks of its own graphs.
        assert not messages
        return target

    return export


@functools.cache
def _runtime(folder):
    return OnnxModel.from_pretrained(folder, "cpu")


def _both(folder, name):
    policy, images = CASES[name]
    reduced = ReducedModel(tiny.shared_llava(LAYERS), policy)
    return reduced, _runtime(folder(name)), images


def _graph(folder, name):
    return onnx.load(folder / f"{name}.onnx", load_external_data=False).graph


@every_case
@pytest.mark.parametrize(
    ("batch", "text", "layout", "padding"),
    [(1, 5, "between", None), (3, 9, "middle", "left"), (2, 0, "first", "left")],
)
def test_onnx_runtime_equals_pytorch(folder, name, batch, text, layout, padding):
    reduced, runtime, images = _both(folder, name)
    inputs = tiny.inputs(reduced.model, batch, images, layout=layout, padding=padding, text=text)
    real = slice(-5, None)  # The ends of the prompts: no padding, no visual tokens.
    assert_onnx_close(runtime(**inputs).logits[:, real], reduced(**inputs).logits[:, real])
    options = {"max_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(runtime.generate(**inputs, **options), reduced.generate(**inputs, **options))


@every_case
def test_a_chat_is_the_same(folder, name):
    reduced, runtime, images = _both(folder, name)
    batch = tiny.inputs(reduced.model, 4, images, text=3)
    assert_a_chat_is_the_same(reduced, runtime, batch)


@every_case
def test_decode_logits_equal_pytorch(folder, name):
    reduced, runtime, images = _both(folder, name)
    inputs = tiny.inputs(reduced.model, 2, images, text=3)
    results = [
        model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (runtime, reduced)
    ]
    assert_onnx_close(*(torch.stack(result.logits) for result in results))


def test_beams_and_sampling_are_those_of_transformers(folder):
    reduced, runtime, _ = _both(folder, "pool, merge with mass, compact")
    inputs = tiny.inputs(reduced.model, 2)
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        results = []
        for model in (reduced, runtime):
            torch.manual_seed(0)
            results.append(model.generate(**inputs, **options, max_new_tokens=4))
        assert torch.equal(*results)


def test_steps_write_into_the_cache(folder, monkeypatch):
    """Until it is full; then it gets room for as many tokens again."""
    monkeypatch.setattr(session_cache, "ROOM", 3)
    reduced, runtime, images = _both(folder, "prune, two images")
    inputs = tiny.inputs(reduced.model, 2, images)
    caches = [model(**inputs)[CACHE] for model in (runtime, reduced)]
    held = {name: value.shape()[2] for name, value in caches[0].states.items()}
    assert len(set(held.values())) > 1, "layers after a reduction hold fewer"
    places = []
    # A call with several tokens takes the cache without what is behind, and gives none.
    for step, new in enumerate((1, 1, 1, 1, 2, 1), start=1):
        words = torch.full((2, new), step)
        logits = [
            model(input_ids=words, **{CACHE: cache}).logits
            for model, cache in zip((runtime, reduced), caches, strict=True)
        ]
        assert_onnx_close(*logits)
        places.append({name: value.data_ptr() for name, value in caches[0].states.items()})
        seen = sum((1, 1, 1, 1, 2, 1)[:step])
        assert caches[0].lengths == {name: length + seen for name, length in held.items()}
    assert places[0] == places[1] == places[2]
    for before, after in ((2, 3), (3, 4), (4, 5)):
        assert {*places[before].values()}.isdisjoint(places[after].values())


def test_several_new_tokens_continue_a_cache(folder):
    reduced, runtime, images = _both(folder, "prune, two images")
    inputs = tiny.inputs(reduced.model, 1, images, padding=None)
    more = torch.tensor([[3, 4, 5]])
    first = runtime(**inputs)
    continued = runtime(input_ids=more, **{CACHE: first[CACHE]}).logits
    expected = []
    cache = reduced(**inputs)[CACHE]
    for token in more.T:
        expected.append(reduced(input_ids=token[None], **{CACHE: cache}).logits)
    assert_onnx_close(continued, torch.cat(expected, dim=1))


@pytest.mark.parametrize(("name", "place"), [("_run_prefill", 0), ("_run_decode", -1)])
def test_an_export_that_says_otherwise_is_refused(folder, monkeypatch, name, place):
    reduced, _, images = _both(folder, "prune, two images")
    example = example_of(reduced.model, tiny.inputs(reduced.model, 1, images), 10)
    exported = folder("prune, two images")

    def check() -> None:
        check_export(
            reduced,
            example,
            "ONNX Runtime",
            torch.device("cpu"),
            lambda: OnnxModel.from_pretrained(exported, "cpu"),
        )

    check()
    original = getattr(OnnxModel, name)

    def otherwise(*args):
        logits = original(*args)
        logits[:, place] += 0.1
        return logits

    # Wrong at one position of the prompt alone, or in a decode step alone.
    monkeypatch.setattr(OnnxModel, name, otherwise)
    with pytest.raises(ValueError, match="not the same in ONNX Runtime: logits of 2 prompts"):
        check()


def test_threads_share_a_runtime(folder):
    reduced, runtime, images = _both(folder, "pool, merge with mass, compact")
    batches = [tiny.inputs(reduced.model, 1 + i % 2, images, text=i) for i in range(4)]

    def answer(batch):
        return runtime.generate(**batch, max_new_tokens=STEPS, do_sample=False)

    right = [answer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, batches * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, right * 3, strict=True))


def test_logits_to_keep(folder):
    reduced, runtime, images = _both(folder, "prune, two images")
    inputs = tiny.inputs(reduced.model, 1, images)
    logits = runtime(**inputs).logits
    assert torch.equal(runtime(**inputs, logits_to_keep=1).logits, logits[:, -1:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        runtime(**inputs, logits_to_keep=torch.tensor([0, 2]))


def test_a_text_without_images_and_turns_of_a_chat(folder):
    """Each turn in one call, batches padded on the left, against the reduced model."""
    for name in QUICK:
        reduced, runtime, images = _both(folder, name)
        prompts = tiny.inputs(reduced.model, 2, images, text=3, padding="left")
        text = {name: prompts[name][:, -6:] for name in ("input_ids", "attention_mask")}
        for first in (prompts, text):
            answers = []
            for model in (runtime, reduced):
                output, mask = model(**first), first["attention_mask"]
                logits = [output.logits[:, -3:]]
                # A turn of several tokens, an answer of two, and another turn.
                for words in ([[3, 4, 5], [6, 7, 8]], [[9], [3]], [[4], [5]], [[3, 5], [4, 6]]):
                    new = torch.tensor(words)
                    mask = torch.cat([mask, torch.ones_like(new)], dim=1)
                    given = {CACHE: output[CACHE], "attention_mask": mask, "input_ids": new}
                    output = model(**given)
                    assert output.logits.shape[:2] == new.shape
                    logits.append(output.logits)
                answers.append(torch.cat(logits, dim=1))
            assert_onnx_close(*answers)


# *** the graphs ***


@every_case
def test_graphs_have_no_data_dependent_shapes(folder, name):
    tiers = [tier for step in CASES[name][0].reductions for tier in step.selection]
    for graph in ("prefill", "decode", "extend"):
        nodes = _graph(folder(name), graph).node
        kinds = [node.op_type for node in nodes]
        assert not {*kinds} & {"NonZero", "Loop", "If", "ScatterND", "Unique", "Compress"}
        # A selector that goes step by step is one loop of a known length; `distinct` would need
        # more of them if it left less than half of the tokens.
        loops = sum(tier.selector in SEQUENTIAL for tier in tiers) if graph == "prefill" else 0
        assert kinds.count("Scan") == loops
        scatters = [node for node in nodes if node.op_type == "ScatterElements"]
        reductions = [a for node in scatters for a in node.attribute if a.name == "reduction"]
        assert {attribute.s for attribute in reductions} <= {b"none"}
        assert {node.domain for node in nodes} <= {"", "com.microsoft"}


# Operators that are fused from many, by what they compute.
FUSED = {
    "attention": {"Attention", "MultiHeadAttention", "GroupQueryAttention"},
    "rotary": {"RotaryEmbedding"},
    "norm": {
        "LayerNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    },
}


def _fused(target, graph):
    kinds = [node.op_type for node in _graph(target, graph).node]
    return {what: sum(kind in names for kind in kinds) for what, names in FUSED.items()}


def test_as_much_is_fused_with_reductions_as_without(folder, tmp_path):
    model = tiny.shared_llava(LAYERS)
    target = export_onnx(ReducedModel(model, Policy()), tmp_path / "out", verify=False)
    # A norm before and after each attention and at the end, in the decoder; as many in the tower,
    # whose last block nothing reads. Queries and keys are rotated.
    blocks = model.config.vision_config.num_hidden_layers - 1
    prefill = _fused(target, "prefill")
    assert prefill == {
        "attention": LAYERS + blocks,
        "rotary": 2 * LAYERS,
        "norm": 2 * LAYERS + 1 + 2 * blocks + 1,
    }
    decode = _fused(target, "decode")
    assert decode == {"attention": LAYERS, "rotary": 0, "norm": 2 * LAYERS + 1}
    for name in QUICK:
        assert _fused(folder(name), "prefill") == prefill, name
        # Its attention rotates.
        assert _fused(folder(name), "decode") == decode, name


def test_an_export_for_a_gpu(tmp_path, monkeypatch):
    """Without one, what is compared are the graphs before they are fused."""
    monkeypatch.setattr("deos_fx.exporters.onnx.cuda_devices", lambda: 0)
    checked, stages = [], []
    monkeypatch.setattr(
        "deos_fx.exporters.onnx.check_export",
        lambda reduced, example, runtime, device, load, weights: checked.append(
            (device.type, load(), weights)
        ),
    )
    reduced = ReducedModel(tiny.shared_llava(LAYERS), CASES["prune, two images"][0])
    target = export_onnx(
        reduced,
        tmp_path / "out",
        device="cuda",
        progress=lambda stage, done, total: stages.append(stage) if done == total else None,
    )
    assert [(device, weights) for device, _, weights in checked] == [("cpu", None)]
    assert not any(path.is_dir() for path in target.iterdir())
    assert stages == ["trace", "write", "check", "fuse", "write"]
    # Several new tokens are attended to by one operator, too.
    assert _fused(target, "extend")["attention"] == LAYERS
    with pytest.warns(UserWarning, match="exported for cuda"):
        runtime = OnnxModel.from_pretrained(target, "cpu")
    inputs = tiny.inputs(reduced.model, 2)
    assert_onnx_close(runtime(**inputs).logits[:, -5:], reduced(**inputs).logits[:, -5:])


def test_pruning_needs_no_assignment(folder):
    """One more matmul than the model: the attention row that scores the tokens."""
    counts = [
        sum(node.op_type in ("MatMul", "Gemm") for node in _graph(folder(name), "prefill").node)
        for name in QUICK
    ]
    assert counts[0] == min(counts)


def _axes(values):
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_names_and_axes(folder):
    prefill = _graph(folder("pool, merge with mass, compact"), "prefill")
    extend = _graph(folder("pool, merge with mass, compact"), "extend")
    axes = _axes(prefill.input) | _axes(extend.input)
    assert [value.name for value in prefill.input] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "pixel_values",
        "logits_to_keep",
    ]
    assert axes["logits_to_keep"] == ["logits"]
    assert axes["pixel_values"] == ["batch", 3, 64, 64]
    assert _axes(prefill.input)["attention_mask"] == ["batch", "sequence"]
    assert axes["attention_mask_1"] == ["batch", "seen_1"]
    assert axes["key_bias_2"] == ["batch", "seen_2"]
    assert axes["past_key_values.0.key"] == ["batch", 2, "past_1", 16]
    assert axes["past_key_values.1.key"] == ["batch", 2, "past_2", 16]
    assert axes["input_ids"] == axes["position_ids"] == ["batch", "new"]
    one = _axes(_graph(folder("pool, merge with mass, compact"), "decode").input)
    buffers = {
        name: [*shape[:2], f"buffer_{min(int(name.split('.')[1]), 1) + 1}", shape[3]]
        for name, shape in axes.items()
        if name.startswith("past_key_values.")
    }
    assert one == _axes(extend.input) | buffers | {
        "input_ids": ["batch", 1],
        "position_ids": ["batch", 1],
        "position_ids_2": ["batch", 1],
    }
    outputs = {value.name for value in prefill.output}
    assert {"logits", "next_position", "origin_1", "attention_mask_2", "key_bias_2"} <= outputs
    assert {f"present.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")} <= outputs


def test_what_a_foreign_runtime_needs(folder):
    """The outputs that our own runtime works out by itself."""
    reduced, runtime, images = _both(folder, "prune, two images")
    inputs = tiny.inputs(reduced.model, 2, images)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = torch.tensor([-1])
    values = runtime._prefill(inputs | {"position_ids": positions, "logits_to_keep": last})
    origin, kept_mask, following = (
        torch.from_dlpack(values[name])
        for name in ("origin_1", "attention_mask_1", "next_position")
    )
    assert torch.equal(kept_mask, mask.gather(1, origin))
    assert following.flatten().tolist() == mask.sum(1).tolist()


# *** the folder ***


def test_folder(folder):
    target = folder("prune, two images")
    assert {path.name for path in target.iterdir()} == {
        "prefill.onnx",
        "decode.onnx",
        "extend.onnx",
        "weights.data",
        "policy.json",
        "deos_fx.json",
        "config.json",
        "generation_config.json",
    }
    policy, images = CASES["prune, two images"]
    assert Policy.load(target / "policy.json") == policy
    manifest = json.loads((target / "deos_fx.json").read_text())
    assert (manifest["deos_fx"], manifest["version"]) == ("onnx", 4)
    assert (manifest["images"], manifest["image_token"]) == (images, tiny.IMAGE)
    assert (manifest["dtype"], manifest["device"]) == ("float32", "cpu")
    assert manifest["spaces"] == [
        {"first_layer": 1, "position": "keep", "biased": False, "dropped": 2 * (64 - 16)}
    ]
    # As it was installed: 2.14.1+cu130 calls itself 2.14.1 there.
    assert manifest["packages"]["torch"] == version("torch")


def test_both_graphs_share_one_file_of_weights(folder):
    target = folder("prune, two images")
    model = tiny.shared_llava(LAYERS)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # The last vision block and post_layernorm are not used. Pages and constants come on top.
    assert (target / "weights.data").stat().st_size < 1.3 * weights
    for graph in ("prefill", "decode", "extend"):
        assert (target / f"{graph}.onnx").stat().st_size < 0.5 * weights


def test_graphs_can_share_weights_in_memory(folder):
    for name in QUICK:
        reduced, runtime, images = _both(folder, name)
        small = OnnxModel.from_pretrained(folder(name), "cpu", low_memory=True)
        inputs = tiny.inputs(reduced.model, 2, images, text=3, padding="left")
        # A prefill, several new tokens and one: every graph.
        answers = []
        for model in (small, runtime):
            output = model(**inputs)
            logits = [output.logits[:, -3:]]
            for new in (torch.tensor([[3, 4], [5, 6]]), torch.tensor([[7], [3]])):
                output = model(input_ids=new, **{CACHE: output[CACHE]})
                logits.append(output.logits)
            answers.append(torch.cat(logits, dim=1))
        assert_onnx_close(*answers)
    # The decoder's weights of two graphs are the same values.
    values = [{*map(id, s._weights.values())} for s in (small._prefill, small._decode)]
    assert values[1] and values[1] <= values[0]


def test_the_folder_can_be_moved(folder, tmp_path):
    moved = shutil.copytree(folder("prune, two images"), tmp_path / "elsewhere")
    inputs = tiny.inputs(tiny.shared_llava(LAYERS), 1, 2)
    expected = _runtime(folder("prune, two images"))(**inputs).logits
    assert torch.equal(OnnxModel.from_pretrained(moved, "cpu")(**inputs).logits, expected)


# *** errors ***


def test_export_refuses_what_it_cannot_export(tmp_path):
    model = tiny.shared_llava(LAYERS)
    reduced = ReducedModel(model, Policy())
    with pytest.raises(TypeError, match="deos_fx.transform"):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(ValueError, match="no image"):
        export_onnx(reduced, tmp_path / "out", {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="device is 'tpu'; give 'cpu' or 'cuda'"):
        export_onnx(reduced, tmp_path / "out", device="tpu")
    flex = tiny.tiny_llava(1)
    flex.config.get_text_config()._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        export_onnx(ReducedModel(flex, Policy()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Positive(torch.nn.Module):
    """Does one thing with a single positive number, and another with several."""

    def forward(self, x):
        positive = x[x > 0]
        return {"y": positive if len(positive) == 1 else 2 * positive}


def test_sizes_that_depend_on_contents_are_refused_in_words():
    exportable = Exportable(Positive(), {"x": torch.ones(3, 2)}, {"x": {0: Dim("batch")}})
    with pytest.raises(ValueError, match="how many tokens .* which torch.export cannot follow"):
        exportable.export()


def test_export_checks_the_folder_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("deos_fx.exporters.onnx.decode_graph", None)
    with pytest.raises(OSError, match="cannot write the folder"):
        export_onnx(ReducedModel(tiny.shared_llava(LAYERS), Policy()), tmp_path / "file" / "out")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        (args[1] / "half").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("deos_fx.exporters.onnx.fuse", lambda *args: None)
    monkeypatch.setattr("deos_fx.exporters.onnx.of_one", lambda *args: None)
    monkeypatch.setattr("deos_fx.exporters.graphs.exportable.Exportable.export", lambda self: None)
    monkeypatch.setattr("deos_fx.exporters.onnx.write_graphs", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export_onnx(ReducedModel(tiny.shared_llava(LAYERS), Policy()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_prompts_that_do_not_fit_the_graphs(folder):
    _, runtime, _ = _both(folder, "prune, two images")
    model = tiny.shared_llava(LAYERS)
    with pytest.raises(ValueError, match="64. image tokens .* with 128 .2 images.*example_inputs"):
        runtime(**tiny.inputs(model, 2, 1))
    with pytest.raises(ValueError, match="64. image tokens"):
        runtime.generate(**tiny.inputs(model, 2, 1), max_new_tokens=2)
    inputs = tiny.inputs(model, 1, 2)
    with pytest.raises(ValueError, match="no image"):
        runtime(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="no image"):
        runtime(**inputs | {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="shape"):
        runtime(**inputs | {"pixel_values": inputs["pixel_values"][..., :32]})
    with pytest.raises(ValueError, match="use_cache"):
        runtime.generate(**inputs, use_cache=False)
    with pytest.raises(ValueError, match=f"{CACHE} is a ReducedCache"):
        cache = ReducedModel(model, Policy())(**inputs)[CACHE]
        runtime(input_ids=torch.ones(1, 1, dtype=torch.int64), **{CACHE: cache})


def test_devices(folder, monkeypatch):
    target = folder("prune, two images")
    monkeypatch.setattr(session, "cuda_devices", lambda: 0)
    assert OnnxModel.from_pretrained(target).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="0 CUDA devices.*Leave device out"):
        OnnxModel.from_pretrained(target, device="cuda")
    for device in ("tpu", "mps"):
        with pytest.raises(ValueError, match="'cpu', 'cuda'"):
            OnnxModel.from_pretrained(target, device=device)


def test_folders_that_are_no_export(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="export_onnx"):
        OnnxModel.from_pretrained(tmp_path)
    target = shutil.copytree(folder("prune, two images"), tmp_path / "copy")
    manifest = target / "deos_fx.json"
    data = json.loads(manifest.read_text())
    del data["files"], data["sha256"]
    for text, message in (
        ("{", "not JSON"),
        ("[]", "no object"),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            OnnxModel.from_pretrained(target)
    for changes, message in (
        ({"version": 99}, "version 99"),
        ({"spaces": []}, "is not the policy of these graphs"),
        ({"graphs": []}, "graphs is "),
    ):
        write_record(target, data | changes)
        with pytest.raises(ValueError, match=message):
            OnnxModel.from_pretrained(target)
    (target / "prefill.onnx").write_text("not a graph")
    manifest.write_text(json.dumps(data))
    with (
        pytest.warns(UserWarning, match="cannot be checked"),
        pytest.raises(ValueError, match="prefill.onnx cannot be run here"),
    ):
        OnnxModel.from_pretrained(target, "cpu")


def test_half_precision(tmp_path, monkeypatch):
    model, captured = tiny.tiny_llava(1).half(), []
    monkeypatch.setattr(
        "deos_fx.passes.captures.capture_call",
        lambda *args: captured.append(0) or capture_call(*args),
    )
    reduced = ReducedModel(model, Policy((Reduction("projector", 16, gain=1, mass_bias=1),)))
    export_onnx(reduced, tmp_path)
    # A prefill and new tokens, which the check of the export shares.
    assert len(captured) == 2
    # Half precision is for a GPU.
    with pytest.warns(UserWarning, match=r"exported for cuda.*device='cpu'"):
        runtime = OnnxModel.from_pretrained(tmp_path, "cpu")
    inputs = tiny.inputs(model, 3)
    expected = reduced(**inputs).logits.float()[:, -1]
    got = runtime(**inputs).logits[:, -1]
    assert math.isclose((got - expected).abs().max() / expected.abs().max(), 0, abs_tol=2e-2)
    assert runtime.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 3


def test_where_nothing_or_all_but_one_is_dropped(tmp_path):
    """ONNX Runtime refuses to reshape the tokens of an empty selection (the export compares)."""
    policy = Policy(
        (
            Reduction("vision.0", 1.0, gain=1, mass_bias=1),
            Reduction("projector", 1.0, gain=0.5, residual=True, mass_bias=1),
            Reduction("decoder.0", 1, gain=1, mass_bias=1),
        )
    )
    export_onnx(ReducedModel(tiny.shared_llava(LAYERS), policy), tmp_path / "model")


def test_plain_images_are_exported(tmp_path):
    """Their tokens tie in every score, and PyTorch and ONNX Runtime keep others of them."""
    model = tiny.tiny_llava(LAYERS)
    model.model.vision_tower.embeddings.position_embedding.weight.data.zero_()
    inputs = tiny.inputs(model, 1, 2)
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"])
    inputs["pixel_values"][1] = 0
    traced = example_of(model, inputs, 10)
    # An image of zeros is padding to some encoders.
    own = traced.images["pixel_values"]
    assert own[0].std() > 0.1 and not own[1].any()
    scores = {"last_text_attention": 1.0}
    policy = Policy((Reduction("decoder.0", 5, scores=scores, selector="greedy", gain=0.5),))
    inputs["pixel_values"][1] = 0.5
    export_onnx(ReducedModel(model, policy), tmp_path / "model", inputs)
