"""The command line: one table of subcommands, each imported when it is used. Knows no more than their names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import version

import click


@dataclass(frozen=True)
class Entry:
    """Where a subcommand lives, what it does, and the extra that its package needs."""

    target: str
    help: str
    extra: str = ""


COMMANDS = {
    "serve": Entry("service.commands:serve", "Serve a bundle over HTTP."),
    "generate": Entry("engines.commands:generate", "Make images from a prompt, without a service."),
    "inspect": Entry("engines.commands:inspect", "Show and verify what is in a bundle."),
    "data": Entry("training.data.commands:data", "Build and check image sets.", "training"),
    "train": Entry("training.commands:train", "Train the guided teacher of a recipe.", "training"),
    "distill": Entry("training.commands:distill", "Distil a recipe's students, and train what is missing.", "training"),
    "evaluate": Entry("training.evaluate_command:evaluate", "Print the quality table of a run.", "training"),
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
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not entry.extra or (error.name or "").split(".")[0] in ("engines", "service", "training"):
                raise
            raise click.ClickException(
                f"fewstep {cmd_name} needs the {entry.extra} extra ({error.name} is missing): "
                f"pip install 'fewstep[{entry.extra}]'"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.command(cls=Commands)
@click.version_option(version("fewstep"), prog_name="fewstep")
def main() -> None:
    """Few-step image generation: distil a guided diffusion model, serve its students."""


if __name__ == "__main__":
    main()
