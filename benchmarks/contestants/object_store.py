"""An object store over a folder, in a process of its own, as far as nev reads from one: listing, HEAD, GET of a range.

Each request waits for `LATENCY_S`, and each answer is sent at `BYTES_S`, as S3 answers one connection.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from xml.sax.saxutils import escape

LATENCY_S, BYTES_S = 0.03, 80e6
PIECE = 2**18  # bytes that are sent at a time


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """Serve the folders in `folder` as buckets. Yields the address."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(folder, sender), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}"
    finally:
        process.terminate()
        process.join()


def take_counts(address: str) -> dict[str, int]:
    """Requests by method, and the `bytes` of answers to GET, since the last call."""
    with urllib.request.urlopen(f"{address}/?counts") as answer:
        counts: dict[str, int] = json.loads(answer.read())
    return counts


def _serve(folder: Path, sender: Connection) -> None:
    counts, lock = Counter[str](), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
            if "counts" in query:
                with lock:
                    body = json.dumps(counts).encode()
                    counts.clear()
                self._answer(200, body, {})
                return
            time.sleep(LATENCY_S)
            bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
            if "list-type" in query:
                self._count("LIST", 0)
                self._answer(200, _list(folder / bucket, query), {"Content-Type": "application/xml"})
                return
            path = folder / bucket / key
            if not path.is_file():
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {"Content-Type": "application/xml"})
                return
            size = path.stat().st_size
            first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
            start, stop = (int(first), min(size, int(last) + 1)) if first else (size - int(last), size)
            with path.open("rb") as file:
                file.seek(start)
                body = file.read(stop - start)
            self._count("GET", len(body))
            status = 206 if "Range" in self.headers else 200
            self._answer(status, body, {"ETag": _etag(path), "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

        def do_HEAD(self) -> None:
            time.sleep(LATENCY_S)
            self._count("HEAD", 0)
            path = folder / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
            self.send_response_only(200 if path.is_file() else 404)
            self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
            if path.is_file():
                self.send_header("ETag", _etag(path))
            self.end_headers()

        def _count(self, method: str, nbytes: int) -> None:
            with lock:
                counts[method] += 1
                counts["bytes"] += nbytes

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            begin = time.perf_counter()
            for start in range(0, len(body), PIECE):
                self.wfile.write(body[start : start + PIECE])
                time.sleep(max(0.0, begin + (start + PIECE) / BYTES_S - time.perf_counter()))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sender.send(server.server_address[1])
    server.serve_forever()


def _list(bucket: Path, query: dict[str, list[str]]) -> bytes:
    prefix = query.get("prefix", [""])[0]
    keys = sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
    delimiter = query.get("delimiter", [""])[0]
    entries, folders = [], set()
    for key in keys:
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            continue
        path = bucket / key
        entries.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>{escape(_etag(path))}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        )
    below = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
    return (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>false</IsTruncated><KeyCount>{len(entries)}</KeyCount>{''.join(entries)}{below}</ListBucketResult>"
    ).encode()


def _etag(path: Path) -> str:
    stat = path.stat()
    return f'"{hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]}"'
