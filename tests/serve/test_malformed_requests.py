"""Malformed requests by the service's own OpenAPI document: each is answered as the document says, and none with 500."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from helpers.serving import WIDTH, counting_engine, run_in_thread, vector_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nev.search.exact import ExactStore
from nev.search.index import open_index
from nev.search.store import StoreSpec, make_items
from nev.serve.app import make_app

MALFORMED, FORMED, RAW = 80, 20, 60  # requests of an operation, and bodies of any bytes
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
QUICK = settings(
    phases=[Phase.explicit, Phase.generate],
    database=None,
    derandomize=True,  # the same requests in every run
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without a model, over a small index."""
    folder = str(tmp_path_factory.mktemp("index"))
    store = ExactStore(folder, "items")
    store.apply_changes(WIDTH)
    for kind in ("text", "image"):
        uids = [f"{kind}-{n}" for n in range(5)]
        store.upsert(make_items(kind, uids, np.stack([vector_of(uid) for uid in uids]), text=uids))
    store.write_spec(StoreSpec(width=WIDTH, text_fingerprint="t" * 64))
    with run_in_thread(make_app(counting_engine()[0], open_index(folder))) as url:
        yield url


@pytest.mark.slow
def test_malformed_requests(url: str) -> None:
    statuses: Counter[int] = Counter()
    session = requests.Session()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 10
    assert sum(bool(each.body or each.query) for each in operations) == 5
    for operation in operations:
        takes = operation.body or operation.query  # a path of any letters cannot be malformed
        for mode in GenerationMode if takes else [GenerationMode.POSITIVE]:
            count = (
                MALFORMED if mode is GenerationMode.NEGATIVE else FORMED if takes or operation.path_parameters else 1
            )

            @settings(QUICK, max_examples=count)
            @given(case=operation.as_strategy(mode))
            def ask(case: Case) -> None:
                answer = case.call(session=session, timeout=20)
                statuses[answer.status_code] += 1
                case.validate_response(answer, checks=CHECKS)

            ask()
    refused = sum(count for status, count in statuses.items() if 400 <= status < 500)
    assert refused >= 300, statuses
    assert statuses[200] >= 10, statuses
    assert not [status for status in statuses if status >= 500]


@settings(QUICK, max_examples=RAW)
@given(
    st.sampled_from(["/v1/embeddings", "/v1/embeddings/images", "/search"]),
    st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", "\x00"]),
    st.binary(max_size=200) | st.text(max_size=60).map(lambda text: f'{{"input": "{text}"}}'.encode()),
)
def test_bodies_of_any_bytes(url: str, path: str, kind: str, body: bytes) -> None:
    if kind.startswith("multipart"):
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + body + b"\r\n--x--\r\n"
    answer = requests.post(url + path, data=body, headers={"Content-Type": kind.strip("\x00")}, timeout=20)
    assert answer.status_code in (200, 400, 413, 422), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
