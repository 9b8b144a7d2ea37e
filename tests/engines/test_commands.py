"""`fewstep generate` and `fewstep inspect`, as a person types them."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tokenizers import Tokenizer, models

from engines import backends
from engines import bundle as bundles
from engines.backends.base import EngineOptions, GraphSpec
from engines.backends.fake import FakeEngine
from engines.backends.ort import OrtEngine
from engines.backends.standin import StandIn
from engines.bundle import Bundle, BundleError, write_bundle
from engines.commands import generate, inspect
from engines.images import decode_image
from engines.pipeline import Generate, Pipeline
from engines.provenance import describe_image
from tests.bundles import make_tiny_bundle


def call(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def test_generate_writes_the_image_that_the_pipeline_makes(text_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    options = ("--steps", 2, "--guidance-scale", 3, "--seed", 11, "--out", out)
    result = call(generate, text_bundle.path, "a red cat", *options, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "seed 11" in result.output
    with Pipeline.open(text_bundle.path, threads=1) as pipeline:
        (expected,) = pipeline.run([Generate("a red cat", 2, 2.0, 11)])
    np.testing.assert_array_equal(decode_image(out.read_bytes()), expected)
    written = json.loads(Image.open(out).text["fewstep"])  # type: ignore[attr-defined]
    assert written == json.loads(describe_image(Generate("a red cat", 2, 2.0, 11), text_bundle.manifest)["fewstep"])


def test_generate_takes_the_sampler_and_inspect_tells_of_it(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, stochastic=(2,), encoders=(4,))
    out = tmp_path / "cat.png"
    result = call(generate, bundle.path, "a cat", "--sampler", "stochastic", "--seed", 11, "--out", out, "--threads", 1)
    assert result.exit_code == 0, result.output
    with Pipeline.open(bundle.path, threads=1) as pipeline:
        (expected,) = pipeline.run([Generate("a cat", 4, 2.0, 11, sampler="stochastic")])
    np.testing.assert_array_equal(decode_image(out.read_bytes()), expected)
    shown = call(inspect, bundle.path).output
    assert "for the stochastic sampler in 4 steps too" in shown
    assert "with an encoder: encoder-4.onnx" in shown


def test_generate_waits_for_what_its_backend_compiles(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the precision, and with the plans, that it was told."""
    opened: list[EngineOptions] = []

    def open_slowly(graph: GraphSpec, options: EngineOptions) -> StandIn:
        opened.append(options)
        plain = replace(options, precision="fp32")
        return StandIn(OrtEngine(graph, plain), lambda wanted: FakeEngine(graph, plain), graph.path.name)

    monkeypatch.setattr(backends.fake, "open_slowly", open_slowly, raising=False)
    monkeypatch.setitem(backends.BACKENDS, "trt", "engines.backends.fake:open_slowly")
    options = ("--seed", 1, "--out", tmp_path / "cat.png", "--backend", "trt")
    result = call(generate, text_bundle.path, "a cat", *options, "--precision", "bf16", "--plans", tmp_path / "plans")
    assert result.exit_code == 0, result.output
    assert {(one.precision, one.plans) for one in opened} == {("bf16", tmp_path / "plans")}
    with Pipeline.open(text_bundle.path, "fake") as pipeline:
        (expected,) = pipeline.run([Generate("a cat", 4, 2.0, 1)])
    np.testing.assert_array_equal(decode_image((tmp_path / "cat.png").read_bytes()), expected)


def test_generate_says_which_backend_auto_took_and_why_not_the_others(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BEST_FIRST", ("pytorch-cuda", "fake", "ort"))
    options = ("--seed", 1, "--out", tmp_path / "cat.png", "--backend")
    told = call(generate, text_bundle.path, "a cat", *options, "auto")
    passed_over, taken = [line for line in told.stderr.splitlines() if line.startswith("backend")]
    assert passed_over.startswith("backend pytorch-cuda passed over: the bundle has no program of ")
    assert taken == "backend fake taken"
    assert told.stdout == f"{tmp_path / 'cat.png'}  seed 1\n"
    assert "backend" not in call(generate, text_bundle.path, "a cat", *options, "fake").stderr


def test_generate_numbers_several_images_and_their_seeds(text_bundle: Bundle, tmp_path: Path) -> None:
    result = call(
        generate, text_bundle.path, "moon", "--n", 3, "--seed", 5, "--out", tmp_path / "m.webp", "--backend", "fake"
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-0.webp", "m-1.webp", "m-2.webp"]
    assert all(f"seed {seed}" in result.output for seed in (5, 6, 7))


def test_generate_writes_all_images_before_it_names_them(text_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    command = [sys.executable, "-m", "fewstep", "generate", str(text_bundle.path), "a red apple", "--n", "4"]
    with subprocess.Popen([*command, "--backend", "fake", "--out", str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"apple-{i}.png" for i in range(4)]


def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(text_bundle: Bundle, tmp_path: Path) -> None:
    """And tells the seeds of what was made, as none was given. A limit of this process stands for that of a disk."""
    for i in range(3):
        (tmp_path / f"m-{i}.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        result = call(generate, text_bundle.path, "moon", "--n", 3, "--out", tmp_path / "m.png", "--backend", "fake")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert re.search(r"m-0\.png.*: File too large; its seed is \d+", result.output)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}
    assert len(list(tmp_path.iterdir())) == 3


def test_generate_without_a_seed_says_which_it_took(text_bundle: Bundle, tmp_path: Path) -> None:
    seeds = set()
    for name in ("a.png", "b.png"):
        result = call(generate, text_bundle.path, "moon", "--out", tmp_path / name, "--backend", "fake")
        seeds.add(result.output.rsplit("seed ", 1)[1].strip())
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", 3), "--steps"),
        (("--sampler", "stochastic"), "--sampler"),
        (("--guidance-scale", 99), "--guidance-scale"),
        (("--guidance-scale", "nan"), "--guidance-scale"),
        (("--seed", -1), "--seed"),
        (("--seed", 2**63 - 1, "--n", 2), "--seed"),
        (("--n", 0), "--n"),
        (("--out", "image.gif"), "--out"),
        (("--out", "absent/image.png"), "--out"),
        (("--backend", "abacus"), "--backend"),
        (("--threads", 3_000_000_000), "--threads"),
        (("--backend", "ort", "--plans", "plans"), "--plans: ort keeps no plans; trt, ort-tensorrt, pytorch-cuda"),
    ],
)
def test_generate_refuses_what_it_cannot_honour(
    text_bundle: Bundle, tmp_path: Path, arguments: tuple[object, ...], named: str
) -> None:
    options = ("--out", tmp_path / "x.png", "--backend", "fake", *arguments)
    result = call(generate, text_bundle.path, "a cat", *options)
    assert result.exit_code == 2
    assert named in result.output
    assert not list(tmp_path.iterdir())


def test_generate_refuses_a_precision_that_nothing_computes_in(text_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "x.png", "--backend", "fake", "--precision", "fp8")
    result = call(generate, text_bundle.path, "a cat", *options)
    assert result.exit_code == 1
    assert "the fake backend computes in fp32 only, not in fp8" in result.output


def test_generate_names_prompts_that_do_not_fit(text_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "x.png", "--backend", "fake")
    assert "PROMPT" in call(generate, text_bundle.path, "", *options).output
    assert "at most 8 fit" in call(generate, text_bundle.path, "cat " * 9, *options).output


def test_generate_says_plainly_that_it_cannot_write(text_bundle: Bundle, tmp_path: Path) -> None:
    result = call(generate, text_bundle.path, "moon", "--backend", "fake", "--out", tmp_path / f"{'a' * 300}.png")
    assert result.exit_code == 1
    assert "name too long" in result.output.lower()


def test_generate_without_a_bundle_fails_plainly(tmp_path: Path) -> None:
    result = call(generate, tmp_path / "absent", "a cat", "--out", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "is not a bundle" in result.output


def with_others(bundle: Bundle, folder: Path, *names: str) -> Bundle:
    """A bundle with these files of a folder in place of its own, beside them, and with their hashes."""
    files = {name: bundle.path / name for name in bundle.manifest.files}
    return write_bundle(folder / "other", bundle.manifest, files | {name: folder / name for name in names})


def test_inspect_shows_what_is_inside(bundle: Bundle) -> None:
    result = call(inspect, bundle.path)
    assert result.exit_code == 0
    for expected in ("step-4.onnx", "README.md", "CC0-1.0", bundle.manifest.revision, "as the manifest says"):
        assert expected in result.output
    for name, record in bundle.manifest.files.items():
        assert f"{record.sha256[:12]}  {name}" in result.output
    assert ("classes: zero" in result.output) == (bundle.manifest.conditioning == "class")


def test_inspect_as_json(text_bundle: Bundle) -> None:
    document = json.loads(call(inspect, text_bundle.path, "--json").output)
    assert document["problems"] == []
    assert document["manifest"] == text_bundle.manifest.model_dump(mode="json")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_inspect_names_what_differs_and_exits_with_1(bundle_copy: Path, options: tuple[str, ...]) -> None:
    file = bundle_copy / "step-2.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (bundle_copy / "extra.bin").touch()
    result = call(inspect, bundle_copy, *options)
    assert result.exit_code == 1
    assert "step-2.onnx: its SHA-256" in result.output
    assert "extra.bin: not listed" in result.output


def test_inspect_names_differences_of_every_kind_at_once(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    told = text_bundle.manifest.model_copy(update={"weights_dtype": "int8"})
    spare = {"step-8.onnx": files["step-4.onnx"], "tokenizer.json": files["README.md"]}
    other = write_bundle(tmp_path / "other", told, files | spare)
    (other.path / "README.md").write_text("another")
    shown = call(inspect, other.path)
    assert shown.exit_code == 1
    for expected in ("README.md: ", "tokenizer.json: not a tokenizer", "step-8.onnx: the manifest says nothing of it"):
        assert f"DIFFERS  {expected}" in shown.output
    assert "DIFFERS  weights are said to be stored in int8" in shown.output


def test_inspect_names_a_graph_whose_rows_see_each_other(text_bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(text_bundle.path / "step-2.onnx")
    (out,) = model.graph.output
    name, mean = out.name, onnx.helper.make_node("ReduceMean", ["own"], ["mean"], keepdims=1)
    for node in model.graph.node:
        node.output[:] = ["own" if output == name else output for output in node.output]
    model.graph.node.extend([mean, onnx.helper.make_node("Add", ["own", "mean"], [name])])
    onnx.save(model, tmp_path / "step-2.onnx")
    other = with_others(text_bundle, tmp_path, "step-2.onnx")
    shown = call(inspect, other.path)
    assert shown.exit_code == 1
    assert "DIFFERS  step-2.onnx: its rows are others in company than alone" in shown.output


def test_inspect_names_a_graph_that_is_none(text_bundle: Bundle, tmp_path: Path) -> None:
    whole = (text_bundle.path / "step-2.onnx").read_bytes()
    (tmp_path / "step-2.onnx").write_bytes(whole[: len(whole) // 2])
    other = with_others(text_bundle, tmp_path, "step-2.onnx")
    shown = call(inspect, other.path)
    assert shown.exit_code == 1
    assert "DIFFERS  step-2.onnx: ONNX Runtime cannot load it" in shown.output


def test_inspect_finds_weights_by_any_spelling_of_where_they_lie(text_bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(text_bundle.path / "step-2.onnx")
    onnx.save(model, tmp_path / "step-2.onnx", save_as_external_data=True, location="step-2.onnx.data")
    spelled = onnx.load(tmp_path / "step-2.onnx", load_external_data=False)
    for tensor in spelled.graph.initializer:
        for entry in tensor.external_data:
            entry.value = f"./{entry.value}" if entry.key == "location" else entry.value
    onnx.save(spelled, tmp_path / "step-2.onnx")
    shown = call(inspect, with_others(text_bundle, tmp_path, "step-2.onnx", "step-2.onnx.data").path)
    assert shown.exit_code == 0, shown.output


def test_inspect_prints_nothing_but_its_document_of_a_graph_that_does_not_load(
    text_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = (text_bundle.path / "step-2.onnx").read_bytes()
    operator = onnx.load_from_string(data).graph.node[0].op_type.encode()
    (tmp_path / "step-2.onnx").write_bytes(data.replace(operator, operator[:-1] + b"\xff"))
    other = with_others(text_bundle, tmp_path, "step-2.onnx")
    shown = call(inspect, other.path, "--json")
    assert "step-2.onnx: ONNX Runtime cannot load it" in json.loads(shown.stdout)["problems"][0]
    assert capfd.readouterr().out == ""


def test_inspect_names_a_graph_that_is_not_what_the_manifest_says(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    other = write_bundle(tmp_path / "other", text_bundle.manifest, files | {"step-2.onnx": files["text.onnx"]})
    result = call(inspect, other.path)
    assert result.exit_code == 1
    assert "DIFFERS  step-2.onnx: its inputs are" in result.output


def test_inspect_names_weights_that_are_not_stored_as_it_is_said(text_bundle: Bundle, tmp_path: Path) -> None:
    """A service reckons by it what a bundle takes when it is loaded."""
    files = {path.name: path for path in text_bundle.path.iterdir() if path.name != "manifest.json"}
    told = text_bundle.manifest.model_copy(update={"weights_dtype": "fp32+int8"})
    result = call(inspect, write_bundle(tmp_path / "other", told, files).path)
    assert result.exit_code == 1
    assert "weights are said to be stored in int8 at the narrowest, and are in float32" in result.output


def test_inspect_needs_no_onnx(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "engines.weights", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = call(inspect, text_bundle.path)
    assert result.exit_code == 0, result.output


def test_inspect_names_a_graph_whose_values_are_not_finite(text_bundle: Bundle, tmp_path: Path) -> None:
    graph = onnx.load(text_bundle.path / "text.onnx")
    weight = next(w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(weight), np.nan), weight.name))
    onnx.save(graph, tmp_path / "text.onnx")
    result = call(inspect, with_others(text_bundle, tmp_path, "text.onnx").path)
    assert result.exit_code == 1
    assert "DIFFERS  text.onnx: in fp32 it gives values that are not finite" in result.output


def test_inspect_names_a_graph_that_lacks_the_last_classes(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, "class", steps=(1,))
    told = bundle.manifest.model_copy(update={"classes": (*bundle.manifest.classes, "four", "five")})
    files = {name: bundle.path / name for name in bundle.manifest.files}
    result = call(inspect, write_bundle(tmp_path / "other", told, files).path)
    assert result.exit_code == 1
    assert re.search(r"DIFFERS  step-1\.onnx: .*idx=5 must be within", result.output)


def test_inspect_names_a_graph_that_lacks_the_last_word(text_bundle: Bundle, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(text_bundle.path / "tokenizer.json"))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    files["tokenizer.json"] = tmp_path / "tokenizer.json"
    result = call(inspect, write_bundle(tmp_path / "other", text_bundle.manifest, files).path)
    assert result.exit_code == 1
    assert re.search(r"DIFFERS  text\.onnx: .*idx=23 must be within", result.output)


def test_the_largest_guidance_that_inspect_shows_is_taken(text_bundle: Bundle, tmp_path: Path) -> None:
    guidance = text_bundle.manifest.guidance.model_copy(update={"maximum": 0.3, "default": 0.0})
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    bundle = write_bundle(tmp_path / "other", text_bundle.manifest.model_copy(update={"guidance": guidance}), files)
    assert "guidance_scale 1 to 1.3, default 1;" in call(inspect, bundle.path).output
    chosen = ("--backend", "fake", "--out", tmp_path / "moon.png", "--guidance-scale")
    assert call(generate, bundle.path, "moon", *chosen, 1.3).exit_code == 0
    assert call(generate, bundle.path, "moon", *chosen, 1.301).exit_code == 2


def test_inspect_sends_no_control_sequences_to_a_terminal(text_bundle: Bundle, tmp_path: Path) -> None:
    titled = text_bundle.manifest.model_copy(update={"licence": "\x1b]0;owned\x07CC0"})
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    result = call(inspect, write_bundle(tmp_path / "other", titled, files).path)
    assert result.exit_code == 0, result.output
    assert "licence \ufffd]0;owned\ufffdCC0" in result.output


@pytest.mark.parametrize("command", [generate, inspect])
def test_a_name_that_no_folder_can_have_is_refused(command: object) -> None:
    result = call(command, "a" * 300, *(["a cat"] if command is generate else []))
    assert result.exit_code == 1
    assert "cannot be a bundle (File name too long)" in result.output


def test_inspect_names_a_tokenizer_that_does_not_open(text_bundle: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": "1.0"}')
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files} | {broken.name: broken}
    result = call(inspect, write_bundle(tmp_path / "other", text_bundle.manifest, files).path)
    assert result.exit_code == 1
    assert "tokenizer.json: not a tokenizer" in result.output


def test_inspect_names_a_tokenizer_without_tokens(text_bundle: Bundle, tmp_path: Path) -> None:
    emptied = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({}, unk_token="[UNK]")).save(str(emptied))
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files} | {emptied.name: emptied}
    result = call(inspect, write_bundle(tmp_path / "other", text_bundle.manifest, files).path)
    assert result.exit_code == 1
    assert "DIFFERS  text.onnx: its tokenizer has no tokens" in result.output
    assert "none of its 0 tokens has the pad_id" in result.output


def test_a_pad_id_that_is_no_token_is_refused(text_bundle: Bundle, tmp_path: Path) -> None:
    text = text_bundle.manifest.text
    assert text is not None
    padded = text_bundle.manifest.model_copy(update={"text": text.model_copy(update={"pad_id": 99})})
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    bundle = write_bundle(tmp_path / "other", padded, files)
    said = r"tokenizer\.json: none of its \d+ tokens has the pad_id of the manifest, 99"
    result = call(inspect, bundle.path)
    assert result.exit_code == 1
    assert re.search(said, result.output)
    with pytest.raises(BundleError, match=said):
        Pipeline.open(bundle.path, "fake")


def test_shipped_means_the_bundle_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_BUNDLES", tmp_path)
    result = call(inspect, "shipped")
    assert result.exit_code == 1
    assert "no bundle 'emoji' ships" in result.output
