"""The subcommands `generate` and `inspect`: bundles at the command line, without a service."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import click

from engines.backends import AUTO, BACKENDS, KEEP_PLANS
from engines.backends.base import MAX_THREADS, EngineError
from engines.build_command import precision_option
from engines.bundle import Bundle, BundleError, Manifest, find_bundle, read_manifest
from engines.files import write_whole
from engines.images import ImageFormat, encode_image
from engines.inspection import differences
from engines.manifest import SAMPLERS, Sampler
from engines.pipeline import MAX_SEED, Generate, Pipeline, TaskError
from engines.plans import Precision
from engines.provenance import describe_image

_SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_IN_TASKS = {"condition": "PROMPT", "guidance": "--guidance-scale"}


def _image_format(out: Path) -> ImageFormat:
    if not out.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    if out.suffix.lower() not in _SUFFIXES:
        raise click.BadParameter(f"end the name in {', '.join(_SUFFIXES)}", param_hint="--out")
    return _SUFFIXES[out.suffix.lower()]


@click.command()
@click.argument("bundle")
@click.argument("prompt")
@click.option("--steps", type=int, help="Network calls an image.  [default: the most that a student takes]")
@click.option("--sampler", type=click.Choice(SAMPLERS), default=SAMPLERS[0], show_default=True)
@click.option("--guidance-scale", type=float, help="1 is no guidance; the bundle's own default by default.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Image i of N takes SEED + i; random by default.")
@click.option("--n", "count", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of images.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("image.png"), show_default=True)
@click.option(
    "--backend",
    type=click.Choice([AUTO, *BACKENDS]),
    default="ort",
    show_default=True,
    help="One that compiles is waited for; auto answers with what is there.",
)
@precision_option("What the backend computes in; `ort` knows fp32 only.")
@click.option("--plans", type=click.Path(path_type=Path, file_okay=False), help="Where compiled plans are kept.")
@click.option("--threads", type=click.IntRange(0, MAX_THREADS), default=0, help="0 (default): every core it may use.")
def generate(
    bundle: str,
    prompt: str,
    steps: int | None,
    sampler: Sampler,
    guidance_scale: float | None,
    seed: int | None,
    count: int,
    out: Path,
    backend: str,
    precision: Precision,
    plans: Path | None,
    threads: int,
) -> None:
    """Make N images of PROMPT (a class name, for class bundles) with BUNDLE: a folder, or "shipped".

    With N above 1, the files are numbered: image-0.png, image-1.png ...
    """
    image_format = _image_format(out)
    if plans is not None and backend not in (AUTO, *KEEP_PLANS):
        raise click.BadParameter(f"{backend} keeps no plans; {', '.join(KEEP_PLANS)} do", param_hint="--plans")
    first_seed = secrets.randbelow(2**32) if seed is None else seed
    try:
        with Pipeline.open(find_bundle(bundle), backend, threads, precision=precision, plans=plans) as pipeline:
            if backend == AUTO:
                _tell_backend(pipeline)
            else:
                pipeline.wait_until_built()
            manifest = pipeline.manifest
            w = manifest.guidance.default if guidance_scale is None else manifest.guidance.w_of(guidance_scale)
            if steps is None:
                steps = max(manifest.trained_steps(sampler) or manifest.trained_steps())
            tasks = [Generate(prompt, steps, w, first_seed + i, sampler=sampler) for i in range(count)]
            with click.progressbar(length=count * steps, label="Denoising", show_pos=True, file=sys.stderr) as bar:
                images = pipeline.run(tasks, progress=bar.update)
    except TaskError as error:
        name = _IN_TASKS.get(error.param, f"--{error.param}")
        raise click.BadParameter(error.message, param_hint=name) from error
    except (BundleError, EngineError) as error:
        raise click.ClickException(str(error)) from error
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(count)]
    written = []
    try:
        for path, task, image in zip(paths, tasks, images, strict=True):
            try:
                write_whole(path.resolve(), encode_image(image, image_format, text=describe_image(task, manifest)))
            except OSError as error:
                raise click.FileError(str(path), f"{error.strerror}; its seed is {task.seed}") from error
            written.append(f"{path}  seed {task.seed}")
    finally:  # Last: whoever reads this may stop reading.
        click.echo("\n".join(written), nl=bool(written))


def _tell_backend(pipeline: Pipeline) -> None:
    """Which backend `auto` took, and why none that is better; on stderr, as stdout is for results."""
    for name, why in pipeline.passed_over.items():
        click.echo(f"backend {name} passed over: {why}", err=True)
    click.echo(f"backend {pipeline.backend} taken", err=True)


@click.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(bundle: str, as_json: bool) -> None:
    """Show what is in BUNDLE (a folder, or "shipped") and verify it. Exit status 1 if anything differs.

    Files are held to their hashes, and those that are whole are opened: the tokenizer, and graphs, which are held to
    the inputs and outputs that the manifest says they have and run on noise, with the last class and the last word, in
    company and alone. Where the package onnx is installed, weights are held to how the manifest says they are stored,
    and their files to what graphs read. Torch programs, which are code, are held to their hashes only.
    """
    try:
        path = find_bundle(bundle)
        manifest = read_manifest(path)
        problems = differences(Bundle(path, manifest))
    except (BundleError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        document = {"path": str(path), "manifest": manifest.model_dump(mode="json"), "problems": problems}
        click.echo(json.dumps(document, indent=2))
    else:
        found = [f"  DIFFERS  {problem}" for problem in problems]
        for line in [*_report(path, manifest), *(found or ["  files, graphs and tokenizer are as the manifest says"])]:
            click.echo("".join(letter if letter.isprintable() else "\ufffd" for letter in line))
    if problems:
        raise SystemExit(1)


def _report(path: Path, manifest: Manifest) -> list[str]:
    """The manifest in lines for people."""
    shapes = [" x ".join(str(size) for size in shape) for shape in (manifest.image_shape, manifest.latent_shape)]
    low, high, usual = manifest.guidance.scales
    lines = [
        f"{manifest.name} {manifest.revision}  ({path})",
        f"  {manifest.conditioning} to image, {manifest.space} space, image {shapes[0]}, latent {shapes[1]}",
        f"  guidance_scale {low:g} to {high:g}, default {usual:g}; weights {manifest.weights_dtype}",
    ]
    if manifest.text is not None:
        lines.append(f"  prompts of at most {manifest.text.max_tokens} tokens")
    else:
        lines.append(f"  classes: {', '.join(manifest.classes)}")
    for student in manifest.students:
        times = " ".join(f"{t:.4g}" for t in student.grid.times)
        lines.append(f"  student of {student.steps}: {student.graph}, t = {times}")
        if student.stochastic is not None:
            lines.append(f"    for the stochastic sampler in {student.stochastic.steps} steps too")
        if student.encoder is not None:
            lines.append(f"    with an encoder: {student.encoder}")
    lines += [f"  {graph} as a torch program: {program}" for graph, program in sorted(manifest.programs.items())]
    origin = manifest.provenance
    lines.append(f"  from recipe {origin.recipe}, data {origin.data}, commit {origin.commit}, {origin.created}")
    lines.append(f"  licence {manifest.licence}; made from:")
    lines += [f"    {work.name} ({work.licence}) {work.source}" for work in manifest.attributions]
    total = sum(record.size_bytes for record in manifest.files.values())
    lines.append(f"  files, {total / 1e6:.1f} MB, with the first digits of their SHA-256:")
    lines += [
        f"    {record.size_bytes:>11,}  {record.sha256[:12]}  {name}" for name, record in sorted(manifest.files.items())
    ]
    return lines
