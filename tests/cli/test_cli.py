"""The command line: what it does with good input, and one clear line for bad input."""

import errno
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer
from cli_cases import fails, run
from families import FAMILIES, TWINS
from PIL import Image
from rich.console import Console
from tiny import inputs, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from deos_fx import Budget, Policy, ReducedModel, Reduction, SearchResult, presets, reference
from deos_fx.cli.app import app
from deos_fx.cli.limits import read_limit
from deos_fx.cli.searching import measured, presets_tuned, write_found
from deos_fx.contents import write_record
from deos_fx.cost.model import CostModel
from deos_fx.data import Record
from deos_fx.policy.learned import Learned
from deos_fx.results.search_front import SearchFront
from deos_fx.results.search_result import Candidate
from deos_fx.version import __version__

COMMANDS = (
    "demo",
    "search",
    "transform",
    "export",
    "inspect",
    "compare",
    "check",
    "profile",
    "data",
    "eval",
    "show",
    "generate",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    return folder


# *** help ***


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = run(command, "--help")
    assert "Examples" in text
    assert f"deos-fx {command}" in text


def test_help_lists_every_command():
    text = run("--help")
    assert all(name in text for name in COMMANDS)


def test_version():
    assert run("--version").strip() == f"deos-fx {__version__}"


def test_python_m_is_the_same():
    command = [sys.executable, "-m", "deos_fx", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python -m deos_fx" in output


# *** inspect, transform, search ***


def test_inspect_shows_sites_and_costs(model_dir):
    text = run("inspect", model_dir, "--preset", "merge", "--budget", "12.5%")
    assert "64 visual tokens an image (8 x 8)" in text
    assert "decoder.0 to 4" in text and "LlamaDecoderLayer x 5" in text
    assert "(2) no decoder layer comes after it" in text
    assert "-> 8" in text and "keep 8" in text
    assert "12.5%" in text


def drawn(svg):
    """The texts of a drawing from top to bottom, after checking that nothing lies on them."""
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    texts = [node for node in root if node.tag.endswith("text")]
    places = [(float(node.attrib["y"]), float(node.attrib["x"]), node.text) for node in texts]
    assert all(0 < y < height and 0 < x < width for y, x, _ in places)
    for column in {x for _, x, _ in places}:
        ys = sorted(y for y, x, _ in places if x == column)
        assert all(below - above >= 16 for above, below in zip(ys, ys[1:], strict=False))
    return [text for _, _, text in sorted(places)]


@pytest.mark.parametrize("layers", [2, 80])
def test_a_config_is_enough_to_inspect_and_draw_a_model(layers, tmp_path):
    tiny_llava(2).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    Policy((Reduction("decoder.0", 16),)).save(tmp_path / "policy.json")
    svg = tmp_path / "model.svg"
    text = run("inspect", tmp_path, "--policy", tmp_path / "policy.json", "--svg", svg)
    assert f"decoder.{layers - 1}" in text and "Wrote" in text
    texts = drawn(svg)
    assert texts[0] == "LlavaForConditionalGeneration" and texts[-1] == "logits"
    assert "prune: 64 → 16 visual tokens" in texts
    assert "80 tokens: 64 visual, 16 text" in texts and "32 tokens: 16 visual, 16 text" in texts


@pytest.mark.parametrize("name", ["internvl", "gemma3", "smolvlm", "qwen2_5_vl", "llava_next"])
def test_other_families_are_inspected(name, tmp_path):
    FAMILIES[name].config().save_pretrained(tmp_path)
    text = run("inspect", tmp_path)
    assert "decoder.0 to 3" in text and "projector" in text and "available" in text


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "qwen3_vl_moe", "granite4_vision"])
def test_presets_are_fitted_to_images_of_any_size(name, tmp_path):
    (FAMILIES | TWINS)[name].config().save_pretrained(tmp_path)
    text = run("inspect", tmp_path, "--preset", "merge", "--budget", "0.25")
    assert "keep 0.25" in text and "25.0%" in text


def test_inspect_says_why_a_tower_has_no_sites(tmp_path):
    # Flags say where its images are.
    FAMILIES["kosmos-2"].config().save_pretrained(tmp_path)
    assert "(1) queries read all patches of an image" in run("inspect", tmp_path)


def test_inspect_says_what_cannot_be_known_without_weights(tmp_path):
    (FAMILIES | TWINS)["step3p7"].config().save_pretrained(tmp_path)
    assert "which there are none of without weights" in fails("inspect", tmp_path)


def test_inspect_says_which_layers_do_not_attend(tmp_path):
    FAMILIES["qwen3_5"].config().save_pretrained(tmp_path)
    text = run("inspect", tmp_path, "--svg", tmp_path / "model.svg")
    number = re.search(r"\((\d)\) its layer does not attend", text)[1]
    assert f"available ({number})" in text
    assert any("reduction available (its" in note for note in drawn(tmp_path / "model.svg"))


def test_a_preset_that_cannot_be_fitted_names_the_nearest(tmp_path):
    FAMILIES["qwen2_5_vl"].config().save_pretrained(tmp_path)
    message = fails("inspect", tmp_path, "--preset", "hiprune")
    assert "hiprune cannot be fitted: it reads the attention of an earlier block" in message
    assert message.endswith("; divprune comes nearest")


def test_a_preset_needs_an_image(tmp_path):
    FAMILIES["fuyu"].config().save_pretrained(tmp_path)
    options = ("--preset", "merge", "--budget", "25%")
    message = fails("transform", tmp_path, tmp_path / "out", *options)
    assert "save its processor in the model's folder, or give --policy" in message


def test_inspect_says_what_it_needs(tmp_path):
    FAMILIES["fuyu"].config().save_pretrained(tmp_path)
    assert "Save its processor in the model's folder" in fails("inspect", tmp_path)


def test_inspect_prints_json(model_dir):
    found = json.loads(run("inspect", model_dir, "--preset", "merge", "--budget", "8", "--json"))
    assert (found["visual_tokens"], found["grid"]) == (64, [8, 8])
    projector = next(row for row in found["rows"] if row["blocks"] == "projector")
    assert (projector["reduction"], projector["left"], projector["available"]) == ("merge", 8, True)
    assert found["policy"]["reductions"][0]["keep"] == 8
    assert found["costs"]["after"]["visual_tokens"] == 8.0
    assert json.loads(run("inspect", model_dir, "--json"))["costs"] is None
    listed = json.loads(run("presets", "--json"))
    assert [one["name"] for one in listed] == presets.names()


def test_quiet_commands_print_what_was_asked_for_alone(model_dir, tmp_path):
    assert "Wrote" in run("transform", model_dir, tmp_path / "out")
    assert "Wrote" not in run("--quiet", "transform", model_dir, tmp_path / "out", "--force")
    assert "decoder.0" in run("--quiet", "inspect", tmp_path / "out")


def test_a_folder_of_a_reduced_model_stands_for_the_reduced_model(model_dir, tmp_path, caplog):
    out = tmp_path / "out"
    run("transform", model_dir, out, "--preset", "fastv", "--budget", "50%")
    text = run("inspect", out)
    assert "fastv" in text and "Cost of the prefill" in text
    run("transform", out, tmp_path / "half", "--dtype", "bfloat16")
    again = ReducedModel.from_pretrained(tmp_path / "half")
    assert (again.policy.name, again.dtype) == ("fastv", torch.bfloat16)
    assert not caplog.records
    # Another policy replaces its own, and not without a word.
    run("transform", out, tmp_path / "other", "--preset", "merge", "--budget", "50%")
    assert "its policy is left aside" in caplog.text
    assert ReducedModel.from_pretrained(tmp_path / "other").policy.name == "merge"


@pytest.mark.parametrize("command", ["transform", "export"])
def test_no_command_writes_into_the_folder_it_reads(command, model_dir):
    before = {path: path.stat().st_mtime_ns for path in model_dir.iterdir()}
    message = fails(command, model_dir, model_dir / ".." / model_dir.name, "--force")
    assert "is the model's own folder" in message
    assert {path: path.stat().st_mtime_ns for path in model_dir.iterdir()} == before


def test_nothing_is_overwritten_without_force(model_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    svg = tmp_path / "model.svg"
    svg.write_text("mine")
    for arguments in (
        ("transform", model_dir, out),
        ("search", model_dir, "--data", svg, "--output", out),
        ("compare", model_dir, "--test", svg, "--output", out),
        ("demo", "--output", out),
        ("inspect", model_dir, "--svg", svg),
        ("profile", model_dir, "--output", svg),
    ):
        assert "add --force to overwrite" in fails(*arguments)
    assert (out / "config.json").read_text() == svg.read_text() == "mine"
    run("inspect", model_dir, "--svg", svg, "--force")
    assert svg.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        # After the last layer nothing would be saved; the tower's last block is not used.
        (Reduction("decoder.5", 8), "no decoder layer comes after it"),
        (Reduction("vision.2", 8), "not used by the language model"),
        (Reduction("projector", 8, scores={"last_text_attention": 1.0}), "has no score"),
        (
            Reduction("projector", 11, selector="windows", options={"windows": 11}),
            "11 windows do not fit",
        ),
        (Reduction("decoder.0", 8, observe="decoder.3"), "cannot observe"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "transform", "export"])
def test_a_policy_that_the_first_call_would_refuse_is_refused_before_anything_else(
    command, reduction, words, model_dir, tmp_path, monkeypatch
):
    Policy((reduction,)).save(tmp_path / "policy.json")
    loading = "transformers.AutoModelForImageTextToText.from_pretrained"
    monkeypatch.setattr(loading, lambda *_, **__: pytest.fail("loaded weights before checking"))
    out = () if command == "inspect" else (tmp_path / "out",)
    message = fails(command, model_dir, *out, "--policy", tmp_path / "policy.json")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_transform_with_a_preset_fits_it_to_the_budget(model_dir, tmp_path):
    run("transform", model_dir, tmp_path / "out", "--preset", "fastv", "--budget", "0.5")
    reduced = ReducedModel.from_pretrained(tmp_path / "out")
    assert reduced.policy == presets.fit("fastv", 32, tiny_llava())


def test_transform_with_a_policy_file_gives_the_same_model(model_dir, tmp_path):
    policy = Policy((Reduction("decoder.1", 9, gain=1.0),))
    policy.save(tmp_path / "policy.json")
    run("transform", model_dir, tmp_path / "out", "--policy", tmp_path / "policy.json")
    given = inputs(tiny_llava())
    expected = ReducedModel(tiny_llava(), policy)(**given).logits
    got = ReducedModel.from_pretrained(tmp_path / "out")(**given).logits
    assert torch.equal(got, expected)


def test_transform_at_a_budget_alone(model_dir, tmp_path):
    run("transform", model_dir, tmp_path / "out", "--budget", "8")
    cost = ReducedModel.from_pretrained(tmp_path / "out").cost(**inputs(tiny_llava()))
    assert cost.after.visual_tokens <= 8


def test_export_for_another_engine(model_dir, tmp_path, monkeypatch):
    exported = []

    def note(reduced, folder, **given):
        (folder / "genai_config.json").write_text("{}")
        exported.append((reduced.policy, given["device"], given["verify"]))

    monkeypatch.setattr("deos_fx.exporters.genai.export_genai", note)
    run("export", model_dir, tmp_path / "x", "--preset", "merge", "--budget", "9", "--genai")
    assert exported == [(presets.merge(keep=9), None, True)]
    assert (tmp_path / "x/genai_config.json").is_file()
    message = fails("export", model_dir, tmp_path / "y", "--genai", "--weights", "int4")
    assert "--genai and --weights exclude each other" in message


def test_export_takes_the_policy_of_a_reduced_model(model_dir, tmp_path, monkeypatch):
    exported, given = [], []

    def note(reduced, folder, *, example_inputs, device, weights, elastic, verify, progress):
        exported.append(reduced.policy)
        given.append((device, weights, verify))
        progress("trace", 1, 1)
        (folder / "prefill.onnx").write_text("")

    monkeypatch.setattr("deos_fx.exporters.onnx.export_onnx", note)
    run("transform", model_dir, tmp_path / "reduced", "--preset", "merge", "--budget", "9")
    run("export", tmp_path / "reduced", tmp_path / "onnx")
    other = ("--preset", "avg_pool", "--budget", "16")
    assert "add --force" in fails("export", model_dir, tmp_path / "onnx", *other)
    run("export", model_dir, tmp_path / "onnx", *other, "--force")
    options = ("--device", "cuda", "--weights", "int4", "--no-verify")
    run("export", tmp_path / "reduced", tmp_path / "gpu", *options)
    assert exported == [presets.merge(keep=9), presets.avg_pool(keep=16), presets.merge(keep=9)]
    assert given == [(None, None, True), (None, None, True), ("cuda", "int4", False)]
    assert (tmp_path / "onnx" / "prefill.onnx").exists()


def test_search_writes_policy_and_report(questions, tmp_path, monkeypatch):
    """Searching itself takes minutes and is tested elsewhere; here a preset is found."""
    seen = {}

    def find(model, data, *, budget, progress, **options):
        costs = CostModel.of_images(model, images=1, text_tokens=8)
        policy = presets.fit("merge", budget.visual_tokens, model)
        progress("steps", 1, 1)
        seen.update(options, budget=budget, shapes=[batch["labels"].shape[0] for batch in data])
        found = Candidate(policy, "preset merge", 0.5, costs.predict(policy))
        history = [{"step": 1, "task": 0.5, "visual_tokens": 18.0}]
        whole = costs.predict(Policy())
        limits = {"visual_tokens": 18.0}
        return SearchResult(policy, history, [found], limits, whole, 0.4, 0.5)

    monkeypatch.setattr("deos_fx.passes.search.search.search", find)
    out = tmp_path / "found"
    options = ("--budget", "18", "--steps", 3, "--batch-size", 2, "--output", out)
    text = run("search", reference.WEIGHTS, "--data", questions, *options)
    # Three questions are too few to hold some back, so all of them are asked.
    assert "Answers to 3 questions" in text and "no reduction" in text and "searched" in text
    assert "Of 3 questions of the data" in (out / "report.html").read_text()
    assert seen["budget"] == Budget(visual_tokens=18)
    assert (seen["steps"], seen["seed"], seen["shapes"]) == (3, 0, [2, 1])
    assert Policy.load(out / "policy.json") == presets.merge(keep=18)
    assert sorted(path.name for path in out.iterdir()) == ["policy.json", "report.html"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_a_search_has_found_is_kept_if_it_cannot_be_measured(error, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("deos_fx.comparison.compare.evaluate", fail)
    model, processor = reference.load()
    cost = CostModel.of_images(model, images=1, text_tokens=8).predict(Policy())
    found = SearchResult(Policy(), [], [Candidate(Policy(), "", 0.5, cost)], {}, cost, 0.5, 0.5)
    groups = [[Record(Image.new("RGB", (144, 144)), "what?", "a")]]
    assert measured(found, model, processor, groups, lambda *_: None) is found
    assert (str(error) or "interrupted") in caplog.text
    assert "answers and times were not measured" in caplog.text


def test_what_a_search_has_found_is_kept_if_its_report_does_not_fit(monkeypatch, caplog, tmp_path):
    model, _ = reference.load()
    cost = CostModel.of_images(model, images=1, text_tokens=8).predict(Policy())
    found = SearchResult(Policy(), [], [Candidate(Policy(), "", 0.5, cost)], {}, cost, 0.5, 0.5)

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(SearchResult, "report", full)
    assert write_found(found, tmp_path, Console(), 1) == ["policy.json"]
    assert "there is no report: no space left" in caplog.text
    monkeypatch.setattr(Policy, "save", full)
    console = Console(file=io.StringIO())
    with pytest.raises(OSError, match="no space left"):
        write_found(found, tmp_path, console, 1)
    assert "no reduction" in console.file.getvalue()


def test_learned_parts_are_kept_elsewhere_if_the_folder_of_a_search_is_full(monkeypatch, tmp_path):
    model, _ = reference.load()
    cost = CostModel.of_images(model, images=1, text_tokens=8).predict(Policy())
    learned = Policy((Reduction("projector", 8, learned=Learned({"probe": torch.ones(4)})),))
    found = SearchResult(learned, [], [Candidate(learned, "", 0.5, cost)], {}, cost, 0.5, 0.5)
    save, full, elsewhere = Policy.save, tmp_path / "full", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def save_elsewhere(policy, path):
        if Path(path).is_relative_to(full):
            raise OSError("no space left")
        save(policy, path)

    monkeypatch.setattr(Policy, "save", save_elsewhere)
    with pytest.raises(OSError, match=r"^no space left. The policy is in .*elsewhere") as error:
        write_found(found, full, Console(file=io.StringIO()), 1)
    place = str(error.value).partition("The policy is in ")[2].partition(",")[0]
    assert Policy.load(place) == learned


def test_presets_are_tuned_by_default_where_optuna_is_installed(monkeypatch, capsys):
    console = Console()
    assert presets_tuned(None, console) == 48 and presets_tuned(0, console) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert presets_tuned(None, console) == 0
    assert "pip install 'deos-fx[compare]'" in " ".join(capsys.readouterr().out.split())


def test_search_takes_several_budgets_and_says_how_long_it_will_take(
    questions, tmp_path, monkeypatch
):
    seen = {}

    def find(model, data, *, budgets, progress, **options):
        costs = CostModel.of_images(model, images=1, text_tokens=8)
        for stage, done, total in (("capture", 1, 1), ("estimate", 60, 240), ("steps", 1, 1)):
            progress(stage, done, total)
        seen.update(options, budgets=budgets)
        whole, results = costs.predict(Policy()), {}
        for budget, keep in zip(budgets, (36, 18), strict=True):
            policy = presets.merge(keep=keep)
            found = Candidate(policy, "preset merge", 0.5, costs.predict(policy))
            limits = {"visual_tokens": 18.0}
            results[budget] = SearchResult(policy, [], [found], limits, whole, 0.4, 0.5)
        return SearchFront(results)

    monkeypatch.setattr("deos_fx.passes.search.search.search", find)
    out = tmp_path / "found"
    options = ("--budget", "25%", "--budget", "18", "--kv-cache", "0.5", "--output", out)
    text = run("search", reference.WEIGHTS, "--data", questions, *options)
    assert "about 3 minutes more" in text and "policy-0.25.json, policy-18.json" in text
    assert seen["budgets"] == [Budget(visual_tokens=x, kv_cache=0.5) for x in (0.25, 18)]
    page = (out / "report.html").read_text()
    assert "Answers to 3 questions" in text and "searched at 0.25" in page and "at 18" in page
    names = ["policy-0.25.json", "policy-18.json", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert Policy.load(out / "policy-18.json") == presets.merge(keep=18)


@pytest.mark.slow
def test_processes_share_a_search(questions, tmp_path):
    """In pieces of one question, of which the two processes take one each."""
    search = ["-m", "deos_fx", "search", str(reference.WEIGHTS), "--data", str(questions)]
    search += ["--batch-size", "1", "--steps", "1"]
    # accelerate's own launcher starts one process on a CPU, unless there is MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, command in {"one": search, "two": launch + search}.items():
        done = subprocess.run(
            [sys.executable, *command, "--output", str(tmp_path / name)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert (tmp_path / name / "report.html").exists()
        # One process of several reports, and writes.
        assert done.stdout.count("policy.json, report.html to") == 1
    one, two = (Policy.load(tmp_path / name / "policy.json") for name in ("one", "two"))
    assert one == two


# *** compare ***


def test_compare_writes_files_and_a_table(questions, tmp_path):
    for name, policy in (("a", Policy()), ("b", presets.merge(keep=9))):
        (tmp_path / name).mkdir()
        policy.save(tmp_path / name / "policy.json")
    files = [tmp_path / name / "policy.json" for name in ("a", "b")]
    options = [text for file in files for text in ("--policy", file)]
    out = tmp_path / "out"
    text = run(
        "compare",
        reference.WEIGHTS,
        *("--test", questions, *options, "--preset", "merge", "--budget", "9", "--output", out),
    )
    found = json.loads((out / "comparison.json").read_text())
    of = {method["method"]: method for method in found["methods"]}
    # Files of one name are told apart by their folders.
    names = [str(file) for file in files]
    assert list(of)[0] == "no reduction" and {*names, "merge", "no image"} <= set(of)
    assert of[names[0]]["accuracy"] == of["no reduction"]["accuracy"]
    assert of[names[1]]["minus_unreduced"] == of["merge"]["minus_unreduced"]
    assert (found["questions"], found["limit_visual_tokens"]) == (3, 9.0)
    assert (out / "comparison.html").exists() and "no reduction" in text
    assert "changes nothing: a llava model" in " ".join(text.split())


def test_compare_says_how_long_tuning_will_take(questions, tmp_path, monkeypatch):
    def compare(model, processor, records, *, progress, **options):
        progress("methods", 1, 3)
        progress("estimate", 60, 600)
        raise ValueError("that is enough")

    monkeypatch.setattr("deos_fx.comparison.compare.compare", compare)
    options = ("--test", questions, "--output", tmp_path / "out")
    text = " ".join(run("compare", reference.WEIGHTS, *options, code=1).split())
    assert "The comparison will take about 9 minutes more; fewer --evaluations" in text


def test_compare_refuses_the_same_questions_before_it_loads(questions, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("deos_fx.cli.loading.load_model", None)
    options = ("--test", questions, "--tune", questions, "--output", tmp_path / "out")
    text = fails("compare", reference.WEIGHTS, *options)
    assert "Question 1 of the test data is question 1 of the tuning data" in text
    assert not (tmp_path / "out").exists()


def test_compare_refuses_a_file_given_twice(questions, tmp_path):
    Policy().save(tmp_path / "policy.json")
    twice = ("--policy", tmp_path / "policy.json") * 2
    assert "given twice" in fails("compare", reference.WEIGHTS, "--test", questions, *twice)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_lines_where_the_terminal_ends(command):
    words = [line.strip() for line in run(command, "--help").split("Examples")[0].splitlines()]
    for line, following in itertools.pairwise(words[2:]):
        if line and following:
            # The next word had no place.
            assert len(line) + 1 + len(following.split()[0]) > 78, line


# *** bad input ***


def test_no_such_folder(tmp_path):
    assert "there is no folder" in fails("inspect", tmp_path / "none")
    assert fails("inspect", tmp_path).endswith("give the folder that a model was saved in")


def test_a_folder_that_is_missing_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Where there is no network, it would be asked for five times.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "found").mkdir()
    assert fails("inspect", "found/modle").endswith("there is no folder found/modle")
    message = fails("inspect", "nobody/modle")
    assert "there is no folder nobody/modle, and the hub has not given a model" in message


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        (("text_config", "num_hidden_layers"), 10**9, "1,000,000,000, and a model has at most 1,0"),
        (("vision_config", "image_size"), 10**6, "1,000,000, and a model has at most 8,000 pixels"),
        (("vision_config", "depths"), [2, 9999], "9,999, and a model has at most 1,000 layers"),
    ],
)
def test_a_config_of_which_too_much_would_be_built(entry, value, words, tmp_path):
    config = tiny_llava(2).config.to_dict()
    config[entry[0]][entry[1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = fails("inspect", tmp_path)
    assert f"{tmp_path / 'config.json'}: {'.'.join(entry)} is {words}" in message


@pytest.mark.parametrize(("kind", "runner"), [("onnx", "generate"), ("genai", "onnxruntime-genai")])
def test_an_export_is_no_model(kind, runner, model_dir, tmp_path):
    export = tmp_path / "export"
    shutil.copytree(model_dir, export)
    write_record(export, {"deos_fx": kind})
    for command in (("transform", export, tmp_path / "out"), ("export", export, tmp_path / "out")):
        message = fails(*command)
        assert f"{export} is an export" in message and f"{runner} runs" in message


def test_text_model(tmp_path):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    assert "llama model, which reads no images" in fails("inspect", tmp_path / "text")


def test_budget_out_of_range(model_dir):
    message = fails("inspect", model_dir, "--preset", "merge", "--budget", "200")
    assert "the model has only 64" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("12.5%", 0.125), ("0.125", 0.125), ("1.0", 1.0), ("1", 1), ("18", 18), ("1e12", 10**12)],
)
def test_limits_as_a_user_writes_them(text, value):
    got = read_limit(text)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "leaves nothing"),
        ("-5%", "leaves nothing"),
        ("nan", "leaves nothing"),
        ("12.5", "did you mean 12.5%?"),
        ("120%", "more than there is"),
        ("few", "'few' is no limit; write a share of all as 12.5% or 0.125"),
    ],
)
def test_wrong_limits_are_explained_in_the_words_of_the_command_line(text, words):
    with pytest.raises(typer.BadParameter, match=re.escape(words)):
        read_limit(text)


def test_budget_that_is_no_number(model_dir):
    text = run("inspect", model_dir, "--preset", "merge", "--budget", "few", code=2)
    assert "12.5%" in text


def test_corrupt_policy_leaves_nothing(model_dir, tmp_path):
    (tmp_path / "policy.json").write_text("{")
    message = fails("transform", model_dir, tmp_path / "out", "--policy", tmp_path / "policy.json")
    assert "policy.json is not a policy file" in message
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_policy_for_another_model(model_dir, tmp_path):
    Policy((Reduction("decoder.20", 8),)).save(tmp_path / "policy.json")
    message = fails("transform", model_dir, tmp_path / "out", "--policy", tmp_path / "policy.json")
    assert "decoder.20" in message
    assert not (tmp_path / "out").exists()


def test_policy_and_preset_at_once(model_dir, tmp_path):
    Policy().save(tmp_path / "policy.json")
    options = ("--policy", tmp_path / "policy.json", "--preset", "merge")
    assert "--policy" in fails("transform", model_dir, tmp_path / "out", *options)


@pytest.mark.parametrize("command", ["transform", "export"])
def test_folder_that_cannot_be_written(command, model_dir, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails(command, model_dir, tmp_path / "file" / "out")
    assert "cannot write the folder" in message


def test_demo_checks_its_folder_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "load", lambda: pytest.fail("worked before checking"))
    (tmp_path / "file").write_text("")
    assert "cannot write the folder" in fails("demo", "--output", tmp_path / "file" / "out")


def test_options_of_all_commands_come_first() -> None:
    for option in ("--quiet", "-q", "--debug"):
        result = CliRunner().invoke(app, ["search", "x", "--data", "y", option])
        assert result.exit_code == 2
        assert f"{option} comes first: deos-fx {option} search" in result.output
    assert "No such option: --fast" in CliRunner().invoke(app, ["check", "x", "--fast"]).output


def test_a_reader_that_has_enough_ends_a_command_without_a_word(model_dir, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("deos_fx.cli.outline.print_outline", closed)
    assert run("inspect", model_dir, code=1) == ""


class Misfit:
    """Finds a torchvision whose operators are those of another torch."""

    @staticmethod
    def find_spec(name, *rest):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("told", [True, False])
def test_a_torchvision_of_another_torch_is_named(told, monkeypatch, tmp_path):
    """transformers says so in some places; in others it is a module that cannot be imported."""

    def read(folder):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if told:
                raise
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr("deos_fx.cli.loading.meta_model", read)
    monkeypatch.setattr("deos_fx.cli.app.version", {"torchvision": "0.28", "torch": "2.13"}.get)
    # One that fits may be here, and loaded.
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Misfit, *sys.meta_path])
    message = fails("inspect", tmp_path)
    assert "torchvision 0.28 does not fit torch 2.13 (operator torchvision::nms" in message


def test_debug_shows_where_an_error_comes_from(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "inspect", str(tmp_path / "none")])
    assert isinstance(result.exception, ValueError)


def test_interrupted(model_dir, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("deos_fx.cli.outline.print_outline", interrupt)
    assert "Interrupted" in run("inspect", model_dir, code=130)


def test_interrupted_while_an_object_is_removed(model_dir, monkeypatch):
    """Python ignores an error that is raised there."""

    class Removed:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def remove(*_):
        Removed()
        for _ in range(500):
            time.sleep(0.01)
        raise AssertionError("it went on")

    monkeypatch.setattr("deos_fx.cli.outline.print_outline", remove)
    # Shells let jobs in the background ignore it, and tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert "Interrupted" in run("inspect", model_dir, code=130)
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_imports(model_dir, monkeypatch):
    """Packages raise errors of their own where they are imported when Ctrl-C comes."""

    def importing(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("Could not import module 'PreTrainedModel'") from None

    monkeypatch.setattr("deos_fx.cli.outline.print_outline", importing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert "Interrupted" in run("inspect", model_dir, code=130)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
