"""`fewstep serve`: the command line of the service."""

from __future__ import annotations

import logging
import os
from typing import Any

import click
from pydantic import ValidationError

from engines.backends import AUTO, BACKENDS, KEEP_PLANS
from engines.plans import PRECISIONS
from engines.problems import problem_of
from service.settings import Settings, unknown_settings

logger = logging.getLogger(__name__)


@click.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on, 0 for any free one.")
@click.option("--bundle", help="Folder of a bundle, or the name of one that ships.")
@click.option("--models", type=click.Path(file_okay=False), help="Folder of more bundles, loaded when asked for.")
@click.option(
    "--max-model-bytes", type=int, help="Most memory of loaded bundles' weights; the least recently used go first."
)
@click.option("--role", type=click.Choice(["all", "api", "worker"]), help="What this process does.")
@click.option("--queue", help="Where jobs wait: memory, or the URL of a Redis.")
@click.option("--backend", type=click.Choice([AUTO, *BACKENDS]), help="What runs the graphs.")
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), help="What the backend computes in; `ort` knows fp32 only."
)
@click.option("--plans", type=click.Path(file_okay=False), help="Where compiled plans are kept.")
@click.option("--threads", type=int, help="Threads of an engine; 0, the default, leaves a core to HTTP and images.")
@click.option("--max-batch", type=int, help="Most images in one call of the step engine.")
@click.option("--api-keys-file", type=click.Path(dir_okay=False), help="Hashes of API keys, which `keys new` prints.")
@click.option("--timeout-ms", type=int, help="Time limit of a request that names none.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Format of log lines.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Lowest level to log.")
def serve(**options: Any) -> None:
    """Serve a bundle over HTTP, with a page at /.

    Every setting can also come from the environment, as FEWSTEP_<NAME>; an option here goes before it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise click.UsageError("; ".join(map(problem_of, error.errors()))) from error
    if "plans" in given and settings.backend not in (AUTO, *KEEP_PLANS):
        raise click.BadParameter(f"{settings.backend} keeps no plans; {', '.join(KEEP_PLANS)} do", param_hint="--plans")
    # Imported late, so that --help and a wrong option answer at once.
    from service import server
    from service.telemetry import logs

    logs.configure(settings.log_format, settings.log_level)
    for name in unknown_settings(os.environ):
        logger.warning("no setting has this name: it is ignored", extra={"variable": name})
    code = server.run(settings)
    if code == server.LOST:
        server.start_anew()
    raise SystemExit(code)


if __name__ == "__main__":
    serve()
