"""`fewstep keys`: make API keys, and the lines of the file that the service knows them by."""

from __future__ import annotations

import click

from service.security.api_keys import (
    MIN_KEY_CHARS,
    NAMES,
    ApiKey,
    KeyFileError,
    digest_of,
    is_name,
    new_key,
    parse_keys,
)

_name = click.argument("name")
_per_minute = click.option(
    "--per-minute", type=float, help="Requests that it may make in a minute; unbounded if absent."
)
_admin = click.option("--admin", is_flag=True, help="It may load and unload bundles too.")


@click.group()
def keys() -> None:
    """Make API keys. The file that api_keys_file names holds their hashes, a line each."""


@keys.command()
@_name
@_per_minute
@_admin
def new(name: str, per_minute: float | None, admin: bool) -> None:
    """Make a key for NAME: print it, once, and the line to add to the file of keys.

    The line goes to standard output, and the key to standard error: `fewstep keys new NAME >> keys.txt` adds it.
    """
    key = new_key()
    line = _line(name, key, per_minute, admin)
    click.echo(line)  # First: a key whose line could not be written is of no use.
    click.echo(f"The key, which is kept nowhere: {key}", err=True)


@keys.command("hash")
@_name
@_per_minute
@_admin
def hash_key(name: str, per_minute: float | None, admin: bool) -> None:
    """Print the line for a key of NAME's own, which is read from standard input and not shown."""
    key = click.prompt("Key", hide_input=True, err=True).strip()
    if len(key) < MIN_KEY_CHARS:
        raise click.ClickException(f"a key must have at least {MIN_KEY_CHARS} characters that nobody can guess")
    if not (key.isascii() and key.isprintable()):
        raise click.ClickException("a key must be of visible ASCII characters: others do not travel alike in a header")
    click.echo(_line(name, key, per_minute, admin))


def _line(name: str, key: str, per_minute: float | None, admin: bool) -> str:
    if not is_name(name):
        raise click.ClickException(NAMES)
    line = ApiKey(name, digest_of(key), per_minute, admin).line
    try:
        parse_keys(line)
    except KeyFileError as error:
        raise click.ClickException(str(error).removeprefix("line 1: ")) from error
    return line
