"""What this service does in OpenAI's words: their bodies and answers, and how those become ours.

A field of theirs is here only where it can be honoured, or where it asks for nothing; every other is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from engines.images import ImageFormat, MaskMode
from engines.manifest import Sampler
from engines.masks import MAX_BLUR_PX, MAX_GROW_PX
from engines.provenance import Metadata
from service.errors import ApiError
from service.schemas import (
    MAX_SEED,
    Asked,
    Body,
    EditMethod,
    EditRequest,
    Finite,
    GenerateRequest,
    InpaintRequest,
    Picture,
    PriorityName,
)

# Their names, where an error would name a field that a client of theirs never sent.
PARAMS = {"width": "size", "height": "size", "quality": "output_compression"}

_MASK_OPTIONS = ("mask_mode", "grow_mask", "mask_blur")
_EDIT_OPTIONS = ("method", "source_prompt", "source_class")


@dataclass(frozen=True)
class _Only:
    """In an annotation: takes null and the values ``allowed``; any other is refused with the reason ``otherwise``."""

    allowed: tuple[str | int, ...]
    otherwise: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": [*self.allowed, None]}

    def _check(self, value: str | int | None) -> str | int | None:
        if value is None or value in self.allowed:
            return value
        raise PydanticCustomError("unsupported_option", "{reason}", {"reason": self.otherwise})


class ImagesGenerateBody(Asked):
    """OpenAI's request for images from text, with options of /generate beside.

    A class bundle takes a ``class`` in place of the prompt, which is then absent or empty.
    """

    prompt: Annotated[str | None, Field(description="What to show.", examples=["a red apple"])] = None
    class_name: Annotated[str | None, Field(alias="class", description="As in /generate.")] = None
    model: Annotated[str | None, Field(description="An id of /v1/models; the default one when absent.")] = None
    n: Annotated[int | None, Field(ge=1, description="How many images; 1 when absent.")] = None
    size: Annotated[
        str | None,
        Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="auto, or the bundle's own, such as 32x32."),
    ] = None
    output_format: Annotated[ImageFormat | None, Field(description="png when absent.")] = None
    output_compression: Annotated[
        int | None, Field(ge=1, le=100, description="The quality of jpeg and webp; png has none.")
    ] = None
    response_format: Annotated[
        str | None,
        _Only(("b64_json",), "images come as b64_json; none is kept under a URL"),
        Field(description="b64_json, which it is anyhow.", examples=["b64_json"]),
    ] = None
    quality: Annotated[
        str | None,
        _Only(("auto", "standard"), "a bundle has one quality for each number of steps: set steps"),
        Field(description="auto or standard, which change nothing.", examples=["auto"]),
    ] = None
    background: Annotated[
        str | None,
        _Only(("auto", "opaque"), "images are opaque"),
        Field(description="auto or opaque, as images always are.", examples=["auto"]),
    ] = None
    moderation: Annotated[
        str | None,
        _Only(("auto",), "there are no levels of moderation"),
        Field(description="auto, which leaves it to the service.", examples=["auto"]),
    ] = None
    stream: Annotated[
        bool | None, _Only((False,), "images are not streamed"), Field(description="false.", examples=[False])
    ] = None
    partial_images: Annotated[
        int | None, _Only((0,), "images are not streamed"), Field(description="0.", examples=[0])
    ] = None
    user: Annotated[str | None, Field(description="Means nothing here, and is not kept.")] = None
    safety_identifier: Annotated[str | None, Field(description="Means nothing here, and is not kept.")] = None

    steps: Annotated[int | None, Field(description="As in /generate.", examples=[4])] = None
    guidance_scale: Annotated[Finite | None, Field(description="As in /generate.", examples=[3.0])] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="As in /generate.", examples=[7])] = None
    sampler: Annotated[Sampler | None, Field(description="As in /generate.")] = None
    priority: Annotated[PriorityName, Field(description="As in /generate.")] = "normal"
    timeout_ms: Annotated[int | None, Field(ge=1, description="As in /generate.")] = None
    metadata: Annotated[Metadata, Field(description="As in /generate.")] = "settings"

    def request(self) -> GenerateRequest:
        """The same in our words."""
        return self._as(GenerateRequest)

    def _as(self, model: type[GenerateRequest]) -> GenerateRequest:
        shared = (model.model_fields.keys() & type(self).model_fields.keys()) - {"n", "quality", "response_format"}
        fields = {model.model_fields[name].alias or name: getattr(self, name) for name in shared}
        is_elsewhere = self.class_name is not None or getattr(self, "reuse", False)
        if is_elsewhere and self.prompt == "":  # their client always sends one
            fields["prompt"] = None
        if self.size not in (None, "auto"):
            fields["width"], fields["height"] = map(int, str(self.size).split("x"))
        return model(
            **fields, n=1 if self.n is None else self.n, quality=self.output_compression, response_format="b64_json"
        )


class ImagesEditBody(ImagesGenerateBody):
    """OpenAI's request for an edit, or for an inpainting where there is a mask, with our options of those beside."""

    image: Annotated[Picture, Field(description="One image, as in /edit; in multipart also as image[].")]
    mask: Annotated[
        Picture | None, Field(description="Of the image's size; what is wholly transparent is repainted.")
    ] = None
    strength: Annotated[Finite | None, Field(gt=0, le=1, description="As in /edit and /inpaint.")] = None
    reuse: Annotated[bool, Field(description="As in /edit.")] = False
    mask_mode: Annotated[MaskMode, Field(description="As in /inpaint, but alpha when absent.")] = "alpha"
    grow_mask: Annotated[int, Field(ge=-MAX_GROW_PX, le=MAX_GROW_PX, description="As in /inpaint.")] = 0
    mask_blur: Annotated[Finite, Field(ge=0, le=MAX_BLUR_PX, description="As in /inpaint.")] = 0.0
    method: Annotated[EditMethod | None, Field(description="As in /edit.")] = None
    source_prompt: Annotated[str | None, Field(description="As in /edit.")] = None
    source_class: Annotated[str | None, Field(description="As in /edit.")] = None

    def request(self) -> GenerateRequest:
        """The same in our words. Raises ApiError for options of a mask where there is none, and the other way."""
        if self.mask is not None:
            for option in _EDIT_OPTIONS:
                if option in self.model_fields_set:
                    raise ApiError(422, "unsupported_option", f"{option} is of edits without a mask", param=option)
            return self._as(InpaintRequest)
        for option in _MASK_OPTIONS:
            if option in self.model_fields_set:
                raise ApiError(422, "missing_field", f"{option} needs a mask", param="mask")
        return self._as(EditRequest)


class ImageData(Body):
    """One image. ``seed`` is ours."""

    b64_json: str
    seed: int


class ImagesAnswer(Body):
    """OpenAI's answer to both."""

    created: Annotated[int, Field(description="Unix time in seconds.")]
    data: tuple[ImageData, ...]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: Annotated[str, Field(examples=["32x32"])]


class ModelCard(Body):
    """A bundle that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="Unix time in seconds of the day its manifest names; 0 if it has none.")]
    owned_by: str


class ModelCards(Body):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]
