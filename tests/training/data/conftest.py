"""Tiny npm packages, made here, that look like those of the emoji set."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from training.data.packages import DrawingPackage, Package

COLOURS = ("#e00000", "#00a000", "#0000e0", "#c0c000")
# hexcode, label, tags, group; group 9 is flags.
CONCEPTS = (
    ("1F34E", "red apple", ("fruit", "red"), 4),
    ("1F436", "dog face", ("dog", "pet", "animal", "puppy"), 3),
    ("2764-FE0F", "red heart", ("love",), 0),
    ("1F697", "automobile", (), 5),
    ("1F1EB-1F1F7", "flag: France", ("FR",), 9),
)
GROUPS = {
    "0": "smileys-emotion",
    "3": "animals-nature",
    "4": "food-drink",
    "5": "travel-places",
    "9": "flags",
}
WORDS = Package("words", "1.0.0", "MIT", "Someone", "https://example.org/words")


def tarball(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes an npm tarball: everything below `package/`."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def svg_body(style: int, concept: int) -> str:
    """A drawing that differs between styles and between concepts."""
    colour = COLOURS[concept % len(COLOURS)]
    if style % 2:
        return f'<circle cx="{4 + style}" cy="8" r="{3 + concept}" fill="{colour}"/>'
    return f'<rect x="{style}" y="{1 + concept}" width="8" height="{2 + 2 * style}" fill="{colour}"/>'


def iconify(icons: Mapping[str, object], chars: Mapping[str, str], aliases: object = None) -> dict[str, bytes]:
    """Files of an Iconify package."""
    table = {"prefix": "x", "icons": icons, "width": 16, "height": 16, "aliases": aliases or {}}
    return {"icons.json": json.dumps(table).encode(), "chars.json": json.dumps(chars).encode()}


def slug(label: str) -> str:
    """Icon name of a label of CONCEPTS."""
    return label.replace(":", "").replace(" ", "-").lower()


@pytest.fixture(scope="session")
def write_tarball() -> Callable[[Path, Mapping[str, bytes]], None]:
    return tarball


@pytest.fixture(scope="session")
def iconify_files() -> Callable[..., dict[str, bytes]]:
    return iconify


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package, tuple[DrawingPackage, ...]]:
    """A folder of tarballs: words, three Iconify packages (the last without chars.json), one of files."""
    folder = tmp_path_factory.mktemp("npm")
    words = [
        {"hexcode": code, "label": label, "tags": list(tags), "group": group, "subgroup": 0, "order": order}
        for order, (code, label, tags, group) in enumerate(CONCEPTS)
    ]
    words.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    meta = {"groups": GROUPS, "subgroups": {"0": "some"}}
    tarball(
        folder / WORDS.tarball,
        {"en/data.json": json.dumps(words).encode(), "meta/groups.json": json.dumps(meta).encode()},
    )
    sources = []
    for style, name in enumerate(("plain", "round", "nameless")):
        icons = {slug(label): {"body": svg_body(style, i)} for i, (_, label, _, _) in enumerate(CONCEPTS)}
        chars = {code.lower().replace("-fe0f", ""): slug(label) for code, label, _, _ in CONCEPTS}
        aliases = {}
        if name == "nameless":
            chars = {}
            icons["car"] = icons.pop("automobile")
            aliases = {"automobile": {"parent": "car"}}
        source = DrawingPackage(
            f"@set/{name}", "1.0.0", "MIT", "Someone", "https://example.org", style=name, family=name
        )
        tarball(folder / source.tarball, iconify(icons, chars, aliases))
        sources.append(source)
    files = {}
    for i, (code, *_) in enumerate(CONCEPTS):
        buffer = io.BytesIO()
        picture = Image.new("RGBA", (32, 32))
        picture.paste((40 * i, 90, 200, 255), (8, 8, 20 + i, 28))
        picture.save(buffer, "WEBP", lossless=True)
        files[f"assets/{code.lower()}.webp"] = buffer.getvalue()
    files["assets/1f697.webp"] = b"RIFF broken"
    solid = DrawingPackage(
        "@set/solid",
        "2.0.0",
        "CC-BY-4.0",
        "Someone",
        "https://example.org",
        style="solid 3d",
        family="round",
        layout="files",
    )
    tarball(folder / solid.tarball, files)
    return folder, WORDS, (*sources, solid)
