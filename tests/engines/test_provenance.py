"""What image files say of how they were made, and that it is read back as it was written."""

from __future__ import annotations

import io
import json
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from engines.bundle import Bundle
from engines.images import FORMATS, ImageError, ImageFormat, ImageLimits, encode_image
from engines.pipeline import Edit, Generate, Inpaint, Task
from engines.provenance import ImageSettings, describe_image, settings_of

PIXELS = np.zeros((16, 16, 3), dtype=np.uint8)
SECRET = "a très private prompt"
GENERATE = Generate(SECRET, 2, 1.5, 2**60)
EDIT = Edit(SECRET, 4, 0.0, 0, PIXELS, 0.75)
INPAINT = Inpaint(SECRET, 4, 0.0, 0, PIXELS, PIXELS[..., 0] == 0, 0.5)
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC_EXT = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
XMP_PLACES = {
    "png": b"iTXtXML:com.adobe.xmp\0\0\0\0\0<?xpacket",
    "jpeg": b"http://ns.adobe.com/xap/1.0/\0<?xpacket",
    "webp": b"XMP ",
}
"""Where Adobe's XMP specification, part 3, puts a packet."""


def png_that_says(text: str, key: str = "fewstep") -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("task", [GENERATE, EDIT, INPAINT], ids=lambda task: type(task).__name__)
def test_what_is_written_is_read_back(text_bundle: Bundle, image_format: ImageFormat, task: Task) -> None:
    manifest = text_bundle.manifest
    written = encode_image(PIXELS, image_format, text=describe_image(task, manifest, "full"))
    assert settings_of(written) == ImageSettings(
        model=manifest.name,
        revision=manifest.revision,
        task=type(task).__name__.lower(),
        steps=task.steps,
        guidance_scale=1 + task.guidance,
        seed=task.seed,
        strength=getattr(task, "strength", None),
        sampler=task.sampler,
        prompt=SECRET,
    )


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_prompt_is_in_no_file_that_does_not_ask_for_it(text_bundle: Bundle, image_format: ImageFormat) -> None:
    written = encode_image(PIXELS, image_format, text=describe_image(GENERATE, text_bundle.manifest))
    found = settings_of(written)
    assert found is not None
    assert found.prompt is None
    assert b"private" not in written
    bare = encode_image(PIXELS, image_format, text=describe_image(GENERATE, text_bundle.manifest, "none"))
    assert settings_of(bare) is None
    assert b"fewstep" not in bare


@pytest.mark.parametrize(
    ("task", "mark"),
    [
        (GENERATE, "trainedAlgorithmicMedia"),
        (EDIT, "compositeWithTrainedAlgorithmicMedia"),
        (INPAINT, "compositeWithTrainedAlgorithmicMedia"),
    ],
)
@pytest.mark.parametrize("image_format", FORMATS)
def test_the_mark_says_that_a_model_made_the_image(
    text_bundle: Bundle, image_format: ImageFormat, task: Task, mark: str
) -> None:
    text = describe_image(task, text_bundle.manifest)
    fields = json.loads(text["fewstep"])
    assert fields["digital_source_type"] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{mark}"
    assert fields["software"].startswith("fewstep ")
    written = encode_image(PIXELS, image_format, text=text)
    assert source_types(written) == [fields["digital_source_type"]]
    assert XMP_PLACES[image_format] in written


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_that_is_to_say_nothing_has_no_mark(text_bundle: Bundle, image_format: ImageFormat) -> None:
    bare = encode_image(PIXELS, image_format, text=describe_image(EDIT, text_bundle.manifest, "none"))
    assert bare == encode_image(PIXELS, image_format)
    assert "xmp" not in Image.open(io.BytesIO(bare)).info


def source_types(file: bytes) -> list[str | None]:
    """What the XMP packet of a file states as IPTC's DigitalSourceType."""
    packet = Image.open(io.BytesIO(file)).info["xmp"]
    found = ElementTree.fromstring(packet.decode().replace("\ufeff", "")).iterfind(
        f"{{{RDF}}}RDF/{{{RDF}}}Description/{{{IPTC_EXT}}}DigitalSourceType"
    )
    return [element.text for element in found]


GOOD: dict[str, Any] = {"model": "m", "revision": "r", "steps": 4, "guidance_scale": 3, "seed": 7}


def test_a_text_of_the_first_version_and_one_of_a_later_are_read() -> None:
    assert settings_of(png_that_says(json.dumps(GOOD))) == ImageSettings(**{**GOOD, "guidance_scale": 3.0})
    assert settings_of(png_that_says(json.dumps({**GOOD, "schedule": "new"}))) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seed 7",
        "[]",
        "[" * 100_000,
        json.dumps({**GOOD, "seed": -1}),
        json.dumps({**GOOD, "seed": 2**63}),
        json.dumps({**GOOD, "steps": "4"}),
        json.dumps({**GOOD, "sampler": "new"}),
        json.dumps({**GOOD, "guidance_scale": float("nan")}),
        json.dumps({"seed": 7}),
    ],
    ids=range(10),
)
def test_a_text_of_another_kind_says_nothing(text: str) -> None:
    assert settings_of(png_that_says(text)) is None


@pytest.mark.parametrize("description", ["a holiday", "[7]", '{"fewstep": 7}', "{"])
def test_an_exif_description_of_another_program_says_nothing(description: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = description
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "jpeg", exif=exif)
    assert settings_of(file.getvalue()) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_do_worse_than_an_image_error(noise: bytes, place: int) -> None:
    good = png_that_says(json.dumps(GOOD))
    for data in (noise, good[:place] + noise + good[place + len(noise) :]):
        try:
            found = settings_of(data)
        except ImageError:
            continue
        assert found is None or isinstance(found, ImageSettings)


def test_limits_hold() -> None:
    with pytest.raises(ImageError) as caught:
        settings_of(png_that_says(json.dumps(GOOD)), ImageLimits(max_pixels=255))
    assert caught.value.code == "too_many_pixels"
