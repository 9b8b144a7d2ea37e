"""A bundle on disk: a folder of manifest, graphs and tokenizer. Loads, verifies and writes; runs nothing."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engines.backends.base import BATCH, STEP_OUTPUT, STEP_SCALARS, EngineError, GraphSpec, GridPlace, Role, TensorSpec
from engines.hashes import Stamps, sha256_of, stamps_of
from engines.manifest import (
    ATTENTION_MASK,
    FORMAT_VERSION,
    IDS,
    MANIFEST_NAME,
    SECOND_IDS,
    Attribution,
    Description,
    FileRecord,
    Grid,
    GuidanceRange,
    Manifest,
    Provenance,
    SecondTokens,
    Student,
    TextEncoder,
    plain_file_name,
    seal,
)
from engines.problems import problem_of

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "SHIPPED",
    "Attribution",
    "Bundle",
    "BundleError",
    "Description",
    "FileRecord",
    "Grid",
    "GuidanceRange",
    "Manifest",
    "Provenance",
    "SecondTokens",
    "Student",
    "TensorSpec",
    "TextEncoder",
    "check_free",
    "find_bundle",
    "find_problems",
    "load_bundle",
    "read_manifest",
    "shipped_bundle",
    "steady_bundle",
    "step_specs",
    "write_bundle",
]

SHIPPED = "emoji"

_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_NO_WEIGHTS = ("README.md", "samples.png")
_BUNDLES = Path(__file__).parent / "bundles"
_LEFT_BEHIND_S = 24 * 3600.0


class BundleError(Exception):
    """A bundle is missing, damaged, of another format, or cannot do what was asked."""


@dataclass(frozen=True)
class Bundle:
    """A folder and the manifest it holds."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """Where file ``name`` of the bundle lies. Raises BundleError for a name not in the manifest."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        return self.path / name

    def weights(self) -> list[str]:
        """The files that may be weights. Of which graph is known to the graphs only, so all count for every one."""
        known = set(self.manifest.named_files())
        return sorted(name for name in self.manifest.files if name not in known and name not in _NO_WEIGHTS)

    def _digest(self, graph: str) -> str:
        """The SHA-256 of a graph; where the bundle has files that may be weights, of the names and hashes of all."""
        files, weights = self.manifest.files, self.weights()
        if not weights:
            return files[graph].sha256
        listed = "\n".join(f"{files[name].sha256} {name}" for name in (graph, *weights))
        return hashlib.sha256(listed.encode()).hexdigest()

    def student(self, steps: int) -> Student:
        """The student of ``steps`` steps. Raises BundleError naming those there are."""
        student = self.manifest.find_student(steps)
        if student is None:
            trained = ", ".join(map(str, self.manifest.trained_steps()))
            raise BundleError(f"no student of {steps} steps, only {trained}")
        return student

    def graphs(self) -> dict[str, GraphSpec]:
        """Every graph by file name, with the inputs and outputs it must have."""
        manifest = self.manifest
        graphs: dict[str, GraphSpec] = {}
        tokenizers = () if manifest.text is None else manifest.text.tokenizers
        weights = self.weights()

        def add(
            role: Role, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **of_steps: Any
        ) -> None:
            program = manifest.programs.get(name)
            graphs[name] = GraphSpec(
                role=role,
                path=self.graph_path(name),
                inputs=inputs,
                outputs=outputs,
                sha256=self._digest(name),
                program=None if program is None else self.graph_path(program),
                program_sha256="" if program is None else manifest.files[program].sha256,
                classes=max(len(manifest.classes), 1),
                tokenizers=tuple(self.graph_path(file) for file in tokenizers),
                files=tuple((self.graph_path(file), manifest.files[file].sha256) for file in (name, *weights)),
                **of_steps,
            )

        if manifest.text is not None:
            tokens = (BATCH, manifest.text.max_tokens)
            names = (IDS, ATTENTION_MASK) if manifest.text.second is None else (IDS, ATTENTION_MASK, SECOND_IDS)
            ids = tuple(_spec(name, *tokens, dtype="int64") for name in names)
            add("text", manifest.text.graph, ids, manifest.encoded)
        image = _spec("image", BATCH, *manifest.image_shape)
        latent = _spec("latent", BATCH, *manifest.latent_shape)
        if manifest.encode is not None:
            add("encode", manifest.encode, (image,), (latent,))
        if manifest.decode is not None:
            add("decode", manifest.decode, (latent,), (image,))
        w = manifest.guidance
        guidance = tuple(sorted({w.minimum, w.default, w.maximum}))
        for name in manifest.step_graphs():
            add("step", name, *step_specs(manifest), guidance=guidance, places=_places(manifest, name))
        return graphs


def _places(manifest: Description, graph: str) -> tuple[GridPlace, GridPlace, GridPlace]:
    """Where the first call of a step graph begins and its last one, and where its path ends, on its finest grid."""
    students = manifest.students
    grids = [grid for one in students if one.graph == graph for grid in (one.grid, one.stochastic) if grid is not None]
    encoded = [one.grid.places[::-1] for one in students if one.encoder == graph]
    path = max([grid.places for grid in grids] or encoded, key=len)
    return path[0], path[-2], path[-1]


def _spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})


def step_specs(description: Description) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a step graph; everything is per row."""
    channels, height, width = description.latent_shape
    latent = (BATCH, channels, height, width)
    inputs = (
        _spec("z", *latent),
        *(_spec(name, BATCH) for name in STEP_SCALARS),
        *description.condition,
        _spec("known", *latent),
        _spec("keep", BATCH, 1, height, width),
        _spec("noise", *latent),
    )
    return inputs, (_spec(STEP_OUTPUT, *latent),)


def shipped_bundle(name: str = SHIPPED) -> Path:
    """The folder of a bundle that ships with the package. Raises BundleError naming those there are."""
    shipped = sorted(path.parent.name for path in _BUNDLES.glob(f"*/{MANIFEST_NAME}"))
    if name not in shipped:
        raise BundleError(f"no bundle {name!r} ships with this package; shipped: {', '.join(shipped) or 'none'}")
    return _BUNDLES / name


def find_bundle(name: str) -> Path:
    """The folder that a person means: a bundle's folder, the name of one that ships, or "shipped".

    Raises BundleError for a word that is neither.
    """
    path = Path(name)
    try:
        if "/" in name or os.sep in name or (path / MANIFEST_NAME).is_file():
            return path
    except OSError as error:
        raise BundleError(f"{name} cannot be a bundle ({error.strerror})") from error
    try:
        return shipped_bundle(SHIPPED if name == "shipped" else name)
    except BundleError:
        if path.is_dir():
            return path  # Whoever reads it will say what it lacks.
        raise


def read_manifest(path: Path | str) -> Manifest:
    """Read and check `manifest.json` of the folder ``path`` without looking at the other files. Raises BundleError."""
    file = Path(path) / MANIFEST_NAME
    try:
        if file.exists() and not file.is_file():
            raise BundleError(f"{path} is not a bundle: {file.name} is not a regular file")
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: larger than {_MAX_MANIFEST_BYTES} bytes")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: {file.name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not a JSON document") from error
    return _parse(document, file)


def _parse(document: Any, file: Path) -> Manifest:
    if not isinstance(document, dict):
        raise BundleError(f"{file}: not a JSON object")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(f"{file}: format version {version!r}, this package reads {FORMAT_VERSION}")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise BundleError(f"{file}: {problem_of(error.errors(include_url=False)[0])}") from error
    if seal(document) != manifest.revision:
        raise BundleError(f"{file}: changed after it was written (revision does not match)")
    return manifest


def find_problems(path: Path | str, manifest: Manifest, hashes: bool = True) -> list[str]:
    """What is wrong with the files of ``path``, one line each; hashes are checked only when asked for.

    Raises OSError where the folder, or a file in it, cannot be read.
    """
    folder = Path(path)
    problems = []
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST_NAME}
    problems += [f"{name}: not listed in the manifest" for name in sorted(present - manifest.files.keys())]
    for name, record in sorted(manifest.files.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif (size := file.stat().st_size) != record.size_bytes:
            problems.append(f"{name}: {size} bytes, the manifest says {record.size_bytes}")
        elif hashes and sha256_of(file) != record.sha256:
            problems.append(f"{name}: its SHA-256 does not match the manifest")
    return problems


def load_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Open the bundle in folder ``path``.

    Names and sizes of the files are always checked, their hashes when ``verify``. Raises BundleError naming
    the file.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    try:
        problems = find_problems(folder, manifest, hashes=verify)
    except OSError as error:
        raise BundleError(f"{folder}: {error}") from error
    if problems:
        raise BundleError(f"{folder}: " + "; ".join(problems))
    return Bundle(folder, manifest)


@contextmanager
def steady_bundle(path: Path | str) -> Iterator[Bundle]:
    """The bundle in folder ``path``, verified, for a block that opens its files by their names.

    Raises BundleError as `load_bundle` does, and EngineError where the bundle was replaced before the block ended: what
    was opened may then be of two revisions. Trying again helps.
    """
    folder = Path(path)
    before = _stamps(folder)  # what is written while the files are hashed counts too
    bundle = load_bundle(folder)
    try:
        yield bundle
    except (BundleError, EngineError) as error:
        _check_steady(bundle, before, error)
        raise
    _check_steady(bundle, before)


def _check_steady(bundle: Bundle, before: Stamps | None, cause: Exception | None = None) -> None:
    try:
        same = _stamps(bundle.path) == before and read_manifest(bundle.path) == bundle.manifest
    except BundleError:
        same = False
    if not same:
        raise EngineError(f"{bundle.path}: the bundle was replaced while it was opened; open it again") from cause


def _stamps(folder: Path) -> Stamps | None:
    try:
        return stamps_of(folder)
    except OSError:
        return None


def write_bundle(
    path: Path | str, description: Description, files: Mapping[str, Path], replace: bool = False
) -> Bundle:
    """Write a bundle of ``files`` (name in the bundle -> where to copy it from) to folder ``path``.

    Hashes and revision are computed here. The folder appears complete or not at all; an existing one is an
    error unless ``replace``, and what is not a bundle is never replaced. To change only the description, pass the
    files of the bundle itself. Raises BundleError for files that are not those of the description.
    """
    folder = Path(path).absolute()
    check_free(folder, replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        staged = Path(scratch) / "new"
        staged.mkdir()
        for name, source in files.items():
            shutil.copyfile(source, staged / _checked(name))
        _write_manifest(staged, description, sorted(files))
        load_bundle(staged)
        _put(staged, folder, Path(scratch) / "old")
    _sweep(folder)
    return load_bundle(folder, verify=False)


def _sweep(folder: Path) -> None:
    """Remove what killed writers of that bundle left beside it a day ago or more."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-{'?' * 8}"):
        with suppress(OSError):  # others may be removing it
            ours = {entry.name for entry in left.iterdir()} <= {"new", "old"}
            if ours and time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(left)


def _put(staged: Path, folder: Path, aside: Path) -> None:
    """Move a bundle to its folder; what was there goes aside, and comes back where that fails or is cut off."""
    try:
        if folder.exists():
            folder.rename(aside)
        staged.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise


def check_free(folder: Path, replace: bool) -> None:
    """Raise BundleError unless a bundle can be written to ``folder``: an existing one only to ``replace`` it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not replace:
        raise BundleError(f"{folder} exists already")
    if not (folder / MANIFEST_NAME).is_file():
        raise BundleError(f"{folder} is not a bundle: it is not replaced")


def _checked(name: str) -> str:
    try:
        return plain_file_name(name)
    except ValueError as error:
        raise BundleError(str(error)) from error


def _write_manifest(folder: Path, description: Description, names: Sequence[str]) -> None:
    files = {name: folder / name for name in names}
    records = {name: {"sha256": sha256_of(file), "size_bytes": file.stat().st_size} for name, file in files.items()}
    fields = Description.model_fields.keys()
    document: dict[str, Any] = {**description.model_dump(mode="json", include=set(fields)), "files": records}
    document["revision"] = seal(document)
    _parse(document, folder / MANIFEST_NAME)
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as out:
        json.dump(document, out, indent=2)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
