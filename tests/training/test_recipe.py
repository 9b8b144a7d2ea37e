"""Recipes: those that ship are valid, and a faulty one is refused with the field's name."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError

from training.recipe import Recipe
from training.sections import DataRecipe, RecipeError

SHIPPED = sorted(Path(str(files("training") / "recipes")).glob("*.toml"))
DIGITS = (Path(str(files("training") / "recipes")) / "digits.toml").read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert Recipe.load(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "to", "named"),
    [
        ("seed = 0", "sede = 0", "sede"),
        ("warmup = 50", "warmup = 1500", "does not end within 1500"),
        ("steps = 4, updates = 300", "steps = 4, validate_every = 301, updates = 300", "never happens within 300"),
        ("steps = 4, updates", "steps = 5, updates", "a round to 5 steps cannot follow 8 steps"),
        ("steps = 4, updates = 300", "steps = 4, patience = 2, updates = 300", "patience counts validations"),
        ("start = 16", "start = 20", "a round to 8 steps cannot follow 20 steps"),
        ("start = 16", "start = 8", "a round to 8 steps cannot follow 8 steps"),
        ("guidance = [0.0, 4.0]", "guidance = [4.0, 0.0]", "guidance"),
        ("steps = [4, 2, 1]", "steps = [3]", "export.steps"),
        ('source = "digits"', 'source = "folder"', "needs a path"),
        ("steps = [4, 2, 1]", "steps = []", "export.steps"),
        ("steps = [4, 2, 1]", "steps = [4, 4]", "twice"),
        ("channels = [32, 64]", "channels = [8, 8, 8, 8, 8]", "cannot be halved"),
        ("norm_groups = 8", "norm_groups = 7", "norm_groups"),
        ("norm_groups = 8", "attention_heads = 2", "text conditioning only"),
        ('conditioning = "class"', 'conditioning = "text"', "no captions"),
        ("size = 8", 'size = 8\nautoencoder = "runs/a/autoencoder"', "takes no autoencoder"),
        ("size = 8", 'size = 8\ngroups = ["face"]', "takes no groups"),
        ("size = 8", 'size = 8\nfit = "crop"', "takes no fit"),
        ("learning_rate = 2e-3", "learning_rate = -1", "learning_rate"),
        ("learning_rate = 2e-3", "learning_rate = inf", "learning_rate"),
        ("guidance = [0.0, 4.0]", "guidance = [0.0, inf]", "guidance"),
        ("seed = 0", "seed = -1", "seed"),
        ('name = "digits"', f'name = "{"x" * 101}"', "name: .* at most 100"),
        ("channels = [32, 64]", "channels = []", "channels"),
        ("updates = 1500", "updates = true", "updates"),
        ("learning_rate = 2e-3", "learning_rate = true", "learning_rate: true and false are not accepted here"),
        ("warmup = 50", "warmup = true", "warmup: true and false"),
        ("guidance = [0.0, 4.0]", "guidance = [false, true]", "guidance: true and false"),
        ("seed = 0", "seed = true", "seed: true and false"),
        ("size = 8", "size = 8\nbackground = [300, 0, 0]", "background"),
        ("seed = 0", 'seed = 0\nprecision = "fp8"', "precision"),
        ("[teacher]", "[teacher", "Expected"),
        ("guidance = [0.0, 4.0]", "guidance = [4.0, 0.0]", "faulty.toml: guidance must be"),
    ],
)
def test_faulty_recipes_are_refused_by_name(tmp_path: Path, change: str, to: str, named: str) -> None:
    assert change in DIGITS
    path = tmp_path / "faulty.toml"
    path.write_text(DIGITS.replace(change, to, 1))
    with pytest.raises(RecipeError, match=named) as refused:
        Recipe.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "to", "named"),
    [("max_tokens = 32", "max_tokens = 600", "max_tokens"), ("attention_heads = 4", "attention_heads = 7", "heads")],
)
def test_faults_of_text_recipes_are_named(tmp_path: Path, change: str, to: str, named: str) -> None:
    emoji = next(path for path in SHIPPED if path.stem == "emoji").read_text()
    assert change in emoji
    (tmp_path / "faulty.toml").write_text(emoji.replace(change, to, 1))
    with pytest.raises(RecipeError, match=named):
        Recipe.load(tmp_path / "faulty.toml")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ('weighting = "uniform"', "'uniform' teaches an encoder nothing of its first step"),
        ('weighting = "clamped-snr"', "'clamped-snr' teaches an encoder nothing of its first step"),
        ("stochastic = true", "stochastic"),
    ],
)
def test_what_an_encoder_cannot_learn_with_is_refused(tmp_path: Path, setting: str, named: str) -> None:
    head, encoder = DIGITS.split("[encoder]")
    (tmp_path / "faulty.toml").write_text(f"{head}[encoder]{encoder.replace('updates', f'{setting}, updates', 1)}")
    with pytest.raises(RecipeError, match=f"encoder.*{named}"):
        Recipe.load(tmp_path / "faulty.toml")


@pytest.mark.parametrize(
    ("teacher", "stage1", "encoder", "named"),
    [
        ("clamped-snr", "clamped-snr", "", None),
        ("uniform", "uniform", "", None),
        (
            "snr-plus-one",
            "clamped-snr",
            "",
            "teacher.weighting 'snr-plus-one' grows .*choose one of clamped-snr, uniform",
        ),
        ("clamped-snr", "truncated-snr", "", "stage1.weighting 'truncated-snr' grows without bound"),
        ("clamped-snr", "clamped-snr", "keep", "an encoder .* predict v"),
    ],
)
def test_networks_that_predict_x_have_weights_that_are_bounded_and_no_encoder(
    tmp_path: Path, teacher: str, stage1: str, encoder: str, named: str | None
) -> None:
    text = DIGITS if encoder else DIGITS[: DIGITS.index("[encoder]")] + DIGITS[DIGITS.index("[export]") :]
    settings = {
        "network": 'prediction = "x"',
        "teacher": f'weighting = "{teacher}"',
        "stage1": f'weighting = "{stage1}"',
    }
    for section, setting in settings.items():
        text = text.replace(f"[{section}]", f"[{section}]\n{setting}", 1)
    (tmp_path / "x.toml").write_text(text)
    if named is None:
        assert Recipe.load(tmp_path / "x.toml").network.prediction == "x"  # type: ignore[union-attr]
        return
    with pytest.raises(RecipeError, match=named):
        Recipe.load(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("precision", "also", "named"),
    [
        ("fp32", "micro_batch = 4", "without micro_batch"),
        ("fp32", "compile = true", "and compile"),
        ("bf16", "", "with precision fp32"),
    ],
)
def test_what_is_captured_is_small_and_alone(tmp_path: Path, precision: str, also: str, named: str) -> None:
    text = next(path for path in SHIPPED if path.stem == "mnist").read_text()
    faulty = f'precision = "{precision}"\n{text}\n[scale]\ncapture = true\n{also}\n'
    (tmp_path / "captured.toml").write_text(faulty)
    with pytest.raises(RecipeError, match=named):
        Recipe.load(tmp_path / "captured.toml")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("null_class = 0", "null_class is of classes"),
        ('unconditional_revision = "main"', "unconditional_revision goes with unconditional"),
        ('unconditional_variant = "fp16"', "unconditional_variant goes with unconditional"),
    ],
)
def test_what_a_teacher_of_text_would_not_heed_is_refused(tmp_path: Path, setting: str, named: str) -> None:
    text = next(path for path in SHIPPED if path.stem == "stable-diffusion").read_text()
    (tmp_path / "faulty.toml").write_text(text.replace("[teacher]", f"[teacher]\n{setting}"))
    with pytest.raises(RecipeError, match=named):
        Recipe.load(tmp_path / "faulty.toml")


@pytest.mark.parametrize("classes", [("cat", "cat"), ("cat", "")])
def test_classes_of_a_stream_have_names_each_its_own(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="classes have names, each its own"):
        DataRecipe(source="stream", address="shards", size=32, classes=classes)


def test_a_missing_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="absent"):
        Recipe.load(tmp_path / "absent.toml")


def test_where_the_data_lies_is_not_part_of_what_a_run_is() -> None:
    recipe = Recipe.load(next(path for path in SHIPPED if path.stem == "emoji"))
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": Path("elsewhere")})})
    assert moved.portable_json() == recipe.portable_json()
    assert "elsewhere" not in moved.portable_json()


def test_a_record_may_be_older_than_a_setting_that_has_its_default() -> None:
    recipe = Recipe.load(next(path for path in SHIPPED if path.stem == "mnist"))
    record = json.loads(recipe.portable_json())
    assert recipe.differences(record) == []
    del record["teacher"]["spike"], record["stage2"]["rounds"][0]["patience"], record["scale"]
    assert recipe.differences(record) == ["scale"], "compile is not its default"
    del record["network"]["norm_groups"], record["stage2"]["rounds"][0]["steps"]
    record["stage1"]["gone"] = 1
    assert recipe.differences(record) == ["network", "scale", "stage1", "stage2"]
    record = json.loads(recipe.portable_json())
    record["stage2"]["rounds"].pop()
    record["seed"] = 1
    assert recipe.differences(record) == ["seed", "stage2"]


def test_digits_lie_in_no_folder() -> None:
    with pytest.raises(RecipeError, match="no folder"):
        Recipe.load(next(path for path in SHIPPED if path.stem == "digits")).data.at(Path("mine"))
