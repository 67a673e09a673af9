"""Sending one message: to an address that was checked, for 15 seconds at most, whatever the other side does."""

import gzip
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from app.webhooks.addresses import Allowed
from app.webhooks.sending import MAX_HEAD, Answer, Failed, Post, trust
from tests.support.certificate_authority import Authority, authority
from tests.support.stack import Stack
from tests.support.webhook_receiver import Answer as Said
from tests.support.webhook_receiver import Receiver, receiving

LOOPBACK = Allowed.parse(["127.0.0.0/8"])
NEVER = float("inf")


def send(
    url: str,
    *addresses: str,
    allowed: Allowed = LOOPBACK,
    context: ssl.SSLContext | None = None,
    connect_by: float = NEVER,
) -> Answer:
    post = Post(allowed, lambda: context or ssl.create_default_context(), lambda *_: addresses)
    return post.send(url, {"Content-Type": "application/json"}, b"{}", connect_by=connect_by)


def refused(url: str, *addresses: str, **options: Any) -> str:
    with pytest.raises(Failed) as failed:
        send(url, *addresses, **options)
    return failed.value.code


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


# --- which address ----------------------------------------------------------------------------------------------------


def test_a_name_that_resolves_to_another_address_a_moment_later(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first look is public, every later one is not. What is connected to is what was checked."""
    looked: list[str] = []
    connected: list[Any] = []

    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        looked.append(host)
        address = "93.184.216.34" if len(looked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    class Refusing(socket.socket):
        def connect(self, address: Any) -> None:
            connected.append(address)
            raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "socket", Refusing)
    port = receiver.server.server_port
    with pytest.raises(Failed) as failed:
        Post(Allowed(), ssl.create_default_context).send(
            f"https://rebinding.example:{port}/", {}, b"", connect_by=NEVER
        )
    assert failed.value.code == "connection_failed"
    assert looked == ["rebinding.example"]
    assert connected == [("93.184.216.34", port)]
    assert receiver.messages == []


def test_only_addresses_that_may_be_used_are_connected_to(receiver: Receiver) -> None:
    url = f"http://several.example:{receiver.server.server_port}/hook"
    only_one = Allowed.parse(["127.0.0.1/32"])
    assert send(url, "169.254.169.254", "127.0.0.2", "127.0.0.1", allowed=only_one).status == 200
    [message] = receiver.messages
    assert message.headers["host"] == f"several.example:{receiver.server.server_port}"
    assert refused(url, "169.254.169.254", "127.0.0.2", allowed=only_one) == "address_not_allowed"
    assert len(receiver.messages) == 1


def test_a_name_without_an_address_is_told_from_nothing_else(receiver: Receiver) -> None:
    """Else a caller could find out which names our own network has."""

    def unknown(*_: object) -> list[str]:
        raise socket.gaierror

    with pytest.raises(Failed) as failed:
        Post(Allowed(), ssl.create_default_context, unknown).send("https://no.example/", {}, b"", connect_by=NEVER)
    assert failed.value.code == refused("https://internal.example/", "127.0.0.1", allowed=Allowed())


def test_the_next_address_is_tried_when_one_refuses(receiver: Receiver) -> None:
    with closing(socket.create_server(("127.0.0.3", 0))) as taken:
        port = taken.getsockname()[1]
    assert refused(f"http://name.example:{port}/", "127.0.0.3") == "connection_failed"
    url = f"http://name.example:{receiver.server.server_port}/"
    assert send(url, "127.0.0.9", "127.0.0.1").status == 200


def test_nothing_is_connected_to_after_the_lease_allows_it(receiver: Receiver) -> None:
    assert refused(f"{receiver.url}/", connect_by=time.monotonic() - 0.001) == "too_late"
    assert receiver.messages == []


# --- what is answered -------------------------------------------------------------------------------------------------


def test_an_answer_is_read_up_to_a_kibibyte(receiver: Receiver) -> None:
    receiver.behaviours["/"] = lambda _: Said(200, {"Retry-After": "7"}, b"x" * 100_000)
    answer = send(f"{receiver.url}/")
    assert (answer.status, answer.body, answer.retry_after) == (200, b"x" * 1024, "7")


class Rude:
    """A server that writes these pieces, one every `pause` seconds, and then says nothing for ever."""

    def __init__(self, *pieces: bytes, pause: float = 0) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self._stopped = threading.Event()
        self._pieces, self._pause = pieces, pause
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            try:
                for piece in self._pieces:
                    connection.sendall(piece)
                    if self._stopped.wait(self._pause):
                        return
            except OSError:
                return
            self._stopped.wait(60)

    def close(self) -> None:
        self._stopped.set()
        self._listening.close()


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\nX-Drip: "] + [b"x"] * 10_000,
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"] + [b"x"] * 900,
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 10_000,
        [],
    ],
    ids=["head", "body", "continue", "silence"],
)
def test_a_receiver_that_never_ends_is_broken_off(pieces: list[bytes]) -> None:
    """Each byte would renew the patience of a socket; giving up does not wait for one."""
    with closing(Rude(*pieces, pause=0.01)) as rude:
        post = Post(LOOPBACK, ssl.create_default_context)
        threading.Timer(0.3, post.abort).start()
        began = time.monotonic()
        with pytest.raises(Failed) as failed:
            post.send(rude.url, {}, b"{}", connect_by=NEVER)
        assert failed.value.code == "timeout"
        assert time.monotonic() - began < 5


def test_what_was_given_up_before_it_began_connects_to_nothing(receiver: Receiver) -> None:
    post = Post(LOOPBACK, ssl.create_default_context)
    post.abort()
    with pytest.raises(Failed):
        post.send(f"{receiver.url}/", {}, b"{}", connect_by=NEVER)
    assert receiver.messages == []


@pytest.mark.parametrize(
    "piece",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"x" * 200_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4000 + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["no-http", "no-status", "many-headers", "long-line", "many-interim-answers"],
)
def test_what_is_no_answer_fails(piece: bytes) -> None:
    with closing(Rude(piece)) as rude:
        assert refused(rude.url) == "no_answer"


def test_the_head_of_an_answer_is_bounded_as_a_whole(receiver: Receiver) -> None:
    """http.client by itself takes 100 lines of 64 KiB each, and needs several times as much for them."""

    def answer_with(octets: int) -> None:
        head = b"HTTP/1.1 200 OK\r\nRetry-After: 7\r\n"
        head += (b"A: " + b"a" * 30_000 + b"\r\n") * ((octets - 100) // 30_005)
        raw = (head + b"B: ").ljust(octets - 4, b"b") + b"\r\n\r\nbody"
        receiver.behaviours["/"] = lambda _: Said(raw=raw)

    answer_with(MAX_HEAD)
    assert send(f"{receiver.url}/") == Answer(200, b"body", "7")
    answer_with(MAX_HEAD + 1)
    assert refused(f"{receiver.url}/") == "no_answer"
    answer_with(2_000_000)
    tracemalloc.start()
    try:
        assert refused(f"{receiver.url}/") == "no_answer"
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000, "bytes"


def test_chunks_that_are_none(receiver: Receiver) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with closing(Rude(head)) as rude:
        assert refused(rude.url) == "no_answer"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MUCH = 20_000_000  # bytes: a second of reading and more
ENDLESS = {
    "extension": CHUNKED + b"1;" + b"x" * MUCH,
    "extensions": CHUNKED + (b"1;" + b"x" * 1000 + b"\r\na\r\n") * (MUCH // 1000),
    "size": CHUNKED + b"0" * MUCH,
    "interim answers": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * (MUCH // 40),
    "interim head": b"HTTP/1.1 102 Processing\r\n" + b"A: b\r\n" * (MUCH // 6),
}


@pytest.mark.parametrize("answer", ENDLESS.values(), ids=ENDLESS)
def test_framing_without_an_end_is_not_read_for_long(answer: bytes) -> None:
    with closing(Rude(answer)) as rude:
        began = time.thread_time()
        assert refused(rude.url) == "no_answer"
        assert time.thread_time() - began < 0.2, "seconds of work"


def test_trailers_are_not_read() -> None:
    trailers = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(MUCH // 1000))
    for end in (trailers, b"", b"x" * MUCH):  # the second one: nothing follows, and the connection stays open
        with closing(Rude(CHUNKED + b"2\r\nok\r\n0\r\n" + end)) as rude:
            began = time.monotonic()
            assert send(rude.url) == Answer(200, b"ok", None)
            assert time.monotonic() - began < 2


def test_interim_answers_are_passed_over() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nRetry-After: 9\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    with closing(Rude(interim + b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok")) as rude:
        assert send(rude.url) == Answer(202, b"ok", None)
    with closing(Rude(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")) as rude:
        assert send(rude.url).status == 101


def test_an_answer_in_many_chunks_is_read() -> None:
    with closing(Rude(CHUNKED + b"1;a=b\r\nx\r\n" * 2000 + b"0\r\n\r\n")) as rude:
        assert send(rude.url) == Answer(200, b"x" * 1024, None)


def test_a_compressed_answer_stays_compressed() -> None:
    """A kibibyte of it could stand for a megabyte."""
    body = gzip.compress(b"x" * 10_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with closing(Rude(head + body)) as rude:
        assert send(rude.url) == Answer(200, body[:1024], None)


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuer(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with authority(stack, tmp_path_factory.mktemp("tls")) as made:
        yield made


def test_a_certificate_is_checked_for_the_name_and_not_for_the_address(
    issuer: Authority,
) -> None:
    ca = issuer.ca
    with receiving(issuer.server("receiver.example")) as receiver:
        port = receiver.server.server_port
        assert send(f"https://receiver.example:{port}/", "127.0.0.1", context=trust(ca)).status == 200
        assert len(receiver.messages) == 1
        for url in (f"https://other.example:{port}/", f"https://127.0.0.1:{port}/"):
            assert refused(url, "127.0.0.1", context=trust(ca)) == "tls_failed"
        assert refused(f"https://receiver.example:{port}/", "127.0.0.1", context=trust(None)) == "tls_failed"
        assert len(receiver.messages) == 1


def test_a_handshake_that_never_ends_is_broken_off(issuer: Authority) -> None:
    with closing(Rude(pause=0.01)) as rude:
        post = Post(LOOPBACK, lambda: trust(issuer.ca))
        threading.Timer(0.3, post.abort).start()
        with pytest.raises(Failed) as failed:
            post.send(rude.url.replace("http:", "https:"), {}, b"{}", connect_by=NEVER)
        assert failed.value.code == "timeout"
