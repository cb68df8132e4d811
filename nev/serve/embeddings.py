"""`POST /v1/embeddings` and its siblings, in OpenAI's form."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Body, Form, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from nev.ops.vectors import Floats, truncate
from nev.serve.errors import ApiError, describe_errors
from nev.serve.items import TextOrItems, list_items
from nev.serve.service import Embedded, Service, until_gone
from nev.serve.strict_json import StrictRoute

Encoding = Literal["float", "base64"]
Dimensions = Annotated[int, Field(ge=1)]
EXAMPLES = {
    "text": {"value": {"input": "a red circle"}},
    "mixed": {"value": {"input": ["a red circle", {"image": "data:image/png;base64,iVBORw0KGgo="}]}},
}


class Question(BaseModel):
    """What is to be embedded."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    input: TextOrItems
    """A text, or a list of texts and pictures, each of which gets one vector. A plain string is always a text."""
    model: str | None = None
    """Name of the model. null: the one that is served."""
    dimensions: Dimensions | None = None
    """Numbers of a vector: the first so many, scaled to unit length (Matryoshka). null: all."""
    encoding_format: Encoding | None = None
    """`float`: a list of numbers. `base64`: float32, little-endian. null: `float`."""
    input_type: Literal["query", "document"] | None = None
    """How texts are embedded, by encoders that tell queries from documents. null: `query`."""
    user: str | None = None
    """No effect."""


class Embedding(BaseModel):
    """The vector of an item."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """What a request took. truncated_texts: texts whose end was left out, since the encoder takes no more tokens."""

    prompt_tokens: int
    total_tokens: int
    truncated_texts: int


class EmbeddingList(BaseModel):
    """The vectors of a request, in the order of its items."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


def make_router(service: Service) -> APIRouter:
    """The routes under `/v1`."""
    router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=StrictRoute)
    started = int(time.time())
    errors = describe_errors(400, 401, 404, 413, 422, 429, 500, 503)

    @router.post("/embeddings", response_model=EmbeddingList, responses=errors)
    async def embed(request: Request, question: Annotated[Question, Body(openapi_examples=EXAMPLES)]) -> Any:
        """Embed texts and pictures, mixed, one vector an item, in order."""
        check(question.model, question.dimensions)
        items = list_items(question.input)
        embedded = await until_gone(request, service.embed(items, question.input_type or "query"))
        return answer(embedded, question.dimensions, question.encoding_format)

    @router.post("/embeddings/images", response_model=EmbeddingList, responses=errors)
    async def embed_files(
        request: Request,
        image: list[UploadFile],
        model: Annotated[str | None, Form()] = None,
        dimensions: Annotated[Dimensions | None, Form()] = None,
        encoding_format: Annotated[Encoding | None, Form()] = None,
    ) -> Any:
        """Embed files of pictures: multipart fields named `image`, in order."""
        check(model, dimensions)
        items = [await file.read() for file in image]
        return answer(await until_gone(request, service.embed(items)), dimensions, encoding_format)

    @router.get("/models", response_model=ModelList, responses=describe_errors(401))
    async def list_models() -> Any:
        """The one model that is served."""
        card = ModelCard(id=service.name, object="model", created=started, owned_by="nev")
        return ModelList(object="list", data=[card])

    def check(model: str | None, dimensions: int | None) -> None:
        if model not in (None, service.name):
            raise ApiError(
                404, f"model {model!r} is not here: this server has {service.name!r}", "model", "model_not_found"
            )
        if dimensions and dimensions > service.engine.width:
            raise ApiError(
                422, f"dimensions: the model's vectors have {service.engine.width} numbers", "dimensions", "too_many"
            )

    def answer(embedded: Embedded, dimensions: int | None, encoding: Encoding | None) -> Response:
        rows = truncate(embedded.vectors, dimensions) if dimensions else embedded.vectors
        usage = Usage(prompt_tokens=embedded.tokens, total_tokens=embedded.tokens, truncated_texts=embedded.cut)
        return Response(write_answer(rows, service.name, usage, encoding == "base64"), media_type="application/json")

    return router


def write_answer(rows: Floats, model: str, usage: Usage, as_base64: bool) -> bytes:
    """An `EmbeddingList` as JSON. rows: float32 [n, D].

    Written by hand: a model of pydantic would check every number by itself.
    """
    little = rows.astype("<f4", copy=False)
    parts = [
        b'{"object":"embedding","index":%d,"embedding":%s}'
        % (number, b'"%s"' % base64.b64encode(row.tobytes()) if as_base64 else to_json(row.tolist()))
        for number, row in enumerate(np.ascontiguousarray(little))
    ]
    head = b'{"object":"list","model":%s,"usage":%s,"data":[' % (to_json(model), usage.model_dump_json().encode())
    return head + b",".join(parts) + b"]}"
