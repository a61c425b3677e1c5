"""URLs: only public web servers, only what was checked, never more or longer than allowed."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from gemtune.data.media import fetching
from gemtune.data.media.fetching import FetchLimits, fetch, is_public
from gemtune.data.media.files import MediaPolicy
from gemtune.data.media.images import ImageEncoder
from gemtune.errors import DataError

PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1",
    "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:10.0.0.1",
    "::127.0.0.1", "::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:a00:1::1", "2002:7f00:1::808:808", "2001::1", "not an address", "",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8",
          "2002:808:808::1"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert is_public(address)


class Web:
    """A server on 127.0.0.1 that counts as public; every other address keeps its rules."""

    def __init__(self, monkeypatch, tmp_path):
        self.asked = []  # (Host header, path) of each request
        self.connected = []
        self.answers = {}
        self.addresses = {"good.test": ["127.0.0.1"]}
        self.limits = FetchLimits(seconds=5, cache_dir=tmp_path / "cache")
        web = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked.append((self.headers["Host"], self.path))
                with contextlib.suppress(OSError):
                    web.answers[self.path](self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        connect = socket.create_connection

        def connected(address, **options):
            web.connected.append(address[0])
            return connect(address, **options)

        port = self.server.server_address[1]
        monkeypatch.setitem(fetching._PORTS, "http", port)
        monkeypatch.setattr(fetching, "resolve", lambda host, port: self.addresses[host])
        rule = is_public
        monkeypatch.setattr(fetching, "is_public", lambda a: a == "127.0.0.1" or rule(a))
        monkeypatch.setattr(fetching.socket, "create_connection", connected)

    def answer(self, path, body=b"", status=200, **headers):
        def send(request):
            request.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                request.send_header(name, str(value))
            request.end_headers()
            request.wfile.write(body)

        self.answers[path] = send

    def fetch(self, url, max_bytes=1000):
        return fetch(url, "row 3", self.limits, max_bytes)


@pytest.fixture
def web(monkeypatch, tmp_path):
    web = Web(monkeypatch, tmp_path)
    yield web
    web.server.shutdown()
    web.server.server_close()


def refused(web, url, says, asked=0, **options):
    with pytest.raises(DataError, match=rf"^row 3: .*{says}"):
        web.fetch(url, **options)
    assert len(web.asked) == asked


def test_a_body_is_asked_for_once(web):
    web.answer("/a%20b.png?x=1", b"body")
    assert web.fetch("http://good.test/a b.png?x=1#part") == b"body"
    assert web.fetch("http://good.test/a b.png?x=1#part") == b"body"
    assert web.asked == [("good.test", "/a%20b.png?x=1")]


@pytest.mark.parametrize("address", ["127.0.0.2", "169.254.169.254", "10.0.0.1", "::1"])
def test_a_name_that_leads_inside(web, address):
    web.addresses["inside.test"] = [address]
    refused(web, "http://inside.test/a", "not a public address")
    web.addresses["both.test"] = ["127.0.0.1", address]  # one of them is enough
    refused(web, "http://both.test/a", "not a public address")
    assert not web.connected


def test_the_connection_goes_to_the_address_that_was_checked(web, monkeypatch):
    """A name that resolves to another address a moment later changes nothing."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    monkeypatch.setattr(fetching, "resolve", lambda host, port: next(answers))
    web.answer("/a", b"x")
    assert web.fetch("http://good.test/a") == b"x"
    assert web.connected == ["127.0.0.1"]


def test_redirects_are_checked_like_the_first(web):
    web.answer("/a", status=302, Location="/b")
    web.answer("/b", b"x")
    assert web.fetch("http://good.test/a") == b"x"
    web.addresses["inside.test"] = ["127.0.0.2"]
    web.asked.clear()
    for number, to in enumerate(
        ["http://inside.test/x", "file:///etc/passwd", "http://u:p@good.test/", "//good.test:1/"]
    ):
        web.answer(f"/to{number}", status=301, Location=to)
        refused(web, f"http://good.test/to{number}", ".", asked=number + 1)
    web.answer("/round", status=307, Location="/round")
    web.asked.clear()
    refused(web, "http://good.test/round", "redirects more than 3 times", asked=4)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://good.test/a", "file:///etc/passwd", "http:///a", "http://good.test:22/a",
        "http://user@good.test/a", "http://[::1/a", "http://good.test:x/a", "gopher://good.test",
    ],
)  # fmt: skip
def test_urls_that_are_never_asked(web, url):
    refused(web, url, ".")
    assert not web.connected


def test_too_many_bytes(web):
    web.answer("/a", b"x" * 2000)
    refused(web, "http://good.test/a", "more than data.max_media_bytes=1,000 bytes", asked=1)
    web.answers["/b"] = lambda request: endless(request, b"x" * 100, pause=0)  # no length
    refused(web, "http://good.test/b", "more than data.max_media_bytes=1,000 bytes", asked=2)


def endless(request, piece, pause):
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(piece)
        request.wfile.flush()
        time.sleep(pause)


@pytest.mark.parametrize("where", ["silent", "headers", "body"])
def test_a_server_that_never_ends(web, where):
    web.limits = FetchLimits(seconds=0.5, cache_dir=web.limits.cache_dir)

    def headers(request):
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            request.wfile.write(b"X-A: b\r\n")
            request.wfile.flush()
            time.sleep(0.05)

    web.answers["/a"] = {
        "silent": lambda request: time.sleep(20),
        "headers": headers,
        "body": lambda request: endless(request, b"x", pause=0.05),
    }[where]
    started = time.monotonic()
    refused(web, "http://good.test/a", "cannot be fetched in time", asked=1)
    assert time.monotonic() - started < 10


def test_what_a_server_may_answer_instead(web):
    web.answer("/a", b"no", status=404)
    refused(web, "http://good.test/a", "answers with status 404", asked=1)
    web.answers["/b"] = lambda request: request.wfile.write(b"no http\r\n\r\n")
    refused(web, "http://good.test/b", "cannot be fetched", asked=2)
    web.answer("/c", b"abc", **{"Content-Length": 10})  # and the line closes
    refused(web, "http://good.test/c", "cannot be fetched", asked=3)


def test_images_by_url_only_where_they_are_allowed(web, stock_processor, png, tmp_path):
    web.answer("/i.png", png(96, 48))
    url = "http://good.test/i.png"
    with pytest.raises(DataError, match=r"^row 3: images are not fetched .*data.allow_urls=true"):
        ImageEncoder(stock_processor, tmp_path).open(url, "row 3")
    assert not web.asked
    policy = MediaPolicy(allow_urls=True, fetch=web.limits)
    encoder = ImageEncoder(stock_processor, None, policy)
    assert encoder.open(url, "row 3").size == encoder.open(url, "row 3").size == (96, 48)
    assert len(web.asked) == 1
    with pytest.raises(
        DataError, match=r"^row 3: images are not fetched from URLs .*Save it first"
    ):
        encoder.open("file:///etc/passwd", "row 3")
