"""An S3 server over HTTP (moto) behind a proxy that breaks answers by a table of faults and counts requests."""

from __future__ import annotations

import hashlib
import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
REFUSALS = {"500": (500, INTERNAL), "503": (503, SLOW_DOWN), "403": (403, DENIED)}
TRICKLES = 8
STALL_SECONDS = 600  # longer than a test may take
FAULTS = (*REFUSALS, "drop", "cut", "trickle", "stall")

# (method, path, range header, how many equal requests came before this one) to the name of a fault, or None
Rule = Callable[[str, str, str, int], str | None]


@dataclass
class Proxy:
    """Passes S3 requests on to moto. `rule` says which answers to break; `seen` counts (method, path) of all requests."""

    port: int
    rule: Rule = lambda method, path, span, before: None
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    _repeats: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """No faults, counts at zero."""
        self.rule = lambda method, path, span, before: None
        for counter in (self.seen, self.broken, self._repeats):
            counter.clear()

    def count(self, method: str, ending: str = "") -> int:
        """Requests with this method so far, of paths with this ending."""
        return sum(number for (verb, path), number in self.seen.items() if verb == method and path.endswith(ending))

    def fault(self, method: str, target: str, span: str) -> str | None:
        """Count a request, and say how its answer is to be broken."""
        path = target.split("?")[0]
        with self._lock:
            self.seen[method, path] += 1
            before = self._repeats[method, target, span]
            self._repeats[method, target, span] += 1
            fault = self.rule(method, path, span, before)
            if fault:
                self.broken[fault] += 1
            return fault


def mixed_faults(seed: int, share: float = 0.4) -> Rule:
    """A rule that breaks this share of the requests, by all faults but 403, and lets the second try of each pass."""
    kinds = [kind for kind in FAULTS if kind not in ("403", "stall")]

    def rule(method: str, path: str, span: str, before: int) -> str | None:
        draw = hashlib.blake2b(f"{seed} {method} {path} {span}".encode(), digest_size=4).digest()
        if before or int.from_bytes(draw[:2]) >= share * 65536:
            return None
        return kinds[draw[2] % len(kinds)]

    return rule


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Run moto and the proxy before it, on free ports of this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    moto_port = moto.get_host_and_port()[1]
    proxy = Proxy(port=0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy, moto_port))
    proxy.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield proxy
    server.shutdown()
    moto.stop()


def _handler(proxy: Proxy, moto_port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self._body()
            fault = proxy.fault(self.command, self.path, self.headers.get("Range", ""))
            if fault == "drop":
                self.close_connection = True
            elif fault in REFUSALS:
                self._send(*REFUSALS[fault], {"Content-Type": "application/xml"})
            else:
                upstream = http.client.HTTPConnection("127.0.0.1", moto_port)
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                response = upstream.getresponse()
                headers = {name: value for name, value in response.getheaders() if name.lower() != "transfer-encoding"}
                self._send(response.status, response.read(), headers, fault)
                upstream.close()

        def _body(self) -> bytes:
            if self.headers.get("Expect", "").lower() == "100-continue":
                del self.headers["Expect"]  # http.server has answered it
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _send(self, status: int, body: bytes, headers: dict[str, str], fault: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault in ("cut", "stall"):
                self.wfile.write(body[: len(body) // 2])
                time.sleep(STALL_SECONDS if fault == "stall" else 0)
                self.close_connection = True
            elif fault == "trickle":
                step = len(body) // TRICKLES + 1
                for at in range(0, len(body), step):
                    self.wfile.write(body[at : at + step])
                    self.wfile.flush()
                    time.sleep(0.02)
            else:
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
