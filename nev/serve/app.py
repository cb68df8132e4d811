"""The application: every route, behind one guard. `nev serve` runs it by uvicorn, and Ray Serve runs the same in each replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from nev.common.version import __version__
from nev.config.model_spec import ModelError
from nev.search.index import Index
from nev.serve import embeddings, search, space_map
from nev.serve.engine import Engine
from nev.serve.errors import add_error_handlers, describe_errors
from nev.serve.guard import Guard
from nev.serve.metrics import make_meters
from nev.serve.page import add_page
from nev.serve.service import Service
from nev.serve.settings import Settings


def make_app(engine: Engine, index: Index | None = None, settings: Settings | None = None) -> FastAPI:
    """Make the application.

    engine: the model. index: what `/search` looks into; None: there is no such route's answer but 404.
    Raises ModelError for an index whose vectors are of another space than the model's.
    """
    settings = settings or Settings()
    if index is not None:
        check_index(engine, index)
    meters = make_meters()
    service = Service(engine, settings, meters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running(), searcher.running():
            yield

    app = FastAPI(
        title="nev",
        version=__version__,
        summary="Texts and pictures to vectors of one space, and search.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from another host
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings, meters=meters)
    add_error_handlers(app)
    app.include_router(embeddings.make_router(service))
    maker = space_map.MapMaker()
    searcher = search.Searcher(service, index, [partial(check_index, engine), maker.forget])
    app.include_router(search.make_router(searcher, maker.place))
    app.include_router(space_map.make_router(searcher, maker))
    add_operations(app, service)
    add_page(app)
    if settings.token:
        _describe_token(app)
    return app


def check_index(engine: Engine, index: Index) -> None:
    """Raise ModelError for an index whose vectors are of another space than the model's."""
    if index.width != engine.width:
        raise ModelError(
            f"{index.store.name}: vectors of {index.width} numbers, and those of {engine.name} have {engine.width}"
        )
    pictures = index.spec.fingerprint if index.spec else None
    if pictures and engine.fingerprint and pictures != engine.fingerprint:
        raise ModelError(
            f"{index.store.name}: its pictures are of another vision encoder than that of {engine.name}, and a picture as query "
            "would mean nothing: serve the model that embedded them, or replace them (nev index --replace-images)"
        )
    recorded = index.spec.text_fingerprint if index.spec else None
    if recorded and not engine.text_fingerprint:
        raise ModelError(
            f"{engine.name}: this export does not say which text encoder it has, so that it cannot be compared with the index: "
            "export the model again"
        )
    if recorded not in (None, engine.text_fingerprint):
        raise ModelError(
            f"{index.store.name}: its vectors are of another text encoder than that of {engine.name}. Distances between them "
            "mean nothing: serve the model that the index was made with, or make an index with this one"
        )


def add_operations(app: FastAPI, service: Service) -> None:
    """Add what operators ask: health and metrics."""

    @app.get("/health", tags=["operations"], responses=describe_errors(503))
    async def health() -> dict[str, str]:
        """Whether the model works: it did within the last seconds, or it embeds a text and a picture now."""
        await service.check_health()
        return {"status": "ok"}

    @app.get(
        "/metrics",
        tags=["operations"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **describe_errors(401)},
    )
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)


def _describe_token(app: FastAPI) -> None:
    """Say in the OpenAPI document that a bearer token is needed."""

    def make_document() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = make_document  # type: ignore[method-assign]
