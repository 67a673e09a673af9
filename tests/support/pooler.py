"""What a client of PgBouncer notices at connect: startup parameters are refused, and the process number is the pooler's own.

It hands nothing out per transaction: no PgBouncer that can keep prepared statements is to be had as a package. What a session
has through it comes from the role alone, as it does there.
"""

import asyncio
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

# What PgBouncer takes without being told to (its documentation, ignore_startup_parameters), and nothing that sets a session up.
ALLOWED = {"user", "database", "client_encoding"}


class Pooler:
    """On a port of 127.0.0.1, before the PostgreSQL of a URL."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._server = (place.hostname, place.port)
        self.port = 0
        self.clients = 0

    def url(self, url: str) -> str:
        """The same role and database, through the pooler."""
        return url.replace(f":{self._server[1]}/", f":{self.port}/") + "?sslmode=disable"

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        size = struct.unpack("!I", await client.readexactly(4))[0]
        startup = await client.readexactly(size - 4)
        names = set(startup[4:].rstrip(b"\0").decode().split("\0")[::2])
        if startup[:4] != b"\0\3\0\0":  # a request to cancel: by a number that the server does not know
            to_client.close()
            return
        if names - ALLOWED:
            text = f"SFATAL\0C08P01\0Munsupported startup parameter: {names - ALLOWED}\0\0".encode()
            to_client.write(b"E" + struct.pack("!I", len(text) + 4) + text)
            to_client.close()
            return
        self.clients += 1
        server, to_server = await asyncio.open_connection(*self._server)
        to_server.write(struct.pack("!I", size) + startup)
        upstream = asyncio.create_task(_copy(client, to_server))
        kind = b""
        while kind != b"K" and (kind := await server.read(1)):
            length = struct.unpack("!I", await server.readexactly(4))[0]
            content = await server.readexactly(length - 4)
            if kind == b"K":  # BackendKeyData: process number, and key
                content = struct.pack("!I", self.clients) + content[4:]
            to_client.write(kind + struct.pack("!I", length) + content)
        await _copy(server, to_client)
        await upstream


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass
    finally:
        target.close()


@contextmanager
def pooler(url: str) -> Iterator[Pooler]:
    """Runs for as long as the block, in a thread of its own."""
    made = Pooler(url)
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        made.port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await stop

    async def main() -> None:
        await run()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # connections that were closed are closed in the next round of the loop

    stop = loop.create_future()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    ready.wait(10)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stop.set_result, None)
        thread.join(10)
        loop.close()
