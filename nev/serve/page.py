"""The routes of the page: one HTML, one script, one style sheet, as they lie in `nev/serve/page/`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.applications import Starlette

FOLDER = Path(__file__).with_name("page")
# Address, file, media type. The page names its files by relative addresses, so that it works behind a prefix, too.
FILES = (
    ("/", "index.html", "text/html"),
    ("/static/app.js", "app.js", "text/javascript"),
    ("/static/style.css", "style.css", "text/css"),
)
HEADERS = {
    # Texts of an index are anyone's texts: nothing but the page's own files runs, and nothing leaves for another host.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # an address of the page holds what somebody searched for
    "Cache-Control": "no-cache",  # stored, and compared by ETag before each use: a new version of nev is seen at once
}


def add_page(app: Starlette) -> None:
    """Add the routes of the page to an application. They need no token: the page asks for one where the service does."""
    for address, name, media_type in FILES:
        _add_file(app, address, FOLDER / name, media_type)


def _add_file(app: Starlette, address: str, path: Path, media_type: str) -> None:
    from starlette.requests import Request
    from starlette.responses import Response

    content = path.read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    async def answer(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    app.add_route(address, answer, methods=["GET"], include_in_schema=False)
