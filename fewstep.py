"""The command line: one table of subcommands, each imported when it is used. Knows no more than their names."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click


@dataclass(frozen=True)
class Entry:
    """Where a subcommand lives, what it does, and the extra that its package needs."""

    target: str
    help: str
    extra: str = ""


COMMANDS = {
    "serve": Entry("service.commands:serve", "Serve a bundle over HTTP."),
    "keys": Entry("service.security.keys_command:keys", "Make API keys for the service."),
    "generate": Entry("engines.commands:generate", "Make images from a prompt, without a service."),
    "inspect": Entry("engines.commands:inspect", "Show and verify what is in a bundle."),
    "build": Entry("engines.build_command:build", "Compile a bundle's graphs ahead of time.", "tensorrt"),
    "bench": Entry("engines.bench_command:bench", "Time a bundle on several backends, and compare what they make."),
    "data": Entry("training.data.commands:data", "Build and check image sets.", "training"),
    "precompute": Entry("training.precompute:command", "Write a recipe's latents and prompts as shards.", "training"),
    "train": Entry("training.commands:train", "Train the guided teacher of a recipe.", "training"),
    "distill": Entry("training.commands:distill", "Distil a recipe's students, and train what is missing.", "training"),
    "evaluate": Entry("training.evaluation.command:evaluate", "Print the quality table of a run.", "training"),
    "export": Entry("training.commands:export", "Write the bundle of a run.", "training"),
}


class Commands(click.Group):
    """Subcommands out of the table. A missing package is reported with the extra that installs it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand, or None for a name that is not in the table."""
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        module, attribute = entry.target.split(":")
        with _missing_extra_named(cmd_name):
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand, which imports more when it is at work."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            with _missing_extra_named(ctx.invoked_subcommand or ""):
                raise error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # What could not be written is written no more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.ClickException(f"{error.filename or 'the output'}: {error.strerror}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@contextmanager
def _missing_extra_named(command: str) -> Iterator[None]:
    """Say which extra installs a package that a subcommand misses."""
    extra = COMMANDS[command].extra if command in COMMANDS else ""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not extra or package in ("engines", "service", "training"):
            raise
        raise click.ClickException(
            f"fewstep {command} needs the {extra} extra ({package} is missing): pip install 'fewstep[{extra}]'"
        ) from error


@contextmanager
def _tidy_at_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the process as an exception does, so that temporary folders are removed.

    Whoever has a handler of their own, or ignores it, keeps to that.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a launcher passes on what all were sent, which would end the tidying
    raise SystemExit(128 + number)


@click.command(cls=Commands)
@click.version_option(package_name="fewstep", prog_name="fewstep")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Few-step image generation: distil a guided diffusion model, serve its students."""
    entry = COMMANDS.get(ctx.invoked_subcommand or "")
    # Elsewhere uvicorn has handlers of its own, and TensorRT swallows what is raised while it calls back.
    if entry and entry.extra == "training":
        ctx.with_resource(_tidy_at_sigterm())


if __name__ == "__main__":
    main()
