"""`fewstep data`: builds, checks and packs sets of captioned images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from training.data.convert import SplitReport

OUT = click.argument("out", type=click.Path(path_type=Path, file_okay=False))
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT when it exists and is an image set.")
PACKAGES = click.option(
    "--packages",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of tarballs made by `npm pack`; without it they are fetched with npm and cached.",
)
SIZE_PX = click.IntRange(8, 1024)


@click.group()
def data() -> None:
    """Build, check and pack sets of captioned images."""


@data.command()
@OUT
@click.option("--size", type=SIZE_PX, default=64, show_default=True, help="Side of the images in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides captions and held-out images.")
@PACKAGES
@OVERWRITE
def emoji(out: Path, size: int, seed: int, packages: Path | None, overwrite: bool) -> None:
    """Build the captioned emoji set in the folder OUT."""
    from training.data import emoji as builder

    with _told():
        _print_built(out, builder.build(out, size, seed, packages, overwrite))


@data.command()
@OUT
@click.option("--size", type=SIZE_PX, default=32, show_default=True, help="Side of the images in pixels.")
@OVERWRITE
def digits(out: Path, size: int, overwrite: bool) -> None:
    """Build the set of handwritten digits in the folder OUT."""
    from training.data import digits as builder

    with _told():
        _print_built(out, builder.build(out, size, overwrite))


@data.command()
@OUT
@PACKAGES
@OVERWRITE
def mnist(out: Path, packages: Path | None, overwrite: bool) -> None:
    """Build the set of 10,000 MNIST digits, 28 px, in the folder OUT."""
    from training.data import mnist as builder

    with _told():
        _print_built(out, builder.build(out, packages, overwrite))


@data.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--strict", is_flag=True, help="Fail when anything had to be skipped.")
def check(path: Path, strict: bool) -> None:
    """Decode every image of the set at PATH; print counts, and what is skipped and why.

    PATH holds images with metadata.jsonl ({"file_name": ..., "text": ...}), with a caption file name.txt
    beside name.png, or in folders named after their class; or WebDataset shards; or folders train/ and
    heldout/ of these. A class may be called train, beside others.
    """
    from training.data.convert import check as check_set

    with _told():
        reports = check_set(path)
    _print_reports(reports)
    empty = [report.split for report in reports if not report.images]
    if empty:
        raise click.ClickException(f"nothing usable in {', '.join(empty)}")
    if strict and any(report.skipped for report in reports):
        raise click.ClickException("some files were skipped")


@data.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@OUT
@click.option("--per-shard", type=click.IntRange(1), default=1000, show_default=True, help="Images in a shard.")
@OVERWRITE
def shards(source: Path, out: Path, per_shard: int, overwrite: bool) -> None:
    """Pack the set at SOURCE into WebDataset tar shards, each split in a folder of its name in the folder OUT."""
    from training.data.convert import write_shards

    with _told():
        reports = write_shards(source, out, per_shard, overwrite)
    _print_reports(reports)
    click.echo(f"wrote {', '.join(str(out / report.split) for report in reports)}")


@data.command()
@click.argument("address")
def index(address: str) -> None:
    """Index the WebDataset shards at ADDRESS, so that they can be streamed.

    ADDRESS is a local folder or an fsspec address such as s3://bucket/set. Its shards hold captioned images, or
    arrays: key.x.npy and key.NAME.npy. Each is read once; index.json is written beside them.
    """
    from training.data.shard_contents import described
    from training.data.shard_index import make_index

    with _told():
        made = make_index(address)
    what = described(made.arrays) or "captioned images"
    click.echo(f"indexed {address}: {sum(made.counts)} samples in {len(made.shards)} shards: {what}")


@contextmanager
def _told() -> Iterator[None]:
    """Turns the errors that a person can act on into one line."""
    from training.data.entries import DataError
    from training.data.folder import OutputExistsError
    from training.data.packages import PackageError

    try:
        yield
    except (DataError, OutputExistsError, PackageError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _print_built(out: Path, description: Mapping[str, Any]) -> None:
    for failure in description.get("failures", ()):
        click.echo(f"left out: {failure}", err=True)
    counts = ", ".join(f"{count} {split}" for split, count in description["counts"].items())
    click.echo(f"wrote {out}: {counts} images of {description['size']} px")


def _print_reports(reports: Sequence[SplitReport]) -> None:
    for report in reports:
        click.echo(f"{report.split}: {report.images} images, {report.captions} captions")
        if report.smallest and report.largest:
            sizes = dict.fromkeys(f"{width}x{height}" for width, height in (report.smallest, report.largest))
            click.echo(f"  sizes: {' to '.join(sizes)}")
        if report.groups:
            click.echo(f"  groups: {', '.join(f'{name} {n}' for name, n in sorted(report.groups.items()))}")
        click.echo(f"  skipped: {len(report.skipped)}")
        for skipped in report.skipped:
            click.echo(f"    {skipped}")
