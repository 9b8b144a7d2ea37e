"""The subcommand `build`: a bundle's graphs compiled ahead of time, kept where the service finds them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from engines.backends.base import EngineError
from engines.backends.trt_library import Progress
from engines.bundle import BundleError, find_bundle, load_bundle
from engines.plans import PRECISIONS, PlanCache, Precision, Profile

BATCH_SIZES = "1,2,4,8,16"


def sizes_option(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Batch sizes between commas, in order and each once."""
    try:
        return Profile(tuple(int(part) for part in value.split(","))).batch_sizes
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of batch sizes such as {BATCH_SIZES}") from None


@click.command()
@click.argument("bundle")
@click.option("--backend", type=click.Choice(["trt"]), default="trt", show_default=True)
@click.option("--target", help="The chip, such as sm89.  [default: the one that is there]")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True)
@click.option(
    "--batch-sizes", callback=sizes_option, default=BATCH_SIZES, show_default=True, help="Each a shape of its own."
)
@click.option("--dynamic", is_flag=True, help="One shape for all batches up to the largest, instead of one for each.")
@click.option(
    "--plans",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where plans are kept.  [default: $FEWSTEP_PLANS, or the user's cache]",
)
def build(
    bundle: str,
    backend: str,
    target: str | None,
    precision: Precision,
    batch_sizes: tuple[int, ...],
    dynamic: bool,
    plans: Path | None,
) -> None:
    """Compile the graphs of BUNDLE (a folder, or "shipped") and keep the plans. What is there is not built again."""
    from engines.compile import build_bundle

    profile = Profile(batch_sizes, dynamic)
    try:
        opened = load_bundle(find_bundle(bundle))
        for built in build_bundle(opened, profile, precision, target, PlanCache(plans), _progress):
            how = f"{built.seconds:.1f} s" if built.seconds else "was there"
            fidelity = "" if built.fidelity_db is None else f", {built.fidelity_db:.1f} dB to fp32"
            click.echo(
                f"{built.graph}  {built.key.library}, {built.key.target}, {built.key.precision}, "
                f"batches of {profile}: {how}, {built.size_bytes / 1e6:.1f} MB{fidelity}  {built.path}"
            )
    except (BundleError, EngineError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _progress(graph: str) -> Progress:
    """A line on a terminal that is written over; nothing where the output goes elsewhere."""
    terminal = sys.stderr.isatty()

    def tell(phase: str, done: int, steps: int) -> None:
        if terminal:
            click.echo(f"\r\033[K{graph}: {phase} {done}/{steps}\r", nl=False, err=True)

    return tell
