"""Connections to Vault that do not stay with a node that cannot answer.

Vault's address may lead to another node at any time: its balancer or name moves when a node is sealed or steps down. A
connection stays with the node to which it was made, and urllib3 uses the last used one first. So a connection is closed when it
brings an answer of a node that cannot serve, all older connections are not used again either, and none is used for long.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

MAX_AGE_SECONDS = 60.0

# Connections that were made less than this before another one met an outage are kept: a lasting outage, or a rate limit, must
# not make every call open a connection.
YOUNG_SECONDS = 0.5

# Rate limit or standby, disaster recovery secondary, performance standby (https://developer.hashicorp.com/vault/api-docs).
_OUTAGE_STATUSES = frozenset({429, 472, 473})


class _Outages:
    """When a connection to Vault last met a node that cannot answer, for all connections of a store."""

    def __init__(self) -> None:
        self._last = float("-inf")  # in time.monotonic()

    def note(self) -> None:
        """A call failed, or was answered by a node that cannot serve."""
        self._last = time.monotonic()

    def is_usable(self, opened_at: float) -> bool:
        """Whether a connection that was opened then may be used again."""
        return opened_at > time.monotonic() - MAX_AGE_SECONDS and opened_at > self._last - YOUNG_SECONDS


class _Watched(HTTPConnection):
    """urllib3's pool asks `is_connected` before it uses a connection again, and otherwise connects it anew."""

    def __init__(self, *arguments: Any, outages: _Outages, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._outages = outages
        self._opened_at = float("-inf")

    def connect(self) -> None:
        with self._noting():
            super().connect()
        self._opened_at = time.monotonic()

    @property
    def is_connected(self) -> bool:
        return super().is_connected and self._outages.is_usable(self._opened_at)

    def getresponse(self) -> Any:
        """The response, which has been read to its end."""
        with self._noting():
            response = super().getresponse()
        # A standby redirects to the active node; redirects are not followed.
        if response.status >= 500 or 300 <= response.status < 400 or response.status in _OUTAGE_STATUSES:
            self._outages.note()
            self.close()
        return response

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPError, HTTPException):  # no answer, or none in time
            self._outages.note()
            raise


class _WatchedTls(_Watched, HTTPSConnection):
    """The same with TLS."""


def open_pool(url: str, **options: Any) -> urllib3.HTTPConnectionPool:
    """A pool of such connections; `options` are those of urllib3's pool."""
    pool = urllib3.connection_from_url(url, outages=_Outages(), **options)
    pool.ConnectionCls = _WatchedTls if isinstance(pool, urllib3.HTTPSConnectionPool) else _Watched
    return pool
