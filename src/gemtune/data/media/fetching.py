"""Fetching a URL that data names, without letting data choose what this machine can reach."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from gemtune.errors import DataError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
# Prefixes whose addresses carry an IPv4 address inside, and where in the 128 bits it stands.
_IPV4_INSIDE = (
    ("::/96", 0),  # compatible (deprecated)
    ("::ffff:0:0/96", 0),  # mapped
    ("::ffff:0:0:0/96", 0),  # translated (SIIT)
    ("64:ff9b::/96", 0),  # NAT64
    ("2002::/16", 80),  # 6to4
)
_TRANSLATORS = ("64:ff9b:1::/48", "2001::/32", "fec0::/10")  # local NAT64, Teredo, site-local


@dataclass(frozen=True)
class FetchLimits:
    """Bounds of one fetch, all redirects together."""

    seconds: float = 30.0
    max_redirects: int = 3
    cache_dir: Path | None = None
    """None: `gemtune/media` below XDG_CACHE_HOME or ~/.cache."""


def fetch(url: str, where: str, limits: FetchLimits, max_bytes: int) -> bytes:
    """The body that a public web server gives for `url`, kept on disk so that it is asked once.

    Only http and https on their own ports, and only where every address that the name resolves to
    is public; the connection goes to the address that was checked, and a redirect is checked like
    the first URL. Proxies of the environment are not used.

    Raises:
        DataError: beginning with `where`; nothing is sent to an address that was refused.
    """
    cached = _cache_dir(limits) / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    if cached.is_file():
        if cached.stat().st_size > max_bytes:
            raise DataError(f"{where}: {url[:200]} has more than {max_bytes:,} bytes.")
        return cached.read_bytes()
    deadline = time.monotonic() + limits.seconds
    current = url
    for _ in range(limits.max_redirects + 1):
        status, location, body = _ask(current, where, deadline, max_bytes)
        if status in _REDIRECTS and location:
            current = urllib.parse.urljoin(current, location)
            continue
        if status != 200:
            raise DataError(f"{where}: {url[:200]} answers with status {status}. Save it first.")
        _keep(cached, body)
        return body
    raise DataError(f"{where}: {url[:200]} redirects more than {limits.max_redirects} times.")


def _cache_dir(limits: FetchLimits) -> Path:
    if limits.cache_dir is not None:
        return limits.cache_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemtune" / "media"


def _keep(path: Path, body: bytes) -> None:
    """Write in one step: another process may fetch the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as staging:
        staging.write(body)
    Path(staging.name).replace(path)


def _ask(url: str, where: str, deadline: float, max_bytes: int) -> tuple[int, str | None, bytes]:
    """One request: status, where it redirects to, and the body of a 200."""
    parts = _split(url, where)
    assert parts.hostname is not None
    address = _public_address(parts.hostname, parts.port or _PORTS[parts.scheme], where)
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    connection = _Pinned(parts, address, max(0.1, deadline - time.monotonic()))
    # A server may send one byte before each timeout: the clock of the whole closes the line.
    watch = threading.Timer(max(0.1, deadline - time.monotonic()), connection.cut)
    watch.daemon = True
    watch.start()
    try:
        headers = {"User-Agent": "gemtune", "Accept-Encoding": "identity"}
        connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            return response.status, response.getheader("Location"), b""
        return 200, None, _read_body(response, url, where, deadline, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        raise DataError(
            f"{where}: {url[:200]} cannot be fetched"
            f"{' in time' if late else ''} ({error or type(error).__name__}). Save it first."
        ) from error
    finally:
        watch.cancel()
        connection.close()


def _read_body(
    response: http.client.HTTPResponse, url: str, where: str, deadline: float, max_bytes: int
) -> bytes:
    expected = response.length
    chunks, size = [], 0
    while chunk := response.read1(_CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise DataError(
                f"{where}: {url[:200]} has more than data.max_media_bytes={max_bytes:,} bytes."
            )
        if time.monotonic() >= deadline:
            raise TimeoutError("took too long")
    if time.monotonic() >= deadline:
        raise TimeoutError("took too long")
    if expected is not None and size != expected:
        raise http.client.HTTPException(f"{size} of {expected} bytes came")
    return b"".join(chunks)


def _split(url: str, where: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise DataError(f"{where}: {url[:200]!r} is not a URL ({error}).") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise DataError(f"{where}: {url[:200]!r} is not an http or https URL. Save it first.")
    if parts.username is not None or parts.password is not None:
        raise DataError(f"{where}: a URL with a user name is not fetched. Save it first.")
    if port not in (None, _PORTS[parts.scheme]):
        raise DataError(
            f"{where}: {url[:200]} names port {port}; only the usual one "
            f"({_PORTS[parts.scheme]}) is asked. Save it first."
        )
    return parts


def resolve(host: str, port: int) -> list[str]:
    """Every address of a name, as text."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _public_address(host: str, port: int, where: str) -> str:
    """One address of the host, if all of them are public."""
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{where}: the host {host!r} cannot be found ({error}).") from error
    for address in addresses:
        if not is_public(address):
            raise DataError(
                f"{where}: {host} is at {address}, which is not a public address. Nothing is "
                "fetched from there; save it first."
            )
    if not addresses:
        raise DataError(f"{where}: the host {host!r} has no address.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet: not this machine, its network, a carrier's,
    multicast or reserved, nor an IPv6 form that stands for such an IPv4 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        for prefix, shift in _IPV4_INSIDE:
            if parsed in ipaddress.ip_network(prefix):
                inner = ipaddress.IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF)
                return is_public(str(inner)) and prefix != "::/96"
        if any(parsed in ipaddress.ip_network(prefix) for prefix in _TRANSLATORS):
            return False
    return (
        parsed.is_global
        and not parsed.is_multicast
        and not parsed.is_reserved
        and not parsed.is_unspecified
        and not parsed.is_loopback
        and not parsed.is_link_local
    )


class _Pinned(http.client.HTTPConnection):
    """Connects to an address that was checked, and asks it for the host of the URL."""

    def __init__(self, parts: urllib.parse.SplitResult, address: str, timeout: float) -> None:
        assert parts.hostname is not None
        super().__init__(parts.hostname, parts.port or _PORTS[parts.scheme], timeout=timeout)
        self.default_port = self.port  # so that the Host header names no port
        self._address = address
        self._encrypted = parts.scheme == "https"
        self._cut = False

    def connect(self) -> None:
        sock = socket.create_connection((self._address, self.port), timeout=self.timeout)
        self.sock = sock
        if self._encrypted:
            context = ssl.create_default_context()
            # The greeting comes after the socket is known, so that it can be cut short too.
            wrapped = context.wrap_socket(
                sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock = wrapped
            if not self._cut:
                wrapped.do_handshake()
        if self._cut:
            self.cut()

    def cut(self) -> None:
        """End the connection, from another thread."""
        self._cut = True
        if self.sock is not None:
            # Of the plain socket: TLS would drop its state under the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
