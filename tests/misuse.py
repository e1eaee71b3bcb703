"""A table of misuse: what was given, and what is said. It is a page of the documentation as well.

.venv/bin/python tests/misuse.py docs/misuse.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attempts import (
    Failed,
    World,
    evaluate,
    read_export,
    read_learned,
    read_policy,
    read_reduction,
    read_search,
    run_command,
)

from deos_fx.exporters.manifest import VERSION


class Misuse(NamedTuple):
    """A row.

    Attributes:
        given: What was given.
        says: What is said, of which dots at an end leave out a part.
        error: The class of the exception.
    """

    given: str
    says: str
    error: type[Exception] = ValueError


class Section(NamedTuple):
    """Rows that are tried in the same way."""

    title: str
    words: str
    attempt: Callable[[str, World], object]
    rows: tuple[Misuse, ...]


SECTIONS = (
    Section(
        "Policies in Python",
        "Reductions, policies and signatures check what they are given when they are made.",
        evaluate,
        (
            Misuse(
                'Reduction("encoder.1", 18)',
                "no site 'encoder.1'; a site is 'projector', 'decoder.<i>' (after "
                "decoder layer i) or 'vision.<i>'",
            ),
            Misuse("Policy(image_scale=50)", "image_scale is 50; give a number in [0.001, 1]"),
            Misuse(
                'Reduction("decoder.01", 18)',
                "no site 'decoder.01'; a site is 'projector', 'decoder.<i>' (after "
                "decoder layer i) or 'vision.<i>'",
            ),
            Misuse(
                'Reduction("decoder.٣", 18)',
                "no site 'decoder.٣'; a site is 'projector', 'decoder.<i>' (after "
                "decoder layer i) or 'vision.<i>'",
            ),
            Misuse(
                'Reduction("vision.-1", 18)',
                "no site 'vision.-1'; a site is 'projector', 'decoder.<i>' (after "
                "decoder layer i) or 'vision.<i>'",
            ),
            Misuse(
                'Reduction("projector", 0)', "projector: keep is 0; give a count >= 1 or a fraction"
            ),
            Misuse(
                'Reduction("projector", True)',
                "projector: keep is True; give a count >= 1 or a fraction",
            ),
            Misuse(
                'Reduction("projector", 1.5)',
                "projector: keep is 1.5; a float is a fraction in (0, 1], for a "
                "number of tokens give an int",
            ),
            Misuse(
                'Reduction("projector", nan)',
                "projector: keep is nan; give a count >= 1 or a fraction",
            ),
            Misuse(
                'Reduction("projector", 10**40)',
                "projector: keep is 10000000000000000000000000000000000000000; give "
                "at most 10000000 tokens",
            ),
            Misuse(
                'Reduction("projector", "half")',
                "projector: keep is 'half'; give a count >= 1 or a fraction",
            ),
            Misuse(
                'Reduction("projector", 18, scores={"beauty": 1})',
                "projector: no scores 'beauty'; choose from last_text_attention, "
                "text_attention ...",
            ),
            Misuse(
                'Reduction("projector", 18, scores={"novelty": -1})',
                "projector: scores weight of novelty is -1; give a number in [0, 1e+09]",
            ),
            Misuse(
                'Reduction("projector", 18, scores={"novelty": True})',
                "projector: scores weight of novelty is True; give a number in [0, 1e+09]",
            ),
            Misuse(
                'Reduction("projector", 18, scores=["novelty"])',
                "projector: scores is ['novelty']; give a weight for each name",
                TypeError,
            ),
            Misuse(
                'Reduction("projector", 18, selector="best")',
                "projector: selector is 'best'; choose from top_k, greedy ...",
            ),
            Misuse(
                'Reduction("projector", 18, gain=1.5)',
                "projector: gain is 1.5; give a number in [0, 1]",
            ),
            Misuse(
                'Reduction("projector", 18, gain=True)',
                "projector: gain is True; give a number in [0, 1]",
            ),
            Misuse(
                'Reduction("projector", 18, temperature=10**400)', "... give a number in [0, 1e+09]"
            ),
            Misuse(
                'Reduction("projector", 18, residual=1)',
                "projector: residual is 1; give True or False",
                TypeError,
            ),
            Misuse(
                'Reduction("projector", 18, tiers=3)',
                "projector: tiers is 3; give a tuple of tiers",
                TypeError,
            ),
            Misuse(
                'Reduction("projector", 18, selector="windows")',
                "projector: windows needs the option 'windows'; give a value",
            ),
            Misuse(
                'Reduction("projector", 18, options={"seed": 1})',
                "projector: no option 'seed' of top_k and its scores; choose from nothing",
            ),
            Misuse(
                'Reduction("projector", 18, weighting="raw", scores={"novelty": 1})',
                "projector: weighting 'raw' with the score 'novelty', which may be "
                "negative, makes only sums and no means; choose exponent=0 without "
                "average, or the weighting 'score'",
            ),
            Misuse(
                'Reduction("projector", 18, learned={"probe": torch.tensor([1.0, nan])})',
                "projector: learned: probe holds numbers that are not finite; train it again",
            ),
            Misuse(
                'Policy((Reduction("projector", 18), Reduction("projector", 9)))',
                "two reductions at projector; a site takes one",
            ),
            Misuse(
                'Policy(("projector",))',
                "reductions has 'projector'; give Reduction(site, keep)",
                TypeError,
            ),
            Misuse(
                'Policy(Reduction("projector", 18))',
                "reductions is Reduction(site='projector', keep=18, "
                "scores={'cls_attention': 1.0}); give a tuple of Reductions",
                TypeError,
            ),
            Misuse("Policy(name=3)", "the name of a policy is 3; give a text", TypeError),
            Misuse(
                'Policy(name="x" * 1001)',
                "the name of a policy has 1001 characters; give at most 1000",
            ),
            Misuse(
                'Policy(name="\\x1b]0;x")',
                "the name of a policy has the control character '\\x1b'; leave it out",
            ),
            Misuse(
                'Policy(model="llava")',
                "model is 'llava'; give a ModelSignature or None",
                TypeError,
            ),
            Misuse(
                'ModelSignature(model_type="a", vision_layers=2, decoder_layers=2, '
                "visual_tokens=-1)",
                "model: visual_tokens is -1; give a whole number in [0, 2147483647]",
            ),
            Misuse(
                'Policy((Reduction("projector", 200),)).counts(144)',
                "projector keeps 200 visual tokens, but an image of this model has "
                "only 144; keep at most 144, or give a fraction",
            ),
            Misuse(
                "presets.merge(keep=True)", "merge: keep is True; give a number in [-1e+09, 1e+09]"
            ),
            Misuse(
                'presets.fastv(layer="2")', "fastv: layer is '2'; give a number in [-1e+09, 1e+09]"
            ),
            Misuse(
                "presets.fastv(layer=-1)",
                "layer is -1; FastV ranks by the layer before, so give at least 1",
            ),
        ),
    ),
    Section(
        "Budgets and calls",
        "`model` is a LLaVA, `reduced` what `transform` made of it, `inputs` a prompt with an "
        "image.",
        evaluate,
        (
            Misuse(
                "Budget(visual_tokens=True)",
                "budget visual_tokens=True; a limit is a positive number below "
                "1e+30: an int, or a fraction in (0, 1]",
            ),
            Misuse(
                "Budget(visual_tokens=12.5)",
                "budget visual_tokens=12.5; a float is a fraction in (0, 1], for an "
                "absolute limit give the int 12",
            ),
            Misuse(
                'Budget(visual_tokens="12.5%")',
                "budget visual_tokens='12.5%'; a limit is a positive number below "
                "1e+30: an int, or a fraction in (0, 1]",
            ),
            Misuse(
                "Budget(visual_tokens=-1)",
                "budget visual_tokens=-1; a limit is a positive number below 1e+30: "
                "an int, or a fraction in (0, 1]",
            ),
            Misuse(
                "Budget(flops=10**400)",
                "... a limit is a positive number below 1e+30: an int, or a fraction in (0, 1]",
            ),
            Misuse(
                "Budget(kv_cache=nan)",
                "budget kv_cache=nan; a limit is a positive number below 1e+30: an "
                "int, or a fraction in (0, 1]",
            ),
            Misuse(
                "Budget().require()",
                "the budget has no limit; give at least one of visual_tokens, flops, "
                "kv_cache, latency_ms",
            ),
            Misuse(
                'transform("my-llava")',
                "model is a str; give a transformers vision-language model, for "
                "example LlavaForConditionalGeneration.from_pretrained(...).",
                TypeError,
            ),
            Misuse(
                'transform(model, policy="policy.json")',
                "policy is a str; give a Policy: Policy.load(path), one of "
                "deos_fx.presets such as presets.fastv(), or the .policy of a search.",
                TypeError,
            ),
            Misuse(
                'transform(model, policy=Policy((Reduction("decoder.99", 18),)))(**inputs)',
                "the policy reduces at decoder.99, but llava has 2 decoder layers; "
                "the last site is decoder.0",
            ),
            Misuse(
                'transform(model, policy=Policy((Reduction("projector", 8, '
                'selector="probe"),)))(**inputs)',
                "projector: the selector 'probe' compares visual tokens with the "
                "text as the decoder sees both, so it works at decoder.<i> only. "
                "Choose such a site, or another selector.",
            ),
            Misuse(
                "transform(model, policy=Policy(), budget=Budget(flops=0.5))",
                "Both a policy and a budget are given: a policy is applied as it is. "
                "Leave the policy out to have one made, or leave out a budget.",
            ),
            Misuse(
                "transform(model, budget=0.5)",
                "budget is a float; give for example Budget(visual_tokens=0.125).",
                TypeError,
            ),
            Misuse(
                "transform(model, budget=Budget(visual_tokens=1000))",
                "budget visual_tokens=1000, but the model has only 64; give at most "
                "that, or a fraction in (0, 1]",
            ),
            Misuse(
                'reduced(input_ids=inputs["input_ids"])',
                "input_ids has image placeholders, but there are no images: pass "
                "pixel_values, and whatever else the model's processor returns.",
            ),
            Misuse(
                "reduced(**inputs, output_attentions=True)",
                "output_attentions is not supported: attention weights are never "
                "materialised. Leave it out (or pass output_attentions=False, if the "
                "model's config asks for it) ...",
            ),
            Misuse(
                'reduced.generate(**inputs, cache_implementation="static", max_new_tokens=1)',
                "cache_implementation='static': the layers of a reduced model hold "
                "different numbers of tokens, which only its own dynamic cache can "
                "...",
            ),
            Misuse(
                "search(model, [], budget=Budget(flops=0.5))",
                "data is empty: give at least one dict of model inputs.",
            ),
            Misuse(
                "search(model, 3, budget=Budget(flops=0.5))",
                "data is a int; give dicts of model inputs (batches).",
                TypeError,
            ),
            Misuse(
                "search(model, [inputs])", "Give either budget, or budgets for a front.", TypeError
            ),
            Misuse(
                "search(model, [inputs], budget=Budget(flops=0.5), steps=True)",
                "steps is True; give a whole number in [1, 2147483647]",
            ),
            Misuse(
                'search(model, [inputs], budget=Budget(flops=0.5), seed="x")',
                "seed is 'x'; give a whole number in [-2147483648, 2147483647]",
            ),
            Misuse(
                'search(model, [inputs], budget=Budget(flops=0.5), sites=["decoder.99"])',
                "No site 'decoder.99' in this model. It has vision.0, vision.1, "
                "projector, decoder.0.",
            ),
            Misuse(
                "search(model, [inputs], budget=Budget(flops=0.5), sites=[])",
                "sites is empty; name at least one, or leave it out.",
            ),
            Misuse(
                'search(model, [inputs], budget=Budget(flops=0.5), sites="projector")',
                "sites is the text 'projector'; give a list of names.",
                TypeError,
            ),
            Misuse('presets.fit("best", 18, model)', "no preset 'best'; choose from ..."),
            Misuse(
                'presets.fit("merge", True, model)',
                "budget_tokens is True; give a number in [1, 1e+07]",
            ),
            Misuse(
                'presets.fit("merge", 18, model, visual_tokens=-1)',
                "visual_tokens is -1; give a whole number in [1, 10000000]",
            ),
            Misuse(
                'export_onnx(model, "onnx")',
                "reduced is a LlavaForConditionalGeneration; give what "
                "deos_fx.transform(model) returns (with policy=deos_fx.Policy() for "
                "a model without reductions)",
                TypeError,
            ),
            Misuse(
                'export_onnx(reduced, "onnx", device="tpu")',
                "device is 'tpu'; give 'cpu' or 'cuda'",
            ),
            Misuse(
                'ReducedModel.from_pretrained("nowhere")',
                "nowhere is not a saved reduced model: there is no such folder. Give "
                "a folder that ReducedModel.save_pretrained has written ...",
            ),
            Misuse(
                'OnnxModel.from_pretrained("nowhere")',
                "nowhere has no deos_fx.json: it is not a folder that deos_fx.export_onnx wrote",
                FileNotFoundError,
            ),
            Misuse(
                'Policy.load("nowhere.json")',
                "[Errno 2] No such file or directory: 'nowhere.json'",
                FileNotFoundError,
            ),
        ),
    ),
    Section(
        "A policy file",
        "What `Policy.load` says of a file with this content. Every message begins with the name "
        "of the file; the schema is [policy.json](schemas/policy.json).",
        read_policy,
        (
            Misuse("'{'", "policy.json is not a policy file: not JSON ..."),
            Misuse(
                "b'\\xff\\xfe'",
                "policy.json is not a policy file: 'utf-8' codec can't decode byte "
                "0xff in position 0: invalid start byte",
            ),
            Misuse(
                "'[' * 100_000",
                "policy.json is not a policy file: lists and objects are nested more than 32 deep",
            ),
            Misuse(
                "'[' * 40 + ']' * 40",
                "policy.json is not a policy file: lists and objects are nested more than 32 deep",
            ),
            Misuse(
                "' ' * 2_000_000",
                "policy.json is not a policy file: it has more than 1048576 bytes",
            ),
            Misuse("'[]'", 'policy.json is not a policy file: it does not say "deos_fx": "policy"'),
            Misuse(
                '\'{"deos_fx": "policy", "version": 2}\'',
                "policy.json is not a policy file: it has version 2, and this "
                "release reads version 1",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": true}\'',
                "policy.json is not a policy file: it has version True, and this "
                "release reads version 1",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1}\'',
                "policy.json is not a policy file: it lacks the field 'reductions'",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1, "version": 1, "reductions": []}\'',
                "policy.json is not a policy file: the name 'version' is given twice",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1, "reductions": [], "budget": 18}\'',
                "policy.json is not a policy file: it has no field 'budget'; the "
                "fields are deos_fx, version, name, model, image_scale, learned, reductions",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1, "reductions": {}}\'',
                "policy.json is not a policy file: reductions is {}; it should be a valid list",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1, "reductions": [], "learned": "x"}\'',
                "policy.json is not a policy file: learned is 'x'; it should match "
                "pattern '^[0-9a-f]{64}$'",
            ),
            Misuse(
                '\'{"deos_fx": "policy", "version": 1, "reductions": [], "model": {}}\'',
                "policy.json is not a policy file: model lacks the field "
                "'model_type'; model lacks the field 'vision_layers'; model lacks "
                "the field 'decoder_layers'; and 1 more",
            ),
        ),
    ),
    Section(
        "A reduction in a policy file",
        "The same, for an entry of `reductions`.",
        read_reduction,
        (
            Misuse(
                '"projector"',
                "policy.json is not a policy file: reductions[0] is 'projector'; it "
                "should be a valid dictionary or instance of ReductionEntry",
            ),
            Misuse(
                '{"site": "projector"}',
                "policy.json is not a policy file: reductions[0]: it lacks the field "
                "'keep', or 'share'",
            ),
            Misuse(
                '{"site": "decoder.01", "keep": 18}',
                "policy.json is not a policy file: no site 'decoder.01'; a site is "
                "'projector', 'decoder.<i>' (after decoder layer i) or 'vision.<i>'",
            ),
            Misuse(
                '{"site": "decoder.٣", "keep": 18}',
                "policy.json is not a policy file: no site 'decoder.٣'; a site is "
                "'projector', 'decoder.<i>' (after decoder layer i) or 'vision.<i>'",
            ),
            Misuse(
                '{"site": "projector", "keep": true}',
                "policy.json is not a policy file: reductions[0].keep is True; it "
                "should be a valid integer, or be a valid number",
            ),
            Misuse(
                '{"site": "projector", "keep": 1e9}',
                "policy.json is not a policy file: reductions[0].keep is "
                "1000000000.0; it should be a valid integer, or be less than or "
                "equal to 1",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "gian": 1}',
                "policy.json is not a policy file: reductions[0] has no field "
                "'gian'; the fields are site, keep, share, scores, selector, diversity, "
                "options, observe, tiers, order, receivers, gain, assignment ...",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "gain": NaN}',
                "policy.json is not a policy file: reductions[0].gain is nan; it "
                "should be a finite number",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "gain": "1"}',
                "policy.json is not a policy file: reductions[0].gain is '1'; it "
                "should be a valid number",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "residual": 1}',
                "policy.json is not a policy file: reductions[0].residual is 1; it "
                "should be a valid boolean",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "scores": {"novelty": -1}}',
                "policy.json is not a policy file: reductions[0].scores.novelty is "
                "-1; it should be greater than or equal to 0",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "temperature": "hot"}',
                "policy.json is not a policy file: reductions[0].temperature is "
                "'hot'; it should be a valid number, or be 'inf'",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "tiers": [{"selector": "top_k"}]}',
                "policy.json is not a policy file: reductions[0].tiers[0]: it lacks "
                "the field 'keep', or 'share'",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "selector": "best"}',
                "policy.json is not a policy file: projector: selector is 'best'; "
                "choose from top_k, greedy ...",
            ),
            Misuse(
                '{"site": "projector", "keep": 18, "learned": {"probe": {"shape": '
                '[4], "dtype": "load"}}}',
                "policy.json is not a policy file: reductions[0].learned.probe.dtype "
                "is 'load'; it should be 'float32'",
            ),
        ),
    ),
    Section(
        "The learned parts beside a policy",
        "A policy in the folder `learned` with a probe of four numbers, whose "
        "`policy.safetensors` holds this.",
        read_learned,
        (
            Misuse(
                "b'no tensors'",
                "policy.json with policy.safetensors is not a policy file: "
                "learned/policy.safetensors is damaged: "
                "Error while deserializing header: header too large; restore it",
            ),
            Misuse(
                "None",
                "policy.json is not a policy file: the learned parts of projector "
                "are {}, which are not those of the policy; read a policy with "
                "Policy.load, beside its .safetensors file",
            ),
            Misuse(
                "{'projector/probe': torch.ones(4)}",
                "policy.json with policy.safetensors is not a policy file: "
                "the learned parts are not those "
                "that the policy was written with (their hash differs); restore the "
                ".safetensors file that belongs to it",
            ),
            Misuse(
                "{'projector/probe': torch.ones(5)}",
                "policy.json with policy.safetensors is not a policy file: "
                "the learned parts of projector "
                "are {'probe': {'shape': [5], 'dtype': 'float32'}}, which are not "
                "those of the policy; read a policy with Policy.load ...",
            ),
            Misuse(
                "{'projector/probe': torch.full((4,), torch.nan)}",
                "policy.json with policy.safetensors is not a policy file: "
                "learned: probe holds numbers that "
                "are not finite; train it again",
            ),
            Misuse(
                "{'projector/probe': torch.arange(4.0), 'more': torch.ones(1)}",
                "policy.json with policy.safetensors is not a policy file: "
                "there are learned parts that it "
                "does not name: 'more'",
            ),
        ),
    ),
    Section(
        "The manifest of an export",
        "What `OnnxModel.from_pretrained` says of a `deos_fx.json` with this entry in place of "
        "the right one; the schema is [onnx.json](schemas/onnx.json).",
        read_export,
        (
            Misuse(
                '"deos_fx": "policy"',
                "deos_fx.json is not the manifest of an export: it does not say "
                '"deos_fx": "onnx". Export the model again, or use the release that '
                "wrote it.",
            ),
            Misuse(
                '"version": 99',
                "deos_fx.json is not the manifest of an export: it has version 99, "
                f"and this release reads version {VERSION}. Export the model again, or use "
                "the release that wrote it.",
            ),
            Misuse(
                '"graphs": []',
                "deos_fx.json is not the manifest of an export: graphs is []; it "
                "should have at least 3 items after validation, not 0. Export the "
                "model again, or use the release that wrote it.",
            ),
            Misuse(
                '"graphs": ["prefill", "decode", "decode"]',
                "deos_fx.json is not the manifest of an export: graphs is "
                "['prefill', 'decode', 'decode']; it should name each of ['prefill', "
                "'decode', 'extend'] once. Export the model again ...",
            ),
            Misuse(
                '"graphs": ["prefill", "decode", "../elsewhere"]',
                "deos_fx.json is not the manifest of an export: graphs[2] is "
                "'../elsewhere'; it should be 'prefill', 'decode', 'extend' or "
                "'image_encoder'. Export the model again ...",
            ),
            Misuse(
                '"graph": ["prefill"]',
                "deos_fx.json is not the manifest of an export: it has no field "
                "'graph'; the fields are files, sha256, deos_fx, version, packages, "
                "opset, model, device, dtype, weights, graphs ...",
            ),
            Misuse(
                '"dtype": "load"',
                "deos_fx.json is not the manifest of an export: dtype is 'load'; it "
                "should be 'float64', 'float32', 'float16' or 'bfloat16'. Export the "
                "model again, or use the release that wrote it.",
            ),
            Misuse(
                '"coordinates": 1000000000',
                "deos_fx.json is not the manifest of an export: coordinates is "
                "1000000000; it should be less than or equal to 8. Export the model "
                "again, or use the release that wrote it.",
            ),
            Misuse(
                '"coordinates": true',
                "deos_fx.json is not the manifest of an export: coordinates is True; "
                "it should be a valid integer. Export the model again, or use the "
                "release that wrote it.",
            ),
            Misuse(
                '"image_token": -2',
                "deos_fx.json is not the manifest of an export: image_token is -2; "
                "it should be greater than or equal to -1. Export the model again, or "
                "use the release that wrote it.",
            ),
            Misuse(
                '"image_tokens": 64.0',
                "deos_fx.json is not the manifest of an export: image_tokens is "
                "64.0; it should be a valid integer. Export the model again, or use "
                "the release that wrote it.",
            ),
            Misuse(
                '"pixels": [1, 3, "32", 32]',
                "deos_fx.json is not the manifest of an export: pixels[2] is '32'; "
                "it should be a valid integer. Export the model again, or use the "
                "release that wrote it.",
            ),
            Misuse(
                '"spaces": [{"first": 2}]',
                "deos_fx.json is not the manifest of an export: spaces[0] has no "
                "field 'first'; the fields are first_layer, position, biased, "
                "dropped; spaces[0] lacks the field 'first_layer' ...",
            ),
            Misuse(
                '"spaces": [{"first_layer": 9, "position": "keep", "biased": false, "dropped": 4}]',
                "deos_fx.json is not the manifest of an export: spaces has a space "
                "from layer 9 on without 4 tokens, but of layers there are 4, and of "
                "image tokens 64. Export the model again ...",
            ),
        ),
    ),
    Section(
        "The state of a search",
        "What `search(checkpoint=...)` says of a `search.json` of three steps with this entry in "
        "place of the right one; the schema is [search.json](schemas/search.json).",
        read_search,
        (
            Misuse(
                '"tensors": "../step-3.safetensors"',
                "checkpoint/search.json is not the state of a search: tensors is "
                "'../step-3.safetensors'; it should match pattern "
                "'^step-[0-9]{1,9}\\.safetensors$'. Give another checkpoint folder ...",
            ),
            Misuse(
                '"history": []',
                "checkpoint/search.json is not the state of a search: its history "
                "has 0 steps, but its tensors are step-3.safetensors, and its best "
                "loss is that of step 1. Give another checkpoint folder ...",
            ),
            Misuse(
                '"history": [{"step": 1}]',
                "checkpoint/search.json is not the state of a search: history[0] "
                "lacks the field 'task'; history[0] lacks the field 'finite'; "
                "history[0] lacks the field 'not_finite'; and 2 more ...",
            ),
            Misuse(
                '"multipliers": {"flops": NaN}',
                "checkpoint/search.json is not the state of a search: "
                "multipliers.flops is nan; it should be a finite number. Give "
                "another checkpoint folder, or delete this one.",
            ),
            Misuse(
                '"multipliers": {"flops": -1.0}',
                "checkpoint/search.json does not go with its tensors: a multiplier "
                "is negative: {'flops': -1.0}. Give another checkpoint folder, or "
                "delete this one.",
            ),
            Misuse(
                '"best_step": true',
                "checkpoint/search.json is not the state of a search: best_step is "
                "True; it should be a valid integer. Give another checkpoint folder, "
                "or delete this one.",
            ),
            Misuse(
                '"best_step": 4',
                "checkpoint/search.json is not the state of a search: its history "
                "has 3 steps, but its tensors are step-3.safetensors, and its best "
                "loss is that of step 4. Give another checkpoint folder ...",
            ),
            Misuse(
                '"settings": {"steps": 10}',
                "checkpoint holds another search (other model, data, budget, steps "
                "or seed). Give another checkpoint folder, or delete this one.",
            ),
        ),
    ),
    Section(
        "The command line",
        "Every command prints one line and ends with exit code 1. `my-llava` is whole, the other "
        "folders hold what their names say.",
        run_command,
        tuple(
            Misuse(given, says, Failed)
            for given, says in (
                ("deos-fx presets best", "no preset 'best'; choose from ..."),
                ("deos-fx inspect nowhere", "there is no folder nowhere"),
                ("deos-fx inspect deep", "deep/config.json cannot be loaded (RecursionError ..."),
                ("deos-fx inspect listed", "listed"),
                (
                    "deos-fx inspect typed",
                    "typed cannot be loaded (StrictDataclassFieldValidationError: Validation error "
                    "for field 'image_seq_length': TypeError: Field 'image_seq_length' expected "
                    "int, got str (value: 'many')). If a file is damaged or of another model, save "
                    "or download it again.",
                ),
                (
                    "deos-fx data asked.jsonl --model unread",
                    "unread/tokenizer.json cannot be loaded (JSONDecodeError ...",
                ),
                (
                    "deos-fx inspect my-llava --policy bad.json",
                    "bad.json is not a policy file: reductions[0].site is 3; it should be "
                    "a valid string",
                ),
                (
                    "deos-fx inspect my-llava --policy nowhere.json",
                    "nowhere.json: No such file or directory",
                ),
                (
                    "deos-fx inspect my-llava --policy bad.json --preset merge",
                    "--policy says where to keep how much; give it without the others",
                ),
                (
                    "deos-fx inspect my-llava --preset merge --budget 1000",
                    "budget visual_tokens=1000, but the model has only 64; give at most "
                    "that, or a fraction in (0, 1]",
                ),
                (
                    "deos-fx transform damaged out",
                    "damaged/model.safetensors cannot be loaded (SafetensorError ...",
                ),
                ("deos-fx transform pickled out", "pickled cannot be loaded (UnpicklingError ..."),
                (
                    "deos-fx transform my-llava asked.jsonl --force",
                    "asked.jsonl is a file, and a folder is written; give another name",
                ),
                (
                    "deos-fx export my-llava my-llava.onnx",
                    "my-llava.onnx would be a folder, with several files in it; give a name "
                    "without .onnx",
                ),
                (
                    "deos-fx profile my-llava --device gpu",
                    "'gpu' is not a device; give cpu, cuda, cuda:1, ... or auto",
                ),
                (
                    "deos-fx profile my-llava --device cuda:99",
                    "there is no device cuda:99: torch ...",
                ),
                (
                    "deos-fx search my-llava --data nowhere.jsonl",
                    "nowhere.jsonl: No such file or directory",
                ),
            )
        ),
    ),
)


def rows() -> list[tuple[Section, Misuse]]:
    """Return every row with its section."""
    return [(section, row) for section in SECTIONS for row in section.rows]


def page() -> str:
    """Write the table as a page of the documentation."""
    lines = [
        "# What is said of misuse",
        "",
        "Mistakes in arguments, and files that are damaged or not ours, are refused with a message "
        "that says what was given, what was expected and what to do. This page is written by "
        "`tests/misuse.py`, whose rows a test tries.",
        "",
    ]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", section.words, ""]
        lines += ["| given | raised | says |", "| --- | --- | --- |"]
        for row in section.rows:
            raised = "exit code 1" if row.error is Failed else f"`{row.error.__name__}`"
            given, says = (text.replace("|", "\\|") for text in (row.given, row.says))
            lines.append(f"| `{given}` | {raised} | {says} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
