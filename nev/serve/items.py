"""The items of a request: texts, pictures in data URLs, and pictures at http addresses."""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from nev.data.decode import BadImage
from nev.serve.errors import ApiError

DATA, BASE64 = "data:", ";base64"
WEB = ("http://", "https://")


class Item(BaseModel):
    """The base of the forms of an item. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TextItem(Item):
    """A text."""

    type: Literal["text"] = "text"
    text: str
    """The text. It is never taken for an address or a path."""


class ImageItem(Item):
    """A picture."""

    type: Literal["image"] = "image"
    image: str
    """A data URL, `data:image/jpeg;base64,...`; an http or https address where the server allows them."""


class ImageUrl(Item):
    """Where a picture is."""

    url: str
    """As `ImageItem.image`."""
    detail: Literal["auto", "low", "high"] | None = None
    """No effect: the picture is seen at the model's size."""


class ImageUrlItem(Item):
    """A picture in the form of OpenAI's messages."""

    type: Literal["image_url"]
    image_url: ImageUrl


# Names of the forms in pydantic's reports. They are no names of fields, so that no message takes them for a place.
TEXT, TEXT_ITEM, IMAGE_ITEM, URL_ITEM, LIST = "a-text", "text-item", "image-item", "url-item", "a-list"
KEYS = {"text": TEXT_ITEM, "image_url": URL_ITEM, "image": IMAGE_ITEM}
FORMS: dict[type, str] = {TextItem: TEXT_ITEM, ImageItem: IMAGE_ITEM, ImageUrlItem: URL_ITEM}
WHAT_ITEMS_ARE = (
    'an item is a text, {"text": "..."}, {"image": "data:image/jpeg;base64,..."} or '
    '{"type": "image_url", "image_url": {"url": "..."}}. '
    "Lists of tokens are not taken: send the text itself (langchain: check_embedding_ctx_length=False)"
)


def _choose_form(item: Any) -> str | None:
    """The form of an item, by its type and keys; None for what has no form."""
    if isinstance(item, str):
        return TEXT
    if isinstance(item, dict):
        return next((form for key, form in KEYS.items() if key in item), None)
    return FORMS.get(type(item))


def _is_list(given: Any) -> str | None:
    return TEXT if isinstance(given, str) else LIST if isinstance(given, list) else None


AnyItem = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[TextItem, Tag(TEXT_ITEM)]
    | Annotated[ImageItem, Tag(IMAGE_ITEM)]
    | Annotated[ImageUrlItem, Tag(URL_ITEM)],
    Discriminator(_choose_form, custom_error_type="wrong_item", custom_error_message=WHAT_ITEMS_ARE),
]
TextOrItems = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[AnyItem], Field(min_length=1), Tag(LIST)],
    Discriminator(
        _is_list, custom_error_type="wrong_input", custom_error_message="input is a text, or a list of items"
    ),
]


class Picture(str):
    """A data URL or an address of a picture. Any other str is a text."""


def list_items(given: str | list[Any]) -> list[str | Picture]:
    """The texts and pictures of a request, in order."""
    return [given] if isinstance(given, str) else [_simplify(item) for item in given]


def _simplify(item: Any) -> str | Picture:
    match item:
        case TextItem():
            return item.text
        case ImageItem():
            return Picture(item.image)
        case ImageUrlItem():
            return Picture(item.image_url.url)
    return str(item)


def is_web(address: str) -> bool:
    """Whether an address of a picture is http or https."""
    return address[:8].lower().startswith(WEB)


def decode_data_url(url: str) -> bytes:
    """The bytes of a data URL in base64. Raises BadImage for any other string."""
    head, comma, data = url.partition(",")
    if not comma or not head[: len(DATA)].lower() == DATA or not head.lower().endswith(BASE64):
        raise BadImage(
            "a picture is given as a data URL, data:image/jpeg;base64,... (or as an http address, where the server allows that)"
        )
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"the data URL is not base64: {error}") from error


def refuse_item(number: int, reason: str, code: str = "bad_item") -> ApiError:
    """The answer to a request one of whose items cannot be used. number: of the item."""
    return ApiError(422, f"input[{number}]: {reason}", f"input[{number}]", code)
