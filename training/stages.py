"""The stages of a run, by name: each is a subfolder of the run's."""

from __future__ import annotations

AUTOENCODER, TEACHER, STAGE1 = "autoencoder", "teacher", "stage1"
_STUDENT, _ENCODER = "student-", "encoder-"


def student_stage(steps: int) -> str:
    """The name of the stage that makes the student of so many steps."""
    return f"{_STUDENT}{steps}"


def encoder_stage(steps: int) -> str:
    """The name of the stage that makes the encoder of so many steps."""
    return f"{_ENCODER}{steps}"


def steps_of_student(stage: str) -> int | None:
    """The steps of the student that a stage makes; None for another stage."""
    return int(stage.removeprefix(_STUDENT)) if stage.startswith(_STUDENT) else None
