"""Addresses that are not public are refused: as they are written, as names are looked up, and after redirects."""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.public_addresses import is_public, literal
from microdit.pipeline.sources.url_fetcher import Fetched, fetch_all
from tests.servers.sloppy import SloppyServer, picture

LOOPBACK = ["127.0.0.0/8"]
PRIVATE = [
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "017700000001", "0x7f.1", "127.0.0.1."),
    *("0.0.0.0", "10.0.0.1", "100.100.100.200", "169.254.169.254", "172.31.0.1", "192.168.1.1", "192.0.0.192"),
    *("224.0.0.1", "255.255.255.255", "168.63.129.16", "localhost", "a.localhost", "LOCALHOST."),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::10.0.0.1]", "[2002:7f00:1::]"),
    *("[::127.0.0.1]", "[fe80::1]", "[fe80::1%25eth0]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "１２７.0.0.1"),
]


@pytest.fixture
def server() -> Iterator[SloppyServer]:
    with SloppyServer() as server:
        yield server


def fetched(urls: list[str], allowed: list[str]) -> list[Fetched]:
    options = FetchOptions(timeout=6, idle_timeout=2, allow_networks=allowed, robots_txt=False)
    return [answer for _, answer in fetch_all(((url, url) for url in urls), options) if answer is not None]


def test_private_hosts_are_refused_in_all_their_forms(server: SloppyServer):
    port = server.url.rpartition(":")[2]
    for host, found in zip(PRIVATE, fetched([f"http://{host}:{port}/x" for host in PRIVATE], []), strict=True):
        assert (host, found.reason) == (host, "private_address")
        assert "allow_networks" in found.detail
    assert server.asked == []


def test_redirects_are_checked_again(server: SloppyServer):
    port = server.url.rpartition(":")[2]
    there = [f"http://127.0.0.2:{port}/x", "http://[::ffff:7f00:2]/x", "http://169.254.169.254/latest/meta-data/"]
    others = ["file:///etc/passwd", "gopher://127.0.0.1/x", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA"]
    found = fetched([f"{server.url}/away/{url}" for url in there + others], ["127.0.0.1"])
    assert [one.reason for one in found] == ["private_address"] * 3 + ["bad_url"] * 4
    assert all(path.startswith("/away/") for path in server.asked)


@pytest.mark.parametrize("scheme", ["file", "gopher", "ftp", "dict", "ldap", "data", "FILE", "jar:http"])
def test_other_schemes_are_refused(server: SloppyServer, scheme: str):
    port = server.url.rpartition(":")[2]
    urls = [f"{scheme}://127.0.0.1:{port}/x", f"{scheme}:///etc/passwd", f"{server.url}/away/{scheme}://127.0.0.1/x"]
    assert [one.reason for one in fetched(urls, LOOPBACK)] == ["bad_url"] * 3
    assert all(path.startswith("/away/") for path in server.asked)


def test_redirects_to_private_hosts_are_refused_in_all_their_forms(server: SloppyServer):
    """All but those of this machine, which the test lets be asked for the sake of its server."""
    port = server.url.rpartition(":")[2]
    hosts = ["2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "[::ffff:169.254.169.254]", "[::1]"]
    hosts += ["[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "0", "[::]", "10.1", "127.0.0.2", "[fd00:ec2::254]"]
    found = fetched([f"{server.url}/away/http://{host}:{port}/x" for host in hosts], ["127.0.0.1"])
    assert dict(zip(hosts, (one.reason for one in found), strict=True)) == dict.fromkeys(hosts, "private_address")
    assert all(path.startswith("/away/") for path in server.asked)


def test_the_address_that_was_checked_is_the_one_that_is_asked(server: SloppyServer, monkeypatch: pytest.MonkeyPatch):
    """The name leads to an allowed host first, and to others from then on; sloppy answers are asked for twice."""
    port = int(server.url.rpartition(":")[2])
    looked_up: list[str] = []

    def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        looked_up.append(host)
        address = "127.0.0.1" if len(looked_up) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    base = f"http://rebound.test:{port}"
    first = fetched([f"{base}/{i}" for i in range(20)], ["127.0.0.1"])
    assert [one.data for one in first] == [picture(f"/{i}") for i in range(20)]
    assert looked_up == ["rebound.test"]
    assert [one.reason for one in fetched([f"{base}/x"], ["127.0.0.1"])] == ["private_address"]
    looked_up.clear()
    assert [one.reason for one in fetched([f"{base}/no_colon"], ["127.0.0.1"])] == ["private_address"]
    assert looked_up == ["rebound.test"] * 2  # the second time for a connection of its own


def test_private_addresses_among_others_are_passed_over(server: SloppyServer, monkeypatch: pytest.MonkeyPatch):
    port = int(server.url.rpartition(":")[2])
    addresses = ("127.0.0.3", "10.0.0.1", "127.0.0.1")
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    urls = [f"http://mixed.test:{port}/ok", f"http://mixed.test:{port}/icy"]
    assert [one.data for one in fetched(urls, ["127.0.0.1/32"])] == [picture("/ok"), picture("/icy")]


@given(st.ip_addresses(v=4))
def test_ipv6_is_no_way_around(address: IPv4Address):
    mapped = IPv6Address(f"::ffff:{address}")
    assert is_public(mapped) == is_public(address)
    assert is_public(IPv6Address(f"64:ff9b::{address}")) == is_public(address)
    assert literal(str(int(address))) == literal(hex(int(address))) == address
    assert not (is_public(address) and (address.is_private or address.is_multicast or address.is_reserved))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "151.101.1.140", "2606:4700::1111", "2a00:1450::1"])
def test_public_addresses_are_asked(address: str):
    assert is_public(ip_address(address))


@given(st.ip_addresses(v=6))
def test_what_is_no_unicast_of_the_internet_is_private(address: IPv6Address):
    assert not (is_public(address) and address.ipv4_mapped is None and not address.is_global)


def test_proxies_of_the_environment_are_used(server: SloppyServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "near.test")
    found = fetched(["http://far.test/x", "http://8.8.8.8/x", "http://192.168.1.1/x", "http://localhost/x"], [])
    assert [one.data for one in found[:2]] == [picture("http://far.test/x"), picture("http://8.8.8.8/x")]
    assert [one.reason for one in found[2:]] == ["private_address"] * 2
    answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [answer])
    assert [one.reason for one in fetched(["http://near.test/x"], [])] == ["private_address"]
    assert [one.data for one in fetched([f"{server.url}/x"], LOOPBACK)] == [picture("/x")]


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy.test:1080")
    with pytest.raises(RequestError, match=r"^https_proxy: expected http://HOST:PORT, found socks5://;"):
        fetched(["http://far.test/x"], [])
