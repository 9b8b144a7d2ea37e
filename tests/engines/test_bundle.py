"""A bundle loads exactly as it was written, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engines import bundle as bundles
from engines.bundle import (
    Bundle,
    BundleError,
    Description,
    Grid,
    GuidanceRange,
    find_bundle,
    load_bundle,
    read_manifest,
    shipped_bundle,
    write_bundle,
)
from engines.manifest import seal
from tests.bundles import cosine_grid, make_tiny_bundle, tiny_description

Edit = Callable[[dict[str, Any]], None]


def edit_manifest(folder: Path, edit: Edit, reseal: bool = True) -> None:
    """Change the manifest as someone with an editor would; `reseal` as someone who also fixes the revision."""
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    edit(document)
    if reseal:
        document["revision"] = seal(document)
    file.write_text(json.dumps(document))


def test_what_is_written_is_loaded(bundle: Bundle) -> None:
    loaded = load_bundle(bundle.path)
    assert loaded == bundle
    assert loaded.manifest == read_manifest(bundle.path)
    assert "README.md" in loaded.manifest.files
    assert {graph.role for graph in loaded.graphs().values()} >= {"step"}
    assert [loaded.student(steps).steps for steps in (1, 2, 4)] == [1, 2, 4]


def test_graphs_have_the_inputs_that_the_design_names(text_bundle: Bundle) -> None:
    graphs = text_bundle.graphs()
    assert {name: [spec.name for spec in graph.inputs] for name, graph in graphs.items()} == {
        "text.onnx": ["input_ids", "attention_mask"],
        "encode.onnx": ["image"],
        "decode.onnx": ["latent"],
        **{
            f"step-{n}.onnx": [
                *("z", "time", "alpha", "sigma", "alpha_next", "sigma_next"),
                *("guidance", "context", "known", "keep", "noise"),
            ]
            for n in (1, 2, 4)
        },
    }
    assert graphs["step-4.onnx"].outputs[0].name == "z_next"


def test_unknown_student_names_those_there_are(text_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="3 steps, only 1, 2, 4"):
        text_bundle.student(3)


def test_unlisted_file_has_no_path(text_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="secret"):
        text_bundle.graph_path("../secret")


def test_every_tampered_file_is_named(bundle_copy: Path) -> None:
    """One flipped bit, the size unchanged, in each file in turn."""
    for file in bundle_copy.iterdir():
        if file.name == "manifest.json":
            continue
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(BundleError, match=file.name):
            load_bundle(bundle_copy)
        file.write_bytes(original)
    load_bundle(bundle_copy)


def test_unverified_load_still_checks_names_and_sizes(bundle_copy: Path) -> None:
    file = bundle_copy / "step-4.onnx"
    file.write_bytes(b"x" * file.stat().st_size)
    load_bundle(bundle_copy, verify=False)
    file.write_bytes(b"x")
    with pytest.raises(BundleError, match=r"step-4\.onnx: 1 bytes"):
        load_bundle(bundle_copy, verify=False)


def test_missing_and_extra_files_are_named(bundle_copy: Path) -> None:
    (bundle_copy / "step-2.onnx").unlink()
    (bundle_copy / "notes.txt").write_text("hello")
    with pytest.raises(BundleError, match=r"notes\.txt: not listed.*step-2\.onnx: missing"):
        load_bundle(bundle_copy)


def test_a_folder_in_place_of_a_file_does_not_load(bundle_copy: Path) -> None:
    (bundle_copy / "README.md").unlink()
    (bundle_copy / "README.md").mkdir()
    with pytest.raises(BundleError, match=r"README\.md: missing"):
        load_bundle(bundle_copy)


def rename(document: dict[str, Any], name: str) -> None:
    document["files"][name] = document["files"].pop("step-4.onnx")
    document["students"][2]["graph"] = name


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.update(colour="blue"), "colour: Extra inputs"),
        (lambda d: d["text"].update(colour="blue"), r"text\.colour"),
        (lambda d: d.update(format_version=2), "format version 2, this package reads 1"),
        (lambda d: d.pop("format_version"), "format version None"),
        (lambda d: rename(d, "../step.onnx"), "not a plain file name"),
        (lambda d: rename(d, "/etc/passwd"), "not a plain file name"),
        (lambda d: rename(d, "a/b.onnx"), "not a plain file name"),
        (lambda d: rename(d, "..\\step.onnx"), "not a plain file name"),
        (lambda d: rename(d, ".hidden"), "not a plain file name"),
        (lambda d: rename(d, "manifest.json"), "not a plain file name"),
        (lambda d: d["files"].pop("step-4.onnx"), "files does not list step-4.onnx"),
        (lambda d: d["files"].pop("README.md"), r"README\.md: not listed"),
        (lambda d: d["files"]["README.md"].update(sha256="abc"), "sha256"),
        (lambda d: d.update(weights_dtype="nibbles"), "'nibbles' is not a storage of weights; known: fp32"),
        (lambda d: d.update(weights_dtype="fp16+"), "weights_dtype: .*'' is not a storage"),
        (lambda d: d.update(licence=""), "licence: .* at least 1 character"),
        (lambda d: d["attributions"][0].update(licence=""), r"attributions\.0\.licence: .* at least 1 character"),
        (lambda d: d.update(encode="decode.onnx"), r"decode\.onnx is a graph of two kinds"),
        (lambda d: d["text"].update(graph="step-1.onnx"), r"step-1\.onnx is a graph of two kinds"),
        (lambda d: d["text"].update(pad_id=2**40), r"text\.pad_id: .* less than 4294967296"),
        (lambda d: d.update(name="tiny/1"), "'tiny/1' is not a name of"),
        (lambda d: d.update(name="tiny@1"), "'tiny@1' is not a name of"),
        (lambda d: d.update(name=".."), "'..' is not a name of"),
        (lambda d: d.update(name="x" * 101), "is not a name of at most 100"),
        (lambda d: d.update(decode=None), "latent bundles have encode and decode"),
        (lambda d: d.update(text=None), "text bundles have a text encoder"),
        (lambda d: d.update(classes=["a"]), "text bundles have a text encoder"),
        (lambda d: d.update(latent_shape=[4, 7, 8]), "does not divide"),
        (lambda d: d.update(image_shape=[4, 16, 16]), "image_shape"),
        (lambda d: d["students"].append(d["students"][0]), "same number of steps"),
        (lambda d: d["students"][0].update(steps=3), "has a grid of 1"),
        (lambda d: d["condition"][0].update(shape=[1, 8, 6]), "first dimension 'batch'"),
        (lambda d: d["condition"][0].update(shape=["batch", "tokens", 6]), "the others as numbers"),
        (lambda d: d["condition"][0].update(shape=["batch", 0, 6]), "must be positive"),
        (lambda d: d.update(programs={"step-3.onnx": "README.md"}), r"programs of no graph: step-3\.onnx"),
        (lambda d: d.update(programs={"tokenizer.json": "README.md"}), r"programs of no graph: tokenizer\.json"),
        (lambda d: d.update(programs={"step-4.onnx": "step-4.onnx"}), "a file of its own"),
        (lambda d: d.update(programs={"step-4.onnx": "README.md", "step-2.onnx": "README.md"}), "a file of its own"),
        (lambda d: d.update(programs={"step-4.onnx": "step-4.pt2"}), r"files does not list step-4\.pt2"),
        (lambda d: d.update(programs={"step-4.onnx": "../step-4.pt2"}), "not a plain file name"),
    ],
)
def test_bad_manifests_do_not_load(bundle_copy: Path, edit: Edit, named: str) -> None:
    edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleError, match=named):
        load_bundle(bundle_copy)


def test_a_manifest_from_before_there_were_programs_still_loads(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda d: d.pop("programs"))
    assert {graph.program for graph in load_bundle(bundle_copy).graphs().values()} == {None}


def test_a_graph_knows_its_program(text_bundle: Bundle, tmp_path: Path) -> None:
    """For the bundle a program is a file like any other."""
    program = tmp_path / "step-4.pt2"
    program.write_bytes(b"a program")
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files} | {program.name: program}
    description = text_bundle.manifest.model_copy(update={"programs": {"step-4.onnx": program.name}})
    graphs = write_bundle(tmp_path / "made", description, files).graphs()
    assert graphs["step-4.onnx"].program == tmp_path / "made" / "step-4.pt2"
    assert graphs["step-4.onnx"].program_sha256 == hashlib.sha256(b"a program").hexdigest()
    assert graphs["step-2.onnx"].program is None


@pytest.mark.parametrize("name", ["step-1.onnx.weights-0", "step-1.onnx_data", "weights.bin", "w.png"])
def test_a_graph_with_other_weights_in_a_file_of_their_own_is_another_graph(
    text_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    files = {file: text_bundle.path / file for file in text_bundle.manifest.files}
    digests = set()
    for content in ("ones", "twos"):
        weights = tmp_path / content
        weights.write_text(content)
        made = write_bundle(tmp_path / f"bundle-of-{content}", text_bundle.manifest, files | {name: weights})
        digests.add(made.graphs()["step-1.onnx"].sha256)
    assert len(digests) == 2
    assert text_bundle.graphs()["step-1.onnx"].sha256 == text_bundle.manifest.files["step-1.onnx"].sha256


def test_what_tells_of_a_bundle_and_its_programs_do_not_change_a_graph(text_bundle: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("something else")
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    files |= {"README.md": other, "samples.png": other, "step-4.pt2": other}
    description = text_bundle.manifest.model_copy(update={"programs": {"step-4.onnx": "step-4.pt2"}})
    graphs = write_bundle(tmp_path / "made", description, files).graphs()
    assert {name: graph.sha256 for name, graph in graphs.items()} == {
        name: graph.sha256 for name, graph in text_bundle.graphs().items()
    }


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["guidance"].update(maximum=100),
        lambda d: d.update(licence="none"),
        lambda d: d.update(revision="0" * 12),
        lambda d: d["files"]["README.md"].update(sha256="0" * 64),
    ],
)
def test_a_manifest_changed_after_the_fact_does_not_load(bundle_copy: Path, edit: Edit) -> None:
    edit_manifest(bundle_copy, edit, reseal=False)
    with pytest.raises(BundleError, match="revision does not match"):
        load_bundle(bundle_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format_version": 1}', "[" * 100_000, "\ud800"])
def test_what_is_no_manifest_does_not_load(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(tmp_path)


def test_an_enormous_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as out:
        out.truncate(5 * 1024 * 1024)
    with pytest.raises(BundleError, match="larger"):
        load_bundle(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="is not a regular file"):
        read_manifest(tmp_path)


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="absent"):
        shipped_bundle("absent")


def test_shipped_bundles_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_BUNDLES", tmp_path)
    made = make_tiny_bundle(tmp_path, steps=(1,))
    assert shipped_bundle("tiny") == made.path
    with pytest.raises(BundleError, match="shipped: tiny"):
        shipped_bundle("other")


def test_a_bundle_is_found_by_path_or_by_name_and_no_other_folder_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_BUNDLES", tmp_path / "shipped")
    monkeypatch.setattr(bundles, "SHIPPED", "tiny")
    shipped = make_tiny_bundle(tmp_path / "shipped", steps=(1,))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_bundle("tiny") == find_bundle("shipped") == shipped.path
    assert find_bundle("./tiny/") == Path("tiny")
    assert find_bundle("some/folder") == Path("some/folder")
    with pytest.raises(BundleError, match="shipped: tiny"):
        find_bundle("other")


def test_what_is_no_bundle_is_never_replaced(text_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(tmp_path / "photos", text_bundle.manifest, {}, replace=True)
    assert (tmp_path / "photos" / "dear.jpg").exists()


def test_writing_refuses_to_overwrite_unless_told(text_bundle: Bundle, tmp_path: Path) -> None:
    """Also the way to change only the description: the files are the bundle's own."""
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    description = tiny_description(space="latent")
    first = write_bundle(tmp_path / "new", description, files)
    with pytest.raises(BundleError, match="exists"):
        write_bundle(tmp_path / "new", description, files)
    changed = description.model_copy(update={"licence": "CC-BY-4.0"})
    second = write_bundle(first.path, changed, {name: first.path / name for name in files}, replace=True)
    assert second.manifest.licence == "CC-BY-4.0"
    assert second.manifest.files == first.manifest.files
    assert second.manifest.revision != first.manifest.revision
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_a_bundle_that_cannot_be_replaced_stays(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    first = write_bundle(tmp_path / "new", text_bundle.manifest, files)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "new" and target == first.path:
            raise OSError("the folder is there again")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    changed = text_bundle.manifest.model_copy(update={"licence": "CC-BY-4.0"})
    with pytest.raises(OSError, match="there again"):
        write_bundle(first.path, changed, files, replace=True)
    assert load_bundle(first.path).manifest == first.manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(("moved", "licence"), [("old", "Apache-2.0"), ("new", "CC-BY-4.0")])
def test_whenever_replacing_a_bundle_is_cut_off_one_of_the_two_is_there(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str, licence: str
) -> None:
    """As by a signal that arrives when either was just moved."""
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    first = write_bundle(tmp_path / "bundle", text_bundle.manifest, files)
    rename = Path.rename

    def cut_off(path: Path, target: Path) -> Path:
        there = rename(path, target)
        if moved == (path.name if target == first.path else target.name):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return there

    monkeypatch.setattr(Path, "rename", cut_off)
    changed = text_bundle.manifest.model_copy(update={"licence": "CC-BY-4.0"})
    with pytest.raises(KeyboardInterrupt):
        write_bundle(first.path, changed, files, replace=True)
    assert load_bundle(first.path).manifest.licence == licence
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("field", ["image_shape", "latent_shape"])
def test_sizes_that_nothing_could_hold_are_refused(text_bundle: Bundle, field: str) -> None:
    document = text_bundle.manifest.model_dump(mode="json")
    document[field] = [3, 2**17, 2**17]
    with pytest.raises(ValidationError, match="less than or equal to 65536"):
        Description.model_validate({name: document[name] for name in Description.model_fields})


def test_same_content_gives_the_same_revision(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in reversed(list(text_bundle.manifest.files))}
    again = write_bundle(tmp_path / "again", tiny_description(space="latent", name=text_bundle.manifest.name), files)
    assert again.manifest.revision == text_bundle.manifest.revision


def test_a_failed_write_leaves_nothing(text_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: text_bundle.path / name for name in text_bundle.manifest.files}
    del files["step-4.onnx"]
    with pytest.raises(BundleError, match=r"step-4\.onnx"):
        write_bundle(tmp_path / "new", tiny_description(space="latent"), files)
    with pytest.raises(BundleError, match="plain file name"):
        write_bundle(tmp_path / "new", tiny_description(space="latent"), {**files, "../escape": files["README.md"]})
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_goes_after_a_day(text_bundle: Bundle, tmp_path: Path) -> None:
    old, fresh, another, others = (
        tmp_path / f".{name}" for name in ("new-abcd1234", "new-abcd5678", "news-abcd1234", "new-8letters")
    )
    for left, part in ((old, "new"), (fresh, "new"), (another, "new"), (others, "photos")):
        (left / part).mkdir(parents=True)
        if left is not fresh:
            os.utime(left, (0, 0))
    write_bundle(
        tmp_path / "new",
        tiny_description(space="latent"),
        {name: text_bundle.path / name for name in text_bundle.manifest.files},
    )
    assert {path.name for path in tmp_path.iterdir()} == {"new", fresh.name, another.name, others.name}


def test_class_bundles_take_one_label() -> None:
    fields = tiny_description("class").model_dump()
    Description.model_validate(fields)
    for change in (
        {"classes": ()},
        {"classes": ("a", "a")},
        {"condition": ({"name": "label", "dtype": "float32", "shape": ("batch",)},)},
    ):
        with pytest.raises(ValidationError):
            Description.model_validate(fields | change)


@pytest.mark.parametrize(
    "change",
    [
        {"times": (1.0, 0.5, 0.5, 0.25, 0.0)},
        {"times": (2.0, 0.75, 0.5, 0.25, 0.0)},
        {"times": (1.0, 0.75, 0.5, 0.25, 0.1)},
        {"times": (1.0, 0.0)},
        {"alphas": (0.0, 0.5, 0.4, 0.9, 1.0)},
        {"alphas": (0.0, 0.4, 0.7, 0.9, 0.99)},
        {"alphas": (0.0, 0.0, 0.7, 0.9, 1.0)},
        {"sigmas": (1.0, 0.9, 0.95, 0.4, 0.0)},
        {"sigmas": (float("nan"), 0.9, 0.7, 0.4, 0.0)},
    ],
)
def test_grids_are_monotone_and_end_clean(change: dict[str, Any]) -> None:
    grid = cosine_grid(4).model_dump()
    with pytest.raises(ValidationError):
        Grid.model_validate(grid | change)


@pytest.mark.parametrize("values", [(-1, 4, 2), (0, 4, 5), (2, 4, 1), (4, 0, 2), (0, float("inf"), 2), (0, 1e20, 2)])
def test_guidance_ranges_are_ordered(values: tuple[float, float, float]) -> None:
    minimum, maximum, default = values
    with pytest.raises(ValidationError):
        GuidanceRange(minimum=minimum, maximum=maximum, default=default)


@given(st.lists(st.integers(0, 1500), min_size=3, max_size=3))
def test_the_scales_that_are_shown_are_in_the_range(hundredths: list[int]) -> None:
    """0.3 is less than (1 + 0.3) - 1, and 1 + 0.36 is 1.3599999999999999."""
    minimum, default, maximum = sorted(w / 100 for w in hundredths)
    guidance = GuidanceRange(minimum=minimum, maximum=maximum, default=default)
    assert [guidance.w_of(float(f"{scale:g}")) for scale in guidance.scales] == [minimum, maximum, default]
    assert guidance.w_of(guidance.scales[0] - 1e-3) < minimum
    assert guidance.w_of(guidance.scales[1] + 1e-3) > maximum


def seen(channels: int, side: int) -> list[dict[str, Any]]:
    """What networks see of a mask: the mask and what is left of the image."""
    return [
        {"name": name, "dtype": "float32", "shape": ["batch", count, side, side]}
        for name, count in (("mask", 1), ("masked", channels))
    ]


def test_networks_that_see_masks_take_them_at_the_size_of_their_latents() -> None:
    document = tiny_description("text", "latent").model_dump(mode="json")
    channels, side, _ = document["latent_shape"]
    context = document["condition"]
    whole = Description.model_validate(document | {"condition": [*context, *seen(channels, side)]})
    assert whole.sees_masks
    assert [spec.name for spec in whole.encoded] == ["context"]
    for wrong in (seen(channels, side)[:1], seen(channels, side)[1:], seen(channels, 2 * side), seen(1, side)):
        with pytest.raises(ValueError, match="take mask and masked"):
            Description.model_validate(document | {"condition": [*context, *wrong]})
    pixels = tiny_description("text", "pixel").model_dump(mode="json")
    with pytest.raises(ValueError, match="take mask and masked"):
        Description.model_validate(pixels | {"condition": [*pixels["condition"], *seen(3, pixels["latent_shape"][1])]})


def test_a_second_tokenizer_is_a_file_of_the_bundle_and_an_input_of_the_text_graph(bundle_copy: Path) -> None:
    def with_second(name: str) -> Edit:
        return lambda document: document["text"].update(second={"tokenizer": name, "pad_id": 1})

    edit_manifest(bundle_copy, with_second("tokenizer-2.json"))
    with pytest.raises(BundleError, match=r"files does not list tokenizer-2\.json"):
        load_bundle(bundle_copy)
    edit_manifest(bundle_copy, with_second("tokenizer.json"))
    graph = load_bundle(bundle_copy).graphs()["text.onnx"]
    assert [spec.name for spec in graph.inputs] == ["input_ids", "attention_mask", "input_ids_2"]
