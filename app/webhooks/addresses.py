"""Where a webhook may be sent: the form of its URL, and which addresses its host may have.

A caller chooses the URL and our network sends to it, so nothing that only our network can reach may be addressed. What a name
resolves to can change between two looks: the address that was checked here is the one that is connected to (sending.py).
Knows nothing of endpoints, and asks no resolver itself.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address

MAX_URL = 2048

# Visible ASCII, and none of what parsers disagree about: userinfo, backslashes, fragments, zones, names that are no names.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
URL_PATTERN = (
    r"^(?P<scheme>[Hh][Tt][Tt][Pp][Ss]?)://"
    rf"(?:(?P<name>{_NAME}(?:\.{_NAME})*)\.?|\[(?P<literal>[0-9A-Fa-f:.]+)\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:[/?][!$-\[\]^-~]*)?)$"
)
_URL = re.compile(URL_PATTERN)
_NUMBER = re.compile(r"(^|\.)([0-9]+|0[Xx][0-9A-Fa-f]*)$")

# What Python's own lists lack, which depends on its version: protocol assignments and documentation (RFC 6890, RFC 9637), and
# an address that is public by the registries and belongs to the machine below all the same: Azure's wire server.
_SPECIAL = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "168.63.129.16/32")))
_GLOBAL_UNICAST = ip_network("2000::/3")  # all of IPv6 that is public
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: how networks without IPv4 reach it; the last 32 bits say where


@dataclass(frozen=True, slots=True)
class Url:
    """A URL that may be asked for as far as its text says. `host` is a name or an address without brackets."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def literal(self) -> Address | None:
        """The address, if the host is one."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None


class NotAllowed(ValueError):
    """The URL or the address may not be used; the text is a sentence for the caller and quotes nothing of the URL."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an operator allows beside public addresses over https: networks, and hosts by name."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> "Allowed":
        """Each entry is a network, an address or a host name. Raises ValueError for anything else."""
        networks, hosts = [], set()
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                if not re.fullmatch(rf"{_NAME}(\.{_NAME})*", entry) or re.fullmatch(r"[0-9.]+", entry):
                    raise ValueError(f"{entry} is neither a network (10.0.0.0/8), an address nor a host name") from None
                hosts.add(entry.lower())
        return cls(tuple(networks), frozenset(hosts))

    def names(self, url: Url) -> bool:
        """The operator listed this host."""
        return url.host in self.hosts

    def contains(self, address: Address) -> bool:
        """The operator listed a network with this address."""
        return _is_in(_unwrapped(address), self.networks)

    def check(self, text: str) -> Url:
        """What the text alone decides. Raises NotAllowed."""
        url = parse(text)
        literal = url.literal
        if self.names(url) or (literal is not None and self.contains(literal)):
            return url
        if literal is not None and not is_public(literal):
            raise NotAllowed("Must be a public address.")
        if not url.secure and (
            literal is not None or not self.networks
        ):  # for a name, its address decides when it is used
            raise NotAllowed("Must begin with https://.")
        if url.port < 1024 and url.port != (443 if url.secure else 80):
            raise NotAllowed("Must use the scheme's own port or one from 1024 to 65535.")
        return url

    def permits(self, url: Url, address: Address) -> bool:
        """Whether this address of the URL's host may be connected to."""
        if self.names(url) or self.contains(address):
            return True
        return url.secure and is_public(address)


def parse(text: str) -> Url:
    """The parts of a URL, however it may be used. Raises NotAllowed for what is no plain http or https URL."""
    found = _URL.fullmatch(text) if len(text) <= MAX_URL else None
    if found is None or len(found["name"] or "") > 253:
        raise NotAllowed(
            "Must be an https URL of at most 2048 ASCII characters, with a host, and without user, password and fragment."
        )
    secure = found["scheme"].lower() == "https"
    port = int(found["port"]) if found["port"] else 443 if secure else 80
    if not 1 <= port <= 65535:
        raise NotAllowed("The port must be from 1 to 65535.")
    target = found["target"]
    if not target.startswith("/"):
        target = f"/{target}"
    host = found["name"] or found["literal"]
    if found["literal"] is not None or _NUMBER.search(host):  # 127.1 and 0x7f000001 are addresses to a resolver
        try:
            host = str(ip_address(host))
        except ValueError:
            raise NotAllowed("The host is neither a name nor an address in its usual form.") from None
    return Url(secure, host.lower(), port, target)


def is_public(address: Address) -> bool:
    """Whether the whole internet can reach it, as far as the registries say (RFC 6890 and its updates)."""
    address = _unwrapped(address)
    # 6to4 carries an IPv4 address that was not checked; Teredo does too, and is special.
    if isinstance(address, IPv6Address) and (address not in _GLOBAL_UNICAST or address.sixtofour is not None):
        return False
    is_special = address.is_multicast or address.is_reserved or _is_in(address, _SPECIAL)
    return address.is_global and not is_special


def _is_in(address: Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
