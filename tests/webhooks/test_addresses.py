"""Where webhooks may be sent: the text of a URL, and the addresses that a name has."""

from ipaddress import ip_address

import pytest

from app.webhooks.addresses import Allowed, NotAllowed, is_public, parse

NOTHING = Allowed()

NOT_PUBLIC = [
    *("127.0.0.1", "127.255.255.255", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("100.64.0.1", "100.127.255.255"),  # carrier-grade NAT
    *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"),  # metadata
    *("192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "240.0.0.1", "255.255.255.255", "224.0.0.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "3fff::1", "100::1", "fec0::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:100.64.0.1"),  # IPv4-mapped
    *("::127.0.0.1", "::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::1"),
    *("2002:7f00:1::1", "2002:808:808::1", "2001::1"),  # 6to4, Teredo
    *("5f00::1", "4000::1"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_what_only_our_own_network_reaches_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not NOTHING.permits(parse("https://example.com/"), ip_address(address))
    with pytest.raises(NotAllowed):
        NOTHING.check(f"https://[{address}]/" if ":" in address else f"https://{address}/")


@pytest.mark.parametrize("address", PUBLIC)
def test_what_everybody_reaches_is_public(address: str) -> None:
    assert is_public(ip_address(address))
    assert NOTHING.permits(parse("https://example.com/"), ip_address(address))
    assert not NOTHING.permits(parse("http://example.com/"), ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "https:///path",
        "https://",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com@127.0.0.1/",
        "https://example.com:@127.0.0.1/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com#@127.0.0.1/",
        "https://example.com/#fragment",
        "https://exa mple.com/",
        "https://example.com/a b",
        "https://example.com/\r\nX-Injected: 1",
        "https://example.com/\n",
        "https://example.com\t/",
        "https://bücher.example/",
        "https://example.com/ü",
        "https://-example.com/",
        "https://example..com/",
        "https://.example.com/",
        f"https://{'a' * 64}.com/",
        f"https://{'a.' * 130}com/",
        f"https://example.com/{'a' * 2048}",
        "https://[::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://[127.0.0.1]/",
        "https://[example.com]/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://127.1/",
        "https://0177.0.0.1/",
        "https://127.0.0.1./",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:99999/",
        "https://example.com:-1/",
        "https://example.com:/",
        "https://example.com:443x/",
        "https://example.com:22/",
        "https://example.com:25/",
        "https://example.com:80/",
        "http://example.com/",
        "http://example.com:443/",
        "http://8.8.8.8/",
        "HTTP://EXAMPLE.COM/",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(NotAllowed) as refused:
        NOTHING.check(url)
    assert "example" not in str(refused.value).lower(), "nothing of the URL is repeated"


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("https://example.com", "example.com", 443, "/"),
        ("HTTPS://Example.COM./Path?q=%20&x=[1]", "example.com", 443, "/Path?q=%20&x=[1]"),
        ("https://example.com:8443/a", "example.com", 8443, "/a"),
        ("https://example.com?q", "example.com", 443, "/?q"),
        ("https://example.com:443/", "example.com", 443, "/"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443, "/"),
        ("https://8.8.8.8:65535/", "8.8.8.8", 65535, "/"),
        ("https://[2606:4700:0:0::1111]/", "2606:4700::1111", 443, "/"),
        ("https://my_service.example.com/", "my_service.example.com", 443, "/"),
    ],
)
def test_urls_that_are_accepted(url: str, host: str, port: int, target: str) -> None:
    found = NOTHING.check(url)
    assert (found.secure, found.host, found.port, found.target) == (True, host, port, target)


def test_an_operator_may_allow_networks_and_hosts() -> None:
    allowed = Allowed.parse(["10.0.0.0/8", "fd00::/8", "192.168.1.7", "Receiver.internal"])
    inside, outside = ip_address("10.1.2.3"), ip_address("172.16.0.1")
    # A listed network: its addresses, over http too; and nothing else.
    assert allowed.check("http://10.1.2.3:81/").port == 81
    named = allowed.check("http://anything.internal/")
    assert allowed.permits(named, inside)
    assert allowed.permits(named, ip_address("::ffff:10.1.2.3"))
    assert not allowed.permits(named, outside)
    assert not allowed.permits(named, ip_address("8.8.8.8")), "public addresses take https"
    assert allowed.permits(allowed.check("https://anything.internal/"), inside)
    for url in ("http://172.16.0.1/", "https://192.168.1.8/", "https://127.0.0.1/", "http://anything.internal:22/"):
        with pytest.raises(NotAllowed):
            allowed.check(url)
    # A listed host: whatever it resolves to.
    listed = allowed.check("http://RECEIVER.internal:25/x")
    assert allowed.permits(listed, outside)
    assert not allowed.permits(allowed.check("https://sub.receiver.internal/"), outside)


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "10.0.0.0/33", "*.internal", "https://x", "a b", "1.2.3", "", "-x"])
def test_what_an_operator_cannot_allow(entry: str) -> None:
    with pytest.raises(ValueError, match="neither a network"):
        Allowed.parse([entry])
