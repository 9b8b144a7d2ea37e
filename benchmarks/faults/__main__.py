"""The table of faults: `python -m benchmarks.faults`. Ends with an error where a request was lost or answered twice."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.arguments import known_bundle
from benchmarks.faults.crowd import Crowd, Fate, Kind, Record
from benchmarks.faults.fleet import Kit, running_fleet
from benchmarks.faults.scenarios import FAULTS, Fault, Scene
from benchmarks.requests import Requests
from benchmarks.service_load import TOLERANCE, apart
from engines.bundle import SHIPPED, find_bundle
from engines.pipeline import Pipeline

_HEADER = (
    "| fault | sent | refused | accepted | answered | failed, clear error | lost | answered twice | other image "
    "| slowest, s | of it |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the requests of one fault. Accepted are those that were not refused to the end."""

    title: str
    fates: Counter[Fate]
    twice: int
    other_image: int
    left: int
    slowest_s: float
    said: str

    @property
    def lost(self) -> int:
        return self.fates[Fate.LOST]

    @property
    def good(self) -> bool:
        """Whether no request was lost or answered twice, every image was the right one, and the queue is empty."""
        return not (self.lost or self.twice or self.other_image or self.left)

    def text(self) -> str:
        """The row in Markdown."""
        refused, answered, failed = (self.fates[fate] for fate in (Fate.REFUSED, Fate.ANSWERED, Fate.FAILED))
        sent = self.fates.total()
        counts = (sent, refused, sent - refused, answered, failed, self.lost, self.twice, self.other_image)
        return f"| {self.title} | {' | '.join(map(str, counts))} | {self.slowest_s:.1f} | {self.said} |"


async def strike(fault: Fault, kit: Kit, pipeline: Pipeline, seconds: float, rate: float, seed: int) -> Row:
    """Run the fault under load."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        async with running_fleet(kit, fault.layout, Path(folder)) as fleet, Crowd(fleet.urls) as crowd:
            scene = Scene(fleet, crowd, Requests(pipeline.manifest, rng), rng)
            striking = asyncio.create_task(_later(fault, scene, seconds / 3))
            await _drive(scene, seconds, rate, striking)
            did = await striking
            await crowd.finish()
            left = await fleet.until_queue_is_empty()
            for record in crowd.records:
                await crowd.ask_again(record, fault.forgetful)
            again = await fleet.total("worker", "fewstep_redeliveries_total")
    told = [did, f"{again} jobs made by another worker" if again else "", f"{left} left in the queue" if left else ""]
    return await asyncio.to_thread(_row, fault, pipeline, crowd.records, left, [text for text in told if text])


async def _later(fault: Fault, scene: Scene, seconds: float) -> str:
    await asyncio.sleep(seconds)
    return await fault.strike(scene)


async def _drive(scene: Scene, seconds: float, rate: float, striking: asyncio.Task[str]) -> None:
    """Poisson arrivals of all endpoints, in every way that a client may ask, at least until the fault is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or not striking.done():
        scene.crowd.send(scene.requests.task(), scene.rng.choice(list(Kind)))
        await asyncio.sleep(scene.rng.expovariate(rate))


def _row(fault: Fault, pipeline: Pipeline, records: Sequence[Record], left: int, told: list[str]) -> Row:
    fates = Counter(fate_of(record, fault.forgetful) for record in records)
    answered = [record for record in records if record.fate is Fate.ANSWERED]
    other = sum(apart(record.image, pipeline.run([record.task])[0]) > TOLERANCE for record in answered)
    codes = Counter(record.last.code for record in records if record.last is not None and record.last.code)
    if forgotten := sum(record.forgotten for record in records):
        told.append(f"{forgotten} were told that they are known no longer")
    if away := [record.away_s for record in records if record.away_s > 0]:
        told.append(f"{len(away)} were told to come back, after up to {max(away):.0f} s")
    told += [f"{count} x {code}" for code, count in sorted(codes.items())]
    twice = sum(not record.given_again for record in answered)
    slowest_s = max((record.seconds for record in answered), default=0.0)
    return Row(fault.title, fates, twice, other, left, slowest_s, "; ".join(told))


def fate_of(record: Record, forgetful: bool) -> Fate:
    """What became of it. That an accepted request is known no longer is a loss, unless Redis may forget."""
    if record.forgotten and not forgetful:
        return Fate.LOST
    return Fate.FAILED if record.fate is Fate.FORGOTTEN else record.fate


@click.command()
@click.option("--fault", "names", type=click.Choice(list(FAULTS)), multiple=True, help="Only these.")
@click.option("--seconds", default=20.0, show_default=True, help="Of load at least, for each fault.")
@click.option("--rate", default=8.0, show_default=True, help="Requests a second.")
@click.option("--seed", default=0, show_default=True)
@click.option("--bundle", default=SHIPPED, show_default=True, callback=known_bundle)
@click.option("--backend", default="ort", show_default=True)
@click.option("--tick-s", default=0.1, show_default=True, help="How much longer than it needs each tick takes.")
def main(
    names: tuple[str, ...], seconds: float, rate: float, seed: int, bundle: str, backend: str, tick_s: float
) -> None:
    """Print what became of every request while two API processes, two workers and a Redis met each fault."""
    path = find_bundle(bundle)
    kit = Kit(path, backend, tick_s)
    rows: list[Row] = []
    skipped: list[str] = []
    click.echo("\n".join(_HEADER))
    with Pipeline.open(path, backend, 1, [1]) as pipeline:
        for name in names or FAULTS:
            fault = FAULTS[name]
            if (reason := fault.missing()) is not None:
                skipped.append(f"\nNot run: {fault.title}. {reason}.")
                continue
            rows.append(asyncio.run(strike(fault, kit, pipeline, seconds, rate, seed)))
            click.echo(rows[-1].text())
    for line in skipped:
        click.echo(line)
    if bad := [row.title for row in rows if not row.good]:
        raise click.ClickException(f"not every request was answered once, and rightly: {', '.join(bad)}")


if __name__ == "__main__":
    main()
