"""What the service can be told from outside. The environment is read once, here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engines.bundle import SHIPPED
from engines.plans import MOST_ROWS, Precision
from service.queue.addresses import check_address
from service.queue.base import FRESH_S
from service.security.api_keys import read_keys
from service.security.cross_origin import read_origins
from service.telemetry.collector import check_collector, standard_collector

MIB = 1024 * 1024
MEMORY = "memory"

MOST_PROMPT_CHARS = 2250
"""Two of them fit in the metadata of a JPEG, which have 64 KiB: a character takes 14 bytes there at most."""

Role = Literal["all", "api", "worker"]

# The bounds keep what is reckoned of them whole, also where Redis does: a thousand years, some petabytes.
Count = Annotated[int, Field(ge=1, le=10**15)]
Milliseconds = Annotated[int, Field(ge=1, le=10**12)]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


PREFIX = "FEWSTEP_"


class Settings(BaseSettings):
    """Settings of one process, from keyword arguments or from ``FEWSTEP_<NAME>`` in the environment."""

    # The address of the queue may hold a password, which no error message may quote.
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, hide_input_in_errors=True)

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on, 0 for any free one")] = 8000
    bundle: Annotated[str, Field(description="folder of a bundle, or the name of one that ships")] = SHIPPED
    models: Annotated[Path | None, Field(description="folder of more bundles, loaded when they are asked for")] = None
    max_model_bytes: Annotated[Count, Field(description="most memory of loaded bundles' weights, in fp32")] = 8192 * MIB
    backend: Annotated[str, Field(description="what runs the graphs: a name in engines.backends, or auto")] = "ort"
    precision: Annotated[Precision, Field(description="what the backend computes in")] = "fp32"
    plans: Annotated[Path | None, Field(description="where compiled plans are kept; None is the user's cache")] = None
    threads: Annotated[
        int,
        Field(ge=0, description="threads of an engine; 0: all cores but one; of two, both for a lone image"),
    ] = 0
    max_batch: Annotated[int, Field(ge=1, le=MOST_ROWS, description="most rows in one tick")] = 16

    role: Annotated[Role, Field(description="what this process does; api and worker meet in a Redis queue")] = "all"
    queue: Annotated[str, Field(repr=False, description="where jobs wait: memory, or the URL of a Redis")] = MEMORY
    stall_s: Annotated[
        Seconds, Field(description="time after which a worker that does not get on is taken to hang: it starts anew")
    ] = 300.0
    reclaim_after_s: Annotated[
        Seconds, Field(ge=1, description="silence after which a worker's jobs go to another")
    ] = 15.0

    max_body_bytes: Annotated[Count, Field(description="largest request body")] = 12 * MIB
    max_image_bytes: Annotated[Count, Field(description="largest encoded image or mask")] = 8 * MIB
    max_pixels: Annotated[Count, Field(description="most pixels of an image or mask")] = 12 * MIB
    max_images: Annotated[int, Field(ge=1, le=64, description="most images of one request")] = 8
    max_prompt_chars: Annotated[Count, Field(le=MOST_PROMPT_CHARS, description="longest prompt, in characters")] = 1000
    max_queue_cost: Annotated[Count, Field(description="most work that may wait of a model, in images x steps")] = 3072
    max_inflight_bytes: Annotated[Count, Field(description="most bytes of bodies at once")] = 64 * MIB
    max_inflight: Annotated[Count, Field(description="most image requests at once")] = 3072

    api_keys_file: Annotated[Path | None, Field(description="hashes of API keys; None: no key is asked for")] = None
    open_metrics: Annotated[bool, Field(description="whether /metrics answers without a key")] = True
    admin: Annotated[bool, Field(description="whether bundles are loaded and unloaded on request")] = True

    cors_origins: Annotated[
        tuple[str, ...], NoDecode, Field(description="origins whose pages may call the API, with commas between them")
    ] = ()

    safety: Annotated[str | None, Field(description="a check of prompts and images, module:callable; None: none")] = (
        None
    )
    safety_timeout_s: Annotated[Seconds, Field(description="time that it has for an answer")] = 10.0

    timeout_ms: Annotated[Milliseconds, Field(description="time limit of a request that names none")] = 30_000
    max_timeout_ms: Annotated[Milliseconds, Field(description="longest time limit that a request may ask for")] = (
        120_000
    )
    body_timeout_s: Annotated[
        Seconds, Field(description="time a client has to send its headers, then its body, and to read its answer")
    ] = 30.0
    job_timeout_ms: Annotated[
        Milliseconds, Field(description="default and longest time limit of asynchronous jobs")
    ] = 600_000
    keep_results_s: Annotated[Seconds, Field(ge=FRESH_S, description="time that results of jobs are kept")] = 600.0
    max_results: Annotated[Count, Field(description="most results kept at once; the oldest go first")] = 1024
    max_result_bytes: Annotated[Count, Field(description="most bytes of their images")] = 256 * MIB
    drain_timeout_s: Annotated[Seconds, Field(description="time for requests in flight on SIGTERM")] = 30.0

    tracing: Annotated[
        str | None,
        Field(
            repr=False,
            validate_default=True,
            description="URL of an OTLP collector of traces; None: what OTEL_EXPORTER_OTLP_ENDPOINT says",
        ),
    ] = None
    log_format: Annotated[Literal["text", "json"], Field(description="form of a log line")] = "text"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level")] = "info"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.timeout_ms > self.max_timeout_ms:
            raise ValueError("timeout_ms must not exceed max_timeout_ms")
        if self.max_body_bytes > self.max_inflight_bytes:
            raise ValueError("max_body_bytes must not exceed max_inflight_bytes")
        return self

    @field_validator("host", "bundle", "models", "backend", "plans", "queue", mode="before")
    @classmethod
    def _said(cls, value: object) -> object:
        # An empty host would be every address, an empty folder the one that the service was started in.
        if value == "":
            raise ValueError("is empty: leave it out, or say what it is")
        return value

    @field_validator("queue")
    @classmethod
    def _known_queue(cls, queue: str) -> str:
        if queue != MEMORY:
            check_address(queue)
        return queue

    @field_validator("models")
    @classmethod
    def _folder_of_models(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("there is no such folder")
        return path

    @field_validator("api_keys_file")
    @classmethod
    def _readable_keys(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_keys(path)
        return path

    @field_validator("safety")
    @classmethod
    def _known_check(cls, name: str | None) -> str | None:
        if name is not None:
            # Imported late: it knows of more than settings do.
            from service.safety import find_check

            find_check(name)
        return name

    @field_validator("tracing")
    @classmethod
    def _collector(cls, endpoint: str | None) -> str | None:
        endpoint = standard_collector(os.environ) if endpoint is None else endpoint
        if endpoint is not None:
            check_collector(endpoint)
        return endpoint

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, origins: str | tuple[str, ...]) -> tuple[str, ...]:
        return read_origins(origins if isinstance(origins, str) else ",".join(origins))

    @model_validator(mode="after")
    def _metrics_closed_by_keys(self) -> Self:
        if not self.open_metrics and self.api_keys_file is None:
            raise ValueError("open_metrics=false needs api_keys_file: without keys nothing can be closed")
        return self

    @model_validator(mode="after")
    def _workers_reached(self) -> Self:
        if self.role != "all" and self.queue == MEMORY:
            raise ValueError(f"role {self.role} needs a queue outside the process: set queue to the URL of a Redis")
        return self


def unknown_settings(environment: Iterable[str]) -> list[str]:
    """The names of variables that look like settings and are none, as where one is mistyped."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
