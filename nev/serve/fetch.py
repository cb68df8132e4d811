"""Fetches pictures from the web, and from nowhere else: no address inside a private network can be reached through a server.

A name is resolved once. Every address that it has is checked, and the connection goes to the checked addresses alone, so a name
that changes its address in between (DNS rebinding) gains nothing. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from nev.data.decode import BadImage

if TYPE_CHECKING:
    from aiohttp import StreamReader
    from aiohttp.abc import ResolveResult

Resolve = Callable[[str, int], Awaitable[list[str]]]
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that has been given out for the public
NAT64 = ipaddress.ip_network("64:ff9b::/96")
CHUNK = 65_536


async def resolve_name(host: str, port: int) -> list[str]:
    """The addresses of a name or an address, as the machine resolves them. Raises OSError."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def is_public(address: str) -> bool:
    """Whether an address may be connected to: not private, loopback, link-local, reserved or multicast, nor a wrap of such."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour or ip.teredo:
            return False
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner:
            return is_public(str(inner))
        if ip not in UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


async def fetch_picture(
    url: str,
    max_bytes: int,
    seconds: float,
    resolve: Resolve = resolve_name,
    is_allowed: Callable[[str], bool] = is_public,
) -> bytes:
    """The bytes of a picture on the web.

    max_bytes: most bytes. seconds: until all of them are there. resolve, is_allowed: for tests.
    Raises BadImage with the reason.
    """
    import aiohttp
    from aiohttp.abc import AbstractResolver
    from yarl import URL

    try:
        target = URL(url)
        host, port = target.host or "", target.port or 0
    except ValueError as error:
        raise BadImage(f"not an address: {error}") from error
    if target.scheme not in ("http", "https") or not host or target.user or target.password:
        raise BadImage("an address is http:// or https://, with a host, and without user and password")
    try:
        async with asyncio.timeout(seconds):
            addresses = await resolve(host, port)
            if not addresses or not all(map(is_allowed, addresses)):
                raise BadImage("the address is not one of the public web")  # no word of what it resolves to

            class Checked(AbstractResolver):
                """Gives the connection the addresses that were checked."""

                async def resolve(
                    self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
                ) -> list[ResolveResult]:
                    return [_describe_address(address, host, port) for address in addresses]

                async def close(self) -> None:
                    return None

            connector = aiohttp.TCPConnector(resolver=Checked(), use_dns_cache=False, force_close=True)
            async with (
                aiohttp.ClientSession(connector=connector, trust_env=False, auto_decompress=False) as session,
                session.get(target, allow_redirects=False, headers={"Accept": "image/*"}) as answer,
            ):
                if answer.status != 200:
                    redirected = ", and redirects are not followed" if 300 <= answer.status < 400 else ""
                    raise BadImage(f"the address answers {answer.status}{redirected}")
                return await _read(answer.content, max_bytes)
    except TimeoutError:
        raise BadImage(f"not fetched within {seconds:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"cannot be fetched ({type(error).__name__})") from error


async def _read(content: StreamReader, max_bytes: int) -> bytes:
    """All bytes of an answer, which may have no length in its head."""
    data = bytearray()
    async for chunk in content.iter_chunked(CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise BadImage(f"more than {max_bytes:,} bytes")
    return bytes(data)


def _describe_address(address: str, host: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": flags}
