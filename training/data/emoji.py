"""The captioned emoji set: permissive npm packages rasterised into an imagefolder with a held-out split."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.captions import icon_captions
from training.data.folder import SplitWriter, building, write_description
from training.data.holdout import Item, choose_heldout, thumbnail
from training.data.packages import (
    Drawing,
    DrawingPackage,
    IconSet,
    Package,
    PackageError,
    default_cache,
    fetch,
    file_drawings,
    iconify_drawings,
    kebab,
    plain_hexcode,
    rasterise,
    read_json,
)

WORDS = Package(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "Miles Johnson",
    "https://github.com/milesj/emojibase",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)

NOTO_URL = "https://github.com/googlefonts/noto-emoji"

DRAWINGS = (
    DrawingPackage(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Google Inc",
        NOTO_URL,
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        style="noto",
        family="noto",
    ),
    DrawingPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        style="twemoji",
        family="twemoji",
    ),
    DrawingPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        style="fluent flat",
        family="fluent",
    ),
    DrawingPackage(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Microsoft Corporation; packaged by LobeHub",
        "https://github.com/lobehub/fluent-emoji",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        style="fluent 3d",
        family="fluent",
        layout="files",
    ),
    DrawingPackage(
        "@iconify-json/noto-v1",
        "1.2.5",
        "Apache-2.0",
        "Google Inc",
        NOTO_URL,
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        style="noto classic",
        family="noto classic",
    ),
    DrawingPackage(
        "@iconify-json/emojione",
        "1.2.3",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        style="emojione",
        family="emojione",
    ),
)

LEFT_OUT_GROUPS = ("component", "flags")
HELDOUT_FRACTION = 0.05


@dataclass(frozen=True)
class Concept:
    """What an emoji shows, in words."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def read_concepts(tarball: Path) -> list[Concept]:
    """Concepts of emojibase in their usual order, without flags, skin tones and bare letters."""
    entries, names = read_json(tarball, "en/data.json", "meta/groups.json")
    groups, subgroups = names["groups"], names["subgroups"]
    concepts = [
        (
            entry["order"],
            Concept(
                entry["hexcode"],
                _typed(entry["label"]),
                tuple(_typed(tag) for tag in entry.get("tags", ())),
                groups[str(entry["group"])],
                subgroups[str(entry["subgroup"])],
            ),
        )
        for entry in entries
        if "group" in entry and groups[str(entry["group"])] not in LEFT_OUT_GROUPS
    ]
    return [concept for _, concept in sorted(concepts, key=lambda pair: pair[0])]


def _typed(words: str) -> str:
    """Words as people type them: straight quotes."""
    return words.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')


def build(
    out: Path,
    size: int = 64,
    seed: int = 0,
    packages: Path | None = None,
    overwrite: bool = False,
    words: Package = WORDS,
    drawings: Sequence[DrawingPackage] = DRAWINGS,
) -> Mapping[str, Any]:
    """Builds the set at `out` and returns what dataset.json says.

    Args:
        out: the folder to write; it appears only when it is whole.
        size: side of the square images in pixels.
        seed: decides dropped tags and the held-out pairs. The same arguments give the same bytes.
        packages: folder of tarballs already fetched with `npm pack`; without it they are fetched and cached.
        overwrite: replace `out` when it exists.
        words: package of labels, tags and groups.
        drawings: packages of drawings, one style each.

    Raises:
        PackageError: a package cannot be had or read, or gives no drawing.
        OutputExistsError: `out` exists.
    """
    with building(out, overwrite) as root:
        folder, offline = (packages, True) if packages else (default_cache(), False)
        concepts = read_concepts(fetch(words, folder, offline))
        paths = {source.style: fetch(source, folder, offline) for source in drawings}
        by_style = _read_drawings(drawings, paths, concepts)
        plan = [
            (concept, source)
            for concept in concepts
            for source in drawings
            if plain_hexcode(concept.hexcode) in by_style[source.style]
        ]
        images, failures = _rasterise_all(plan, by_style, size)
        plan = [pair for pair in plan if pair in images]
        items = [Item(concept.hexcode, source.family) for concept, source in plan]
        thumbnails = np.stack([thumbnail(images[pair]) for pair in plan])
        heldout = choose_heldout(items, thumbnails, HELDOUT_FRACTION, seed)
        splits = {
            "train": [pair for i, pair in enumerate(plan) if i not in heldout],
            "heldout": [pair for i, pair in enumerate(plan) if i in heldout],
        }
        for split, pairs in splits.items():
            _write_split(root, split, pairs, images, seed)
        description = _describe(size, seed, words, drawings, splits, failures)
        write_description(root, "Captioned emoji", tuple(splits), description)
    return description


Pair = tuple[Concept, DrawingPackage]


def _read_drawings(
    drawings: Sequence[DrawingPackage], paths: Mapping[str, Path], concepts: Sequence[Concept]
) -> dict[str, dict[str, Drawing]]:
    icon_sets = {s.style: IconSet.read(paths[s.style]) for s in drawings if s.layout == "iconify"}
    names: dict[str, str] = {}
    for icon_set in icon_sets.values():
        for name, code in icon_set.names().items():
            names.setdefault(name, code)
    for concept in concepts:
        names.setdefault(kebab(concept.label), plain_hexcode(concept.hexcode))
    found = {}
    for source in drawings:
        if source.layout == "iconify":
            found[source.style] = iconify_drawings(icon_sets[source.style], names)
        else:
            found[source.style] = file_drawings(paths[source.style])
        if not found[source.style]:
            raise PackageError(f"{source.name} {source.version} has no drawing that could be matched to a concept")
    return found


def _rasterise_all(
    plan: Sequence[Pair], by_style: Mapping[str, Mapping[str, Drawing]], size: int
) -> tuple[dict[Pair, Image.Image], list[str]]:
    images: dict[Pair, Image.Image] = {}
    failures: list[str] = []
    for concept, source in tqdm(plan, desc="drawing", unit="image", disable=None):
        try:
            image = rasterise(by_style[source.style][plain_hexcode(concept.hexcode)], size)
        except (ValueError, OSError) as error:
            failures.append(f"{source.style} {concept.hexcode}: {error}")
            continue
        if image.getchannel("A").getbbox() is None:
            failures.append(f"{source.style} {concept.hexcode}: the drawing is empty")
            continue
        images[concept, source] = image
    return images, failures


def _write_split(root: Path, split: str, pairs: Sequence[Pair], images: Mapping[Pair, Image.Image], seed: int) -> None:
    writer = SplitWriter(root, split)
    for concept, source in tqdm(pairs, desc=f"writing {split}", unit="image", disable=None):
        rng = random.Random(f"{seed}:{concept.hexcode}:{source.style}")
        writer.write(
            f"{kebab(source.style)}-{concept.hexcode.lower()}.png",
            images[concept, source],
            {
                "texts": icon_captions(source.style, concept.label, concept.tags, rng),
                "concept": concept.hexcode,
                "label": concept.label,
                "style": source.style,
                "group": concept.group,
                "subgroup": concept.subgroup,
                "licence": source.licence,
                "source": f"{source.name}@{source.version}",
            },
        )
    writer.close()


def _describe(
    size: int,
    seed: int,
    words: Package,
    drawings: Sequence[DrawingPackage],
    splits: Mapping[str, Sequence[Pair]],
    failures: Sequence[str],
) -> dict[str, Any]:
    everything = [pair for pairs in splits.values() for pair in pairs]

    def source(package: Package) -> dict[str, str]:
        style = {"style": package.style} if isinstance(package, DrawingPackage) else {}
        keys = ("name", "version", "licence", "author", "url", "sha256")
        return style | {key: getattr(package, key) for key in keys}

    return {
        "name": "emoji",
        "size": size,
        "seed": seed,
        "sources": [source(package) for package in (*drawings, words)],
        "counts": {split: len(pairs) for split, pairs in splits.items()},
        "concepts": len({concept.hexcode for concept, _ in everything}),
        "styles": dict(Counter(package.style for _, package in everything)),
        "groups": dict(Counter(concept.group for concept, _ in everything)),
        "failures": list(failures),
    }
