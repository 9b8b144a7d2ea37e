"""What the commands of the benchmarks are given."""

from __future__ import annotations

import click

from engines.bundle import BundleError, find_bundle


def known_bundle(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """The folder of a bundle, or the name of one that ships. Raises click's BadParameter where there is none."""
    try:
        find_bundle(value)
    except BundleError as error:
        raise click.BadParameter(str(error)) from error
    return value
