"""Plans compiled with TensorRT-RTX, which needs no GPU for that: every graph, for every chip, in every precision."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models

from engines import compile as compiling
from engines.backends.base import EngineError, GraphSpec, TensorSpec
from engines.backends.trt_library import Library, _shapes, build_plan, error_logger, find_library
from engines.build_command import build
from engines.bundle import Bundle, load_bundle, shipped_bundle
from engines.compile import build_bundle, prepare
from engines.fidelity import FLOOR_DB, asked_of, typical_inputs
from engines.plans import PRECISIONS, PlanCache, PlanKey, Precision, Profile, batch_sizes_up_to
from tests.bundles import WORDS

PROFILE = Profile((1, 4))
TARGETS = ("sm86", "sm89", "sm120")
MADE_UP = Library(
    SimpleNamespace(
        __name__="made_up_rtx", __version__="1", ComputeCapability=SimpleNamespace(__members__={"SM89": 89})
    )
)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = find_library()
    except EngineError as error:
        pytest.skip(str(error))
    if not found.is_rtx:
        pytest.skip(f"{found.name} compiles for the chip that is there only")
    return found


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_of_a_bundle_builds(
    library: Library, text_bundle: Bundle, cache: PlanCache, target: str, precision: Precision
) -> None:
    built = list(build_bundle(text_bundle, PROFILE, precision, target, cache, library=library))
    assert [plan.graph for plan in built] == list(text_bundle.graphs())
    for plan in built:
        assert (plan.key.target, plan.key.precision, plan.key.library) == (target, precision, library.name)
        assert len(cache.load(plan.key) or b"") == plan.size_bytes > 0
        assert plan.fidelity_db is None if precision == "fp32" else (plan.fidelity_db or 0) > FLOOR_DB


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_of_the_bundle_that_ships_builds(
    library: Library, cache: PlanCache, target: str, precision: Precision
) -> None:
    profile = Profile((1, 16), dynamic=True)
    bundle = load_bundle(shipped_bundle())
    if precision == "fp8" and int(target[2:]) < 89:
        with pytest.raises(EngineError, match="cannot build it"):
            list(build_bundle(bundle, profile, precision, target, cache, library=library))
        return
    built = list(build_bundle(bundle, profile, precision, target, cache, library=library))
    assert len(built) == len(bundle.graphs())


def test_the_step_graph_that_ships_builds(library: Library, tmp_path: Path) -> None:
    graph = load_bundle(shipped_bundle()).graphs()["step-1.onnx"]
    prepared, _ = prepare(graph, "fp16", tmp_path)
    told: list[tuple[str, int, int]] = []
    plan = build_plan(
        library, prepared, graph.inputs, Profile((1, 8), dynamic=True), "sm89", lambda *step: told.append(step) or True
    )
    assert len(plan) > 1e6
    assert any(done == steps > 0 for _, done, steps in told)


def test_what_is_there_is_not_built_again(
    library: Library, text_bundle: Bundle, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(build_bundle(text_bundle, PROFILE, "fp32", "sm89", cache, library=library))
    victim = first[0]
    victim.path.write_bytes(b"damaged")
    names: list[str] = []
    monkeypatch.setattr(compiling, "build_plan", lambda *args: names.append(args[1].name) or b"anew")
    second = list(build_bundle(text_bundle, PROFILE, "fp32", "sm89", cache, library=library))
    assert [bool(plan.seconds) for plan in second] == [plan is victim for plan in first]
    assert names == [f"unpacked-{victim.graph}"]
    assert cache.load(victim.key) == b"anew"


def test_what_a_dynamic_plan_covers_is_not_built_again(library: Library, text_bundle: Bundle, cache: PlanCache) -> None:
    for sizes in ((1, 4), (4,)):
        built = list(build_bundle(text_bundle, Profile(sizes, dynamic=True), "fp32", "sm89", cache, library=library))
        assert all((each.seconds == 0) == (sizes == (4,)) for each in built)


def test_a_plan_was_checked_for_what_is_asked_of_it(text_bundle: Bundle) -> None:
    """The same graph in a bundle of another guidance range, or with other shapes."""
    graph = text_bundle.graphs()["step-4.onnx"]
    wider = replace(graph, guidance=(0.0, 1.0, 1000.0))
    image, *others = graph.inputs
    larger = replace(graph, inputs=(image.model_copy(update={"shape": ("batch", 3, 32, 32)}), *others))
    assert len({asked_of(each) for each in (graph, wider, larger, replace(graph, classes=9))}) == 3
    assert asked_of(graph) == asked_of(text_bundle.graphs()["step-4.onnx"])


def test_a_plan_has_the_shapes_of_the_specs(library: Library, tmp_path: Path) -> None:
    """Also where the graph leaves more open."""
    graph = products(tmp_path, 1.0)
    model = onnx.load(graph.path)
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = f"any_{dim.dim_value}"
    onnx.save(model, graph.path)
    profile = _shapes(library.module.Builder(error_logger(library.module)), graph.inputs, (1, 2, 3))
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(1, 4), (2, 4), (3, 4)]
    prepared, _ = prepare(graph, "fp32", tmp_path)
    assert build_plan(library, prepared, graph.inputs, PROFILE, "sm89")


def test_a_build_ends_when_it_is_told_to(library: Library, text_bundle: Bundle) -> None:
    told: list[str] = []

    def progress(phase: str, done: int, steps: int) -> bool:
        told.append(phase)
        return done == 0

    graph = text_bundle.graphs()["step-4.onnx"]
    with pytest.raises(EngineError, match=r"step-4\.onnx: .* cannot build it"):
        build_plan(library, graph.path, graph.inputs, Profile((1,)), "sm89", progress)
    assert told


def test_a_chip_that_it_does_not_know_is_named(library: Library, text_bundle: Bundle, cache: PlanCache) -> None:
    with pytest.raises(EngineError, match=r"does not compile for 'sm12'; it does for sm75.*sm120"):
        list(build_bundle(text_bundle, PROFILE, "fp32", "sm12", cache, library=library))
    assert not cache.folder.exists()


class Machine:
    """One with an Ada GPU."""

    target = "sm89"


def test_without_a_chip_the_message_names_those_there_are(
    library: Library, text_bundle: Bundle, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise EngineError("there is no CUDA device")

    monkeypatch.setattr(compiling, "Cuda", none)
    with pytest.raises(EngineError, match=r"no chip .* \(there is no CUDA device\); name one of sm75, .*sm89"):
        next(build_bundle(text_bundle, PROFILE, cache=cache, library=library))
    monkeypatch.setattr(compiling, "Cuda", Machine)
    assert next(build_bundle(text_bundle, PROFILE, cache=cache, library=library)).key.target == "sm89"


def test_tensorrt_itself_builds_for_the_chip_that_is_there(
    text_bundle: Bundle, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Library(SimpleNamespace(__name__="tensorrt", __version__="11.0"))
    monkeypatch.setattr(compiling, "Cuda", Machine)
    asked = []
    monkeypatch.setattr(compiling, "build_plan", lambda *args: asked.append(args[4]) or b"plan")
    for target in (None, "sm89"):
        assert next(build_bundle(text_bundle, PROFILE, "fp32", target, cache, library=full)).key.target == "sm89"
    assert asked == [None]
    with pytest.raises(EngineError, match=r"tensorrt 11\.0 builds for the chip that is there only, sm89, not for sm90"):
        next(build_bundle(text_bundle, PROFILE, "fp32", "sm90", cache, library=full))


def test_a_corrupt_graph_is_an_error(library: Library, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"broken\.onnx: ONNX Runtime cannot load"):
        prepare(GraphSpec("decode", broken, (), ()), "fp32", tmp_path)
    with pytest.raises(EngineError, match=r"broken\.onnx: tensorrt-rtx .* cannot parse"):
        build_plan(library, broken, (), PROFILE, "sm89")


def test_a_graph_that_it_cannot_build_is_an_error(library: Library, tmp_path: Path) -> None:
    """int8 weights that are not unpacked: a graph that parses and does not build."""
    graph = load_bundle(shipped_bundle()).graphs()["decode.onnx"]
    with pytest.raises(EngineError, match=r"decode\.onnx: tensorrt-rtx .* cannot build it \(.*[Qq]uantized"):
        build_plan(library, graph.path, graph.inputs, PROFILE, "sm89")


def test_a_precision_that_loses_the_image_is_refused(tmp_path: Path) -> None:
    """Values beyond fp16's range."""
    with pytest.raises(EngineError, match=r"large\.onnx: in fp16 it is at .* dB to fp32, below 30 dB"):
        prepare(products(tmp_path, 1e4), "fp16", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_that_gives_values_that_are_not_finite_is_refused(tmp_path: Path, precision: Precision) -> None:
    with pytest.raises(EngineError, match=r"large\.onnx: in fp32 it gives values that are not finite"):
        prepare(products(tmp_path, np.nan), precision, tmp_path)


def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    graph = products(tmp_path, 1)
    wider = graph.outputs[0].model_copy(update={"shape": ("batch", 8)})
    with pytest.raises(EngineError, match=r"large\.onnx: output y .* the manifest wants y float32\(batch, 8\)"):
        prepare(replace(graph, outputs=(wider,)), "fp32", tmp_path)


def products(folder: Path, factor: float) -> GraphSpec:
    """A graph that multiplies by a factor twice."""
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32) * factor, name) for name in ("a", "b")]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "large", values[:1], values[1:], weights),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    onnx.save(model, folder / "large.onnx")
    return GraphSpec("decode", folder / "large.onnx", (spec,), (spec.model_copy(update={"name": "y"}),))


def test_typical_prompts_and_classes_differ(bundles: dict[tuple[str, str], Bundle]) -> None:
    text = typical_inputs(bundles["text", "pixel"].graphs()["text.onnx"], 4)
    ids, mask = text["input_ids"], text["attention_mask"]
    assert 0 <= ids.min() < ids.max() < 4 + len(WORDS)
    assert len(np.unique(ids)) > len(WORDS) / 2
    assert mask.sum(axis=1).tolist() == [8, 6, 4, 2]
    labels = typical_inputs(bundles["class", "pixel"].graphs()["step-1.onnx"], 5)["label"]
    assert labels.tolist() == [0, 1, 2, 3, 0]


def test_the_command_builds_and_says_where(library: Library, text_bundle: Bundle, tmp_path: Path) -> None:
    arguments = [str(text_bundle.path), "--target", "sm89", "--batch-sizes", "1,2", "--plans", str(tmp_path / "plans")]
    for how in (" s, ", "was there"):
        result = CliRunner().invoke(build, arguments)
        assert result.exit_code == 0, result.output
        lines, found_by = result.stdout.splitlines()[:-2], result.stdout.splitlines()[-2:]
        assert found_by[1].strip().startswith("fewstep serve --backend trt --precision fp32 --plans ")
        assert found_by[1].endswith("--max-batch 2  (or 1)")
        assert [line.split()[0] for line in lines] == list(text_bundle.graphs())
        assert all(how in line and library.name in line and "batches of 1, 2" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-sizes", "1,0"], "is not a list of batch sizes"),
        (["--batch-sizes", "a"], "is not a list of batch sizes"),
        (["--batch-sizes", "99999999999999999999"], "is too large: at most 65536"),
        (["--precision", "fp4"], "is not one of"),
        (["--backend", "ort"], "is not"),
    ],
)
def test_options_that_make_no_sense_are_refused(text_bundle: Bundle, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(build, [str(text_bundle.path), *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_a_folder_that_cannot_be_kept_in_is_told_before_anything_is_built(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(compiling, "find_library", lambda check: MADE_UP)
    monkeypatch.setattr(compiling, "build_plan", lambda *_: built.append("a plan") or b"plan")
    (tmp_path / "file").touch()
    arguments = [str(text_bundle.path), "--target", "sm89", "--plans", str(tmp_path / "file" / "plans")]
    result = CliRunner().invoke(build, arguments)
    assert result.exit_code == 1
    assert "file/plans, cannot be made: Not a directory" in result.output
    assert not built


def test_without_a_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.trt_library.MODULES", ("absent_library",))
    with pytest.raises(EngineError, match=r"pip install 'fewstep\[tensorrt\]'"):
        find_library()


def test_a_library_that_fails_names_the_graph_of_the_bundle(library: Library, text_bundle: Bundle) -> None:
    graph = text_bundle.graphs()["step-4.onnx"]
    with pytest.raises(EngineError, match=r"^text\.onnx: .* cannot build it"):
        build_plan(library, graph.path, graph.inputs, PROFILE, "sm89", lambda *_: False, "text.onnx")
    with pytest.raises(EngineError, match=r"^text\.onnx: .* cannot parse it"):
        build_plan(library, text_bundle.path / "README.md", graph.inputs, PROFILE, "sm89", None, "text.onnx")


def test_a_folder_without_room_is_an_error_that_names_it(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx, "save", full)
    said = f"text.onnx: cannot be prepared in {tmp_path}: No space left on device; TMPDIR can name another folder"
    with pytest.raises(EngineError, match=said):
        prepare(text_bundle.graphs()["text.onnx"], "fp16", tmp_path)


def test_weights_that_the_folder_does_not_take_are_no_graph_that_does_not_load(
    text_bundle: Bundle, tmp_path: Path
) -> None:
    """A limit of this process stands for that of a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(EngineError, match=f"step-1.onnx: cannot be prepared in {tmp_path}: File too large; TMPDIR"):
            prepare(text_bundle.graphs()["step-1.onnx"], "fp32", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 128), ("int8", 0), ("int8", 5)])
def test_weights_of_8_bits_are_unpacked_whatever_their_zero_point(
    library: Library, tmp_path: Path, kind: str, zero: int
) -> None:
    graph = products(tmp_path, 1)
    model = onnx.load(graph.path)
    del model.graph.initializer[0]
    codes = (np.arange(16).reshape(4, 4) * 7 + zero).astype(kind)
    for name, value in (("codes", codes), ("scale", np.float32(0.01)), ("zero", np.array(zero, kind))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["a"]))
    onnx.save(model, graph.path)
    prepared, _ = prepare(graph, "fp32", tmp_path)
    assert {node.op_type for node in onnx.load(prepared).graph.node} == {"MatMul"}
    assert build_plan(library, prepared, graph.inputs, PROFILE, "sm89")


def test_a_tokenizer_without_tokens_is_an_error(text_bundle: Bundle, tmp_path: Path) -> None:
    emptied = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({}, unk_token="[UNK]")).save(str(emptied))
    graph = replace(text_bundle.graphs()["text.onnx"], tokenizers=(emptied,))
    with pytest.raises(EngineError, match=r"text\.onnx: its tokenizer has no tokens"):
        typical_inputs(graph, 1)


@pytest.mark.parametrize(
    ("options", "said", "finding"),
    [
        ("--batch-sizes 1,2,4,8,16", "--max-batch 16  (or 1, 2, 4, 8)\n  fewstep generate --backend trt", {1, 8, 16}),
        ("--batch-sizes 1,2,4,8,12", "--max-batch 12  (or 1, 2, 4, 8)\n", {1, 8, 12}),
        ("--batch-sizes 1", "--max-batch 1\n", {1}),
        ("--batch-sizes 16 --dynamic", "--max-batch 16  (or every one from 1 to 16)\n", {1, 8, 12, 16}),
        ("--batch-sizes 4,16", "finds none: --max-batch 16 needs --batch-sizes 1,2,4,8,16,", set()),
    ],
)
def test_the_command_says_who_finds_its_plans_and_they_do(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str, finding: set[int]
) -> None:
    monkeypatch.setattr(compiling, "find_library", lambda check: MADE_UP)
    monkeypatch.setattr(compiling, "build_plan", lambda *_: b"plan")
    arguments = [str(text_bundle.path), "--target", "sm89", "--plans", str(tmp_path), *options.split()]
    result = CliRunner().invoke(build, arguments)
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert ("fewstep generate" in result.stdout) == (16 in finding)
    for largest in (1, 8, 12, 16, 32):
        wanted = Profile(batch_sizes_up_to(largest))
        for graph in text_bundle.graphs().values():
            found = PlanCache(tmp_path).find(
                PlanKey(graph.sha256, asked_of(graph), MADE_UP.name, "sm89", "fp32", wanted)
            )
            assert (found is not None) == (largest in finding)
