"""Where a request comes from. The server has already put in place what a trusted proxy says (TRUSTED_PROXIES)."""

from ipaddress import IPv6Address, ip_address
from typing import Final

from starlette.types import Scope

_LONGEST: Final = 64  # characters: IPv6 with a zone. A proxy can say anything


def address(scope: Scope) -> str | None:
    """The address for the request's log line; None if it has no plausible length."""
    host = _host(scope)
    return host if 0 < len(host) <= _LONGEST else None


def subscriber(scope: Scope) -> str:
    """The party that limits are counted for: an IPv4 address, or the network of 64 bits that one IPv6 subscriber has."""
    host = _host(scope)
    try:
        found = ip_address(host)
    except ValueError:
        return host[:_LONGEST]
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or IPv6Address(int(found) >> 64 << 64))
    return host


def _host(scope: Scope) -> str:
    host: str = (scope.get("client") or ("", 0))[0]
    return host
