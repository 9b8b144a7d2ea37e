"""The subcommand `build`: a bundle's graphs compiled ahead of time, kept where the service finds them."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engines.backends.base import BATCH_SIZES, EngineError
from engines.backends.trt_library import Progress
from engines.bundle import BundleError, find_bundle, load_bundle
from engines.plans import MOST_ROWS, PRECISIONS, PlanCache, PlanError, Precision, Profile, batch_sizes_up_to

if TYPE_CHECKING:
    from engines.compile import Built

LARGEST_BATCH = 65536
_SIZES = ",".join(map(str, BATCH_SIZES))

Command = TypeVar("Command", bound=Callable[..., Any])
Asked = Callable[[], int]
"""The signal that asked to stop, SIGINT or SIGTERM; 0 as long as none did."""

UNHANDLED: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def sizes_option(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Batch sizes between commas, in order and each once."""
    try:
        sizes = Profile(tuple(int(part) for part in value.split(","))).batch_sizes
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of batch sizes such as {_SIZES}") from None
    if sizes[-1] > LARGEST_BATCH:
        raise click.BadParameter(f"a batch of {sizes[-1]} is too large: at most {LARGEST_BATCH}")
    return sizes


def precision_option(text: str) -> Callable[[Command], Command]:
    """The option --precision, with this help."""
    kinds = click.Choice(list(PRECISIONS))
    return click.option("--precision", type=kinds, default="fp32", show_default=True, help=text)


@click.command()
@click.argument("bundle")
@click.option("--backend", type=click.Choice(["trt"]), default="trt", show_default=True)
@click.option(
    "--target",
    callback=lambda *given: given[-1] and given[-1].lower(),
    help="The chip, such as sm89.  [default: the one that is there]",
)
@precision_option("What graphs are cast to.")
@click.option(
    "--batch-sizes",
    callback=sizes_option,
    default=_SIZES,
    show_default=True,
    help="Each a shape of its own.",
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
    """Compile the graphs of BUNDLE (a folder, or "shipped") and keep the plans. What is there is not built again.

    A plan is found by whoever asks for batch sizes that it has, or, with --dynamic, for none that is larger. The last
    lines say which options of serve and generate do.
    """
    from engines.compile import build_bundle

    profile, library = Profile(batch_sizes, dynamic), ""
    try:
        opened = load_bundle(find_bundle(bundle))
        with _asked_to_stop() as asked:
            for built in build_bundle(opened, profile, precision, target, PlanCache(plans), partial(_progress, asked)):
                library = built.key.library
                click.echo(_line(built))
                _stop_if(asked)
    except (BundleError, EngineError, PlanError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(_finders(backend, library, precision, profile, plans)))


def _line(built: Built) -> str:
    """A plan, in a line for people."""
    how = f"{built.seconds:.1f} s" if built.seconds else "was there"
    fidelity = "" if built.fidelity_db is None else f", {built.fidelity_db:.1f} dB to fp32"
    return (
        f"{built.graph}  {built.key.library}, {built.key.target}, {built.key.precision}, "
        f"batches of {built.key.profile}: {how}, {built.size_bytes / 1e6:.1f} MB{fidelity}  {built.path}"
    )


@contextmanager
def _asked_to_stop() -> Iterator[Asked]:
    """Ctrl-C and SIGTERM, within the block, are only remembered, and end it where a build ends because of them.

    TensorRT calls back into Python while it builds, and swallows what is raised there. Whoever has a handler of their
    own, or ignores the signal, keeps to that.
    """
    came = 0

    def note(number: int, _: object) -> None:
        nonlocal came
        came = number

    def asked() -> int:
        return came

    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, none in UNHANDLED.items() if main and signal.getsignal(number) is none]
    for number in ours:
        signal.signal(number, note)
    try:
        yield asked
    except EngineError:
        _stop_if(asked)
        raise
    finally:
        for number in ours:
            signal.signal(number, UNHANDLED[number])


def _stop_if(asked: Asked) -> None:
    number = asked()
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    if number:
        raise click.Abort()


def _finders(backend: str, library: str, precision: Precision, profile: Profile, plans: Path | None) -> list[str]:
    """Which options of `serve` and `generate` find plans of a profile, in lines for people."""
    options = f"--backend {backend} --precision {precision}" + (f" --plans {shlex.quote(str(plans))}" if plans else "")
    found = [
        n
        for n in range(1, min(profile.batch_sizes[-1], MOST_ROWS) + 1)
        if profile.covers(Profile(batch_sizes_up_to(n)))
    ]
    if not found:
        largest = min(profile.batch_sizes[-1], MOST_ROWS)
        sizes = ",".join(map(str, batch_sizes_up_to(largest)))
        return [f"`fewstep serve` finds none: --max-batch {largest} needs --batch-sizes {sizes}, or --dynamic."]
    others = ", ".join(map(str, found[:-1])) if not profile.dynamic else f"every one from 1 to {found[-1]}"
    lines = [
        f"Found, with {library}, by:",
        f"  fewstep serve {options} --max-batch {found[-1]}" + (f"  (or {others})" if others else ""),
    ]
    if profile.covers(Profile(BATCH_SIZES)):
        lines.append(f"  fewstep generate {options}")
    return lines


def _progress(asked: Asked, graph: str) -> Progress:
    """A line on a terminal that is written over; nothing where the output goes elsewhere. Until it is to stop."""
    terminal = sys.stderr.isatty()

    def tell(phase: str, done: int, steps: int) -> bool:
        if terminal:
            click.echo(f"\r\033[K{graph}: {phase} {done}/{steps}\r", nl=False, err=True)
        return not asked()

    return tell
