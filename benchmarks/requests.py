"""Requests at random, each as a task for a pipeline and as a body for the API. Each has a prompt that no other has."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.manifest import Manifest
from engines.pipeline import Edit, Generate, Inpaint, Task

Pixels = NDArray[np.uint8]

NOUNS = ("apple", "cat", "house", "car", "tree", "star", "fish", "cup")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@dataclass
class Requests:
    """Endpoints, students, guidance and images at random, for the bundle of a manifest."""

    manifest: Manifest
    rng: random.Random
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def tasks(self, count: int, steps: int | None = None) -> list[Task]:
        return [self.task(steps) for _ in range(count)]

    def mixture(self, count: int) -> list[Task]:
        """As many of each student, one after the other."""
        students = [student.steps for student in self.manifest.students]
        return [task for steps in students for task in self.tasks(count // len(students), steps)]

    def task(self, steps: int | None = None) -> Task:
        rng, guidance = self.rng, self.manifest.guidance
        prompt = f"a {rng.choice(COLOURS)} {rng.choice(NOUNS)} {next(self.numbers)}"
        steps = steps or rng.choice([student.steps for student in self.manifest.students])
        # guidance_scale is 1 + w: two decimals of either come back exactly enough.
        w = round(rng.uniform(guidance.minimum, guidance.maximum), 2)
        generate = Generate(prompt, steps, w, rng.randrange(2**32))
        kind = rng.choice((Generate, Edit, Inpaint))
        if kind is Generate:
            return generate
        _, height, width = self.manifest.image_shape
        image = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
        shared = (prompt, steps, w, generate.seed, image)
        if kind is Edit:
            return Edit(*shared, 0.5 if steps > 1 else 1.0)
        repaint = np.zeros((height, width), bool)
        repaint[: height // 2] = True
        return Inpaint(*shared, repaint, 1.0)


def endpoint(task: Task) -> str:
    return f"/{type(task).__name__.lower()}"


def body(task: Task, **more: Any) -> bytes:
    return json.dumps(fields_of(task) | more).encode()


def fields_of(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": task.condition, "steps": task.steps, "seed": task.seed}
    fields["guidance_scale"] = 1 + task.guidance
    if isinstance(task, Edit | Inpaint):
        fields |= {"image": base64_png(task.image), "strength": task.strength}
    if isinstance(task, Inpaint):
        fields["mask"] = base64_png(task.repaint.astype(np.uint8) * 255)
    return fields


def base64_png(array: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def picture(answer: bytes) -> Pixels:
    """The first image of an answer."""
    return first_image(json.loads(answer))


def first_image(document: Mapping[str, Any]) -> Pixels:
    """The first image of an answer in JSON."""
    data = base64.b64decode(document["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
