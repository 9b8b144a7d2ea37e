"""A finished run -> a bundle: its graphs checked against torch, its sources named, its card written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engines.backends.base import STEP_OUTPUT, TensorSpec
from engines.bundle import (
    Attribution,
    Bundle,
    Description,
    Grid,
    GuidanceRange,
    Provenance,
    Student,
    check_free,
    write_bundle,
)
from engines.manifest import MASK, MASKED
from training import networks
from training.diffusion import Schedule, diffuse
from training.draws import Draws
from training.exporting.card import (
    PICTURE,
    commit_of_code,
    data_name,
    model_card,
    quality_table,
    sources_of,
    teacher_attribution,
)
from training.exporting.graphs import SMALLEST_FIRST, Example, Parity, StepGraph, Tracer, Weights, export_graph
from training.exporting.programs import PROGRAM_SUFFIX, export_program
from training.exporting.text_graphs import TEXT, checked_text_graph, text_encoder, text_example, tokenizer_files
from training.guidance import Condition
from training.losses import Batch
from training.prompts import TextGraph
from training.run import Run
from training.stages import encoder_stage, student_stage

ENCODE, DECODE = "encode.onnx", "decode.onnx"
SEEN = (MASK, MASKED)
"""What changes from row to row in a service, though it may be the same for all in training."""

CARD = "README.md"


def export(
    run: Run,
    out: Path,
    weights: Sequence[Weights] = SMALLEST_FIRST,
    replace: bool = False,
    programs: bool = False,
) -> Bundle:
    """Write the bundle of a run whose students are trained to the folder `out`, with torch programs if asked for.

    Each graph is stored with the first of `weights` that keeps it within tolerance of torch. Raises ExportError for one
    that differs or a run that fits no bundle, TeacherError for prompts that no bundle reads, TrainingError for a stage
    that is not done, BundleError where `out` is.
    """
    check_free(out, replace)
    sources, table = sources_of(run), quality_table(run)
    _ = run.data  # Encoded where the run computes, before the autoencoder that it shares goes to the CPU.
    text = None if run.prompts is None else checked_text_graph(run.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        folder, tracer = Path(scratch), Tracer()
        parities, made = list[Parity](), dict[str, Parity]()
        for name, make in tqdm(_graphs(run, text).items(), desc="exporting", unit="graph", disable=None):
            parity, program = _written(make, folder / name, weights, programs, tracer)
            parities.append(parity)
            if program is not None:
                made[name] = program
        for name, tokens in tokenizer_files(text).items():
            (folder / name).write_text(tokens)
        names = {graph: parity.graph for graph, parity in made.items()}
        description = describe(run, parities, sources, table, text, names)
        source = None if run.pipeline is None else run.pipeline.source
        has_checker = run.pipeline is not None and run.pipeline.has_safety_checker
        if (picture := run.folder / "evaluation" / PICTURE).exists():
            (folder / PICTURE).write_bytes(picture.read_bytes())
        parities += made.values()
        card = model_card(description, parities, run.recipe.export, picture.exists(), source, has_checker)
        (folder / CARD).write_text(card)
        return write_bundle(out, description, {file.name: file for file in folder.iterdir()}, replace=replace)


def _written(
    make: Callable[[], tuple[nn.Module, Example]],
    path: Path,
    weights: Sequence[Weights],
    programs: bool,
    tracer: Tracer,
) -> tuple[Parity, Parity | None]:
    """Write a graph, and its program if asked for; how far each is from torch. The module is gone afterwards."""
    module, example = make()
    parity = export_graph(module, example, path, weights, tracer)
    return parity, export_program(module, example, path.with_suffix(PROGRAM_SUFFIX)) if programs else None


def step_graph_name(steps: int) -> str:
    """The file of the student of so many steps."""
    return f"step-{steps}.onnx"


def encoder_graph_name(steps: int) -> str:
    """The file of the encoder of so many steps."""
    return f"encoder-{steps}.onnx"


def _graphs(run: Run, text: TextGraph | None) -> dict[str, Callable[[], tuple[nn.Module, Example]]]:
    """What makes each graph's module, in turn: all networks at once may be more than memory holds.

    Raises TrainingError for a stage that is not done.
    """
    graphs = dict[str, Callable[[], tuple[nn.Module, Example]]]()
    if text is not None:
        graphs[TEXT] = lambda: (text.module, text_example(text))
    if run.is_latent:
        graphs[ENCODE] = lambda: (_Encoder(run), Example(lambda b: (_images(run, b),), ("image",), ("latent",)))
        graphs[DECODE] = lambda: (_Decoder(run), Example(lambda b: (_latents(run, b),), ("latent",), ("image",)))
    for steps in run.recipe.export.steps:
        run.check_done(stage := student_stage(steps))
        graphs[step_graph_name(steps)] = partial(step_graph, run, stage, steps)
    for steps in run.recipe.exported_encoders:
        run.check_done(stage := encoder_stage(steps))
        graphs[encoder_graph_name(steps)] = partial(step_graph, run, stage, steps, encodes=True)
    return graphs


def step_graph(run: Run, stage: str, steps: int, encodes: bool = False) -> tuple[StepGraph, Example]:
    """The step graph of a stage's network, and rows for it; classes are given by their places in the manifest."""
    numbers = None if run.pipeline is None or run.pipeline.is_text else run.class_numbers
    constants = {name: value for name, value in run.constants.items() if name not in SEEN}
    conditions = tuple(name for name in _some_rows(run, 1, 0).condition if name not in constants)
    graph = StepGraph(run.denoiser(stage).cpu(), conditions, numbers, constants)
    return graph, _step_example(run, graph, steps, encodes)


class _Encoder(nn.Module):
    """The autoencoder's encoder: image -> scaled latent."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.autoencoder = run.autoencoder().cpu()

    def forward(self, image: Tensor) -> Tensor:
        return networks.encode(self.autoencoder, image)


class _Decoder(nn.Module):
    """The autoencoder's decoder: scaled latent -> image."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.autoencoder = run.autoencoder().cpu()

    def forward(self, latent: Tensor) -> Tensor:
        return networks.decode(self.autoencoder, latent)


def _latents(run: Run, batch: int) -> Tensor:
    """Latents of the training set."""
    return _some_rows(run, batch, batch).x


def _images(run: Run, batch: int) -> Tensor:
    """Images that the encoder has to deal with: here, the decoder's own."""
    with torch.inference_mode():
        return networks.decode(run.autoencoder().cpu(), _latents(run, batch)).clamp(-1, 1)


def _some_rows(run: Run, batch: int, place: int) -> Batch:
    draws = Draws(run.recipe.seed, place, range(batch))
    return run.data.batch(draws.integers(len(run.data)), draws, torch.device("cpu"))


def _step_example(run: Run, graph: StepGraph, steps: int, encodes: bool) -> Example:
    """Rows as a service sends them: each at its own place on the grid, with its own w, condition and mask.

    An encoder goes from place to place the other way.
    """
    grid = run.schedule.grid(steps)

    def make(batch: int) -> tuple[Tensor, ...]:
        draws = Draws(run.recipe.seed, batch, range(batch))
        rows = _some_rows(run, batch, batch)
        place = torch.arange(batch) % steps
        place, place_next = (place + 1, place) if encodes else (place, place + 1)
        alpha, sigma = grid.alphas[place], grid.sigmas[place]
        noise = draws.normal(rows.x)
        shaped = (alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1))
        low, high = run.recipe.guidance
        values = {
            "z": diffuse(rows.x, noise, *shaped),
            "time": grid.times[place],
            "alpha": alpha,
            "sigma": sigma,
            "alpha_next": grid.alphas[place_next],
            "sigma_next": grid.sigmas[place_next],
            "guidance": (low + (high - low) * draws.uniform()).float(),
            **_as_served(graph, rows.condition),
            "known": rows.x,
            "keep": (draws.normal(rows.x[:, :1]) > 1).float(),
            "noise": noise,
        }
        return tuple(values[name] for name in graph.input_names)

    return Example(make, graph.input_names, (STEP_OUTPUT,))


def _as_served(graph: StepGraph, condition: Condition) -> Condition:
    """The condition of rows as a service gives it: the places of classes for the numbers that the network has."""
    if graph.numbers is None:
        return condition
    is_number = condition["label"][:, None] == graph.numbers
    return {**condition, "label": is_number.int().argmax(dim=1)}


def describe(
    run: Run,
    parities: Sequence[Parity],
    sources: Sequence[Attribution],
    table: str,
    text: TextGraph | None,
    programs: Mapping[str, str],
) -> Description:
    """The manifest of a run's bundle, with those to whom its data is owed, its quality table, and its programs."""
    recipe, example = run.recipe, _some_rows(run, 1, 0).condition
    condition = tuple(
        TensorSpec(
            name=name,
            dtype="float32" if value.is_floating_point() else "int64",
            shape=("batch", *value.shape[1:]),
        )
        for name, value in example.items()
        if name in SEEN or name not in run.constants
    )
    return Description(
        name=recipe.name,
        space="latent" if run.is_latent else "pixel",
        conditioning=recipe.conditioning,
        image_shape=(3, recipe.data.size, recipe.data.size),
        latent_shape=run.shape,
        students=tuple(_student(run, steps) for steps in sorted(recipe.export.steps)),
        guidance=GuidanceRange(minimum=recipe.guidance[0], maximum=recipe.guidance[1], default=recipe.default_guidance),
        condition=condition,
        text=text and text_encoder(text),
        classes=run.data.classes,
        encode=ENCODE if run.is_latent else None,
        decode=DECODE if run.is_latent else None,
        programs=dict(programs),
        weights_dtype="+".join(sorted({parity.weights for parity in parities})),
        licence=recipe.export.licence,
        attributions=(*sources, *teacher_attribution(run)),
        provenance=Provenance(
            recipe=recipe.portable_json(),
            data=data_name(run),
            commit=commit_of_code(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            quality_table=table,
        ),
    )


def _student(run: Run, steps: int) -> Student:
    """The manifest's entry of a student: a stochastic one knows the times of the deterministic sampler too."""
    is_stochastic = any(round_.stochastic for round_ in run.recipe.stage2.rounds if round_.steps == steps)
    return Student(
        steps=steps,
        graph=step_graph_name(steps),
        grid=bundle_grid(run.schedule, steps),
        stochastic=bundle_grid(run.schedule, 2 * steps) if is_stochastic else None,
        encoder=encoder_graph_name(steps) if steps in run.recipe.exported_encoders else None,
    )


def bundle_grid(schedule: Schedule, steps: int) -> Grid:
    """The manifest's form of a student's grid."""
    grid = schedule.grid(steps)
    return Grid(
        times=tuple(grid.times.tolist()),
        alphas=tuple(grid.alphas.tolist()),
        sigmas=tuple(grid.sigmas.tolist()),
    )
