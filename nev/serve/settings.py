"""What a server allows: sizes, counts, waiting, and who may call it."""

from __future__ import annotations

from pydantic import Field, SecretStr

from nev.config.base import Positive, Section

MIB = 2**20


class Settings(Section):
    """Limits of a server. What is over a limit is refused at little cost, and nobody else's request fails."""

    name: str | None = None
    """Name of the model in requests and answers. null: the model's own."""
    max_body_bytes: Positive = 64 * MIB
    """Most bytes of a request's body. More is answered with 413."""
    max_bytes_in_flight: Positive = 512 * MIB
    """Most bytes of all bodies that are being answered. More is answered with 429."""
    max_items: Positive = 2048
    """Most items of a request, as OpenAI has it. More is answered with 422."""
    max_characters: Positive = 65_536
    """Most characters of a text. More is answered with 422. A text is cut at the encoder's longest text besides."""
    max_waiting: Positive = 512
    """Items of a kind (texts, pictures) that may wait when a request comes. The next request is answered with 429."""
    max_texts: Positive = 64
    """Most texts of a forward."""
    max_pictures: Positive = 16
    """Most pictures of a forward."""
    max_top: Positive = 1000
    """Most hits of a search, those before `offset` included."""
    allow_urls: bool = False
    """Whether http and https addresses of pictures are fetched. Private addresses never are."""
    url_seconds: float = Field(default=10.0, gt=0)
    """Most seconds until a picture is fetched."""
    threads: Positive = 2
    """Threads that decode pictures."""
    hosts: frozenset[str] | None = None
    """Names by which callers may address the server, without a port, in lower case. null: any. A page of another site could else
    read a local server without a token, by a name that leads here (DNS rebinding).
    """
    filter_columns: frozenset[str] = frozenset()
    """Columns that `where` may name, beside uid, kind and source. Others may hold what callers are not to learn."""
    token: SecretStr | None = None
    """Bearer token that callers need. null: none."""
