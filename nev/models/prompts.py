"""The text that an encoder expects before a query, and before a document."""

from __future__ import annotations

# Encoders that tell queries from documents: nomic-embed-text, and E5 (arXiv 2212.03533).
PAIRS = (("search_query: ", "search_document: "), ("query: ", "passage: "))


def list_prompts(prefix: str) -> dict[str, str]:
    """The text before a query and before a document, for an encoder whose captions were trained with `prefix`."""
    for query, document in PAIRS:
        if prefix in (query, document):
            return {"query": query, "document": document}
    return {"query": prefix, "document": prefix}
