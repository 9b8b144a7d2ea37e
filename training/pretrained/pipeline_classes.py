"""The classes that a pipeline's network knows: how many, by which names, and which of them stands for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from training.pretrained.pipeline_faults import TeacherError


@dataclass(frozen=True)
class TeacherClasses:
    """The classes of the pipeline in `folder`: `count` with the null class, 0 for none, named by `id2label` or not."""

    folder: Path
    count: int
    id2label: Mapping[str, str]

    @property
    def unknown(self) -> list[int]:
        """Numbers that `id2label` names and the network does not know."""
        return [number for numbers in self._numbers.values() for number in numbers if not self._is_class(number)]

    def null(self, wanted: int | None) -> int:
        """The class that stands for none: the one `wanted`, by default the last. Raises TeacherError if none is it."""
        if not self.count:
            raise TeacherError(f"{self.folder} knows no classes")
        if wanted is not None and not self._is_class(wanted):
            raise TeacherError(f"{self.folder} has {self.count} classes: {wanted} is none of them")
        return self.count - 1 if wanted is None else wanted

    def numbers(self, names: Sequence[str]) -> Tensor:
        """The number (K,) of each of K classes.

        That is what `id2label` says if there is one, else the number that is the class's name, else, where no name is a
        number, its place among the names if there are as many as the teacher has classes. Raises TeacherError for what
        is none of these.
        """
        numbers = [self._number(name) for name in names]
        if None not in numbers:
            return torch.tensor(numbers)
        if known := [name for name, number in zip(names, numbers, strict=True) if number is not None]:
            raise TeacherError(
                f"{self.folder}: the images' class {known[0]!r} is a number of the teacher's, and "
                f"{names[numbers.index(None)]!r} is none: name all of them by the teacher's numbers"
            )
        if len(names) not in (self.count, self.count - 1):
            raise TeacherError(
                f"{self.folder} has {self.count} classes, the images have {len(names)}: name the classes "
                "of the images by the teacher's numbers"
            )
        return torch.arange(len(names))

    def _is_class(self, number: int) -> bool:
        return 0 <= number < self.count

    @cached_property
    def _numbers(self) -> dict[str, set[int]]:
        """The classes that a name of `id2label` may mean: it has several for some, divided by commas."""
        known: dict[str, set[int]] = {}
        for number, names in self.id2label.items():
            for name in {names, *names.split(",")}:
                known.setdefault(name.strip(), set()).add(int(number))
        return known

    def _number(self, name: str) -> int | None:
        """The number of a class that is named; None for a name that says nothing where there is no `id2label`."""
        meant = self._numbers.get(name, set())
        if len(meant) > 1:
            raise TeacherError(
                f"{self.folder}: {name!r} may be any of the classes {', '.join(map(str, sorted(meant)))}: name it by "
                "its number"
            )
        if meant:
            return next(iter(meant))
        if name.isdecimal() and self._is_class(int(name)):
            return int(name)
        if self._numbers or name.isdecimal():
            raise TeacherError(f"{self.folder} has no class {name!r}")
        return None
