"""What an image file says of how it was made: written into every image, and read back from one."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.images import XMP, ImageLimits, read_text
from engines.manifest import Manifest, Sampler
from engines.tasks import MAX_SEED, Edit, FromImage, Inpaint, Task, Transfer

# The text chunk of a PNG; in JPEG and WebP, a name in the JSON of the EXIF description.
KEY = "fewstep"

Metadata = Literal["none", "settings", "full"]
"""How much a file says: nothing, how it was made but for the prompt (which may be private), or all of it."""

METADATA: tuple[str, ...] = get_args(Metadata)

# How the press names pictures that a model made, or made parts of: https://cv.iptc.org/newscodes/digitalsourcetype
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MADE = _SOURCE_TYPES + "trainedAlgorithmicMedia"
_REMADE = _SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
# IPTC's property DigitalSourceType in an XMP packet that is not for editing in place.
_XMP_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


class ImageSettings(BaseModel):
    """What a file says of how it was made. Anyone may have written it: every value still needs the bundle's checks."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model: str
    revision: str
    steps: int
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    task: Literal["generate", "edit", "inpaint"] | None = None
    strength: Annotated[float | None, Field(allow_inf_nan=False)] = None
    sampler: Sampler | None = None
    method: Literal["encode"] | None = None
    prompt: str | None = None
    source_prompt: str | None = None


def describe_image(task: Task, manifest: Manifest, metadata: Metadata = "settings") -> dict[str, str]:
    """The text to write into the file of an image that ``task`` made, for `encode_image`; empty for ``none``.

    Beside what it takes to make the image again it has IPTC's mark of an image that a model made: as XMP for other
    programs, and as ``digital_source_type`` among the rest. ``full`` adds the prompt, or the class.
    """
    if metadata == "none":
        return {}
    source_type = _REMADE if isinstance(task, FromImage) else _MADE
    fields: dict[str, Any] = {
        "software": f"fewstep {package_version()}",
        "digital_source_type": source_type,
        "model": manifest.name,
        "revision": manifest.revision,
        "task": "edit" if isinstance(task, Transfer) else type(task).__name__.lower(),
        "steps": task.steps,
        "sampler": task.sampler,
        "guidance_scale": 1 + task.guidance,
        "seed": task.seed,
    }
    if isinstance(task, Edit | Inpaint):
        fields["strength"] = task.strength
    if isinstance(task, Transfer):
        fields["method"] = "encode"
    if metadata == "full":
        fields["prompt"] = task.condition
        if isinstance(task, Transfer):
            fields["source_prompt"] = task.source
    return {KEY: json.dumps(fields), XMP: _XMP_PACKET.format(source_type=source_type)}


def settings_of(data: bytes, limits: ImageLimits | None = None) -> ImageSettings | None:
    """What a PNG, JPEG or WebP file says of how it was made, or None where it says nothing of the kind.

    Decodes pixels only of a PNG with no text before them, as `read_text` does. Raises ImageError for what is not an
    image or too large.
    """
    text = read_text(data, KEY, limits)
    try:
        return None if text is None else ImageSettings.model_validate_json(text)
    except ValidationError:
        return None


@cache
def package_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("fewstep")
    except PackageNotFoundError:
        return "unknown"
