"""Hosts whose certificates fail: refused by default, else fetched and named; TLS connections and their sessions."""

import asyncio
import datetime
import json
import ssl
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.source import Input
from microdit.pipeline.sources.tls_sessions import ResumingContext

QUICK = FetchOptions(timeout=6, idle_timeout=2, allow_networks=["127.0.0.0/8"])
BODY = b"a picture"


def certificate(folder: Path) -> Path:
    """Write the certificate that a host signed for itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    names = [x509.IPAddress(ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    kept = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "cert.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + kept)
    return path


class Server:
    """A web server by TLS, `/close/` ends the connection, `/odd/` breaks HTTP's rules."""

    def __init__(self, folder: Path):
        self._loop = asyncio.new_event_loop()
        self.resumed: list[bool] = []
        """Of each request, if its connection continued a session."""
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(certificate(folder))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.url = f"https://127.0.0.1:{port}"

    async def _start(self) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_get("/{what}/{rest}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.context)
        await site.start()
        return runner, runner.addresses[0][1]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.resumed.append(request.transport.get_extra_info("ssl_object").session_reused)
        if request.match_info["what"] == "odd":
            twice = b"Content-Length: 9\r\n" * 2
            request.transport.write(b"HTTP/1.1 200 OK\r\nbad header\r\n" + twice + b"Connection: close\r\n\r\n" + BODY)
            request.transport.close()
            return web.Response()
        if request.match_info["what"] == "away":
            return web.Response(status=302, headers={"Location": "/ok/1"})
        response = web.Response(body=BODY)
        if request.match_info["what"] == "close":
            response.force_close()
        return response

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def fetched(folder: Path, urls: list[str], options: FetchOptions) -> list[Input]:
    (folder / "list.jsonl").write_text("".join(json.dumps({"url": url, "caption": "c"}) + "\n" for url in urls))
    source = Urls("web", folder / "list.jsonl", 1000, options)
    return [item for unit in source.units() for item in source.read(unit, lambda _: True)]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_further_connection_continues_the_session(
    tmp_path: Path, server: Server, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.context.maximum_version = version
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tmp_path / "cert.pem")
    monkeypatch.setattr("microdit.pipeline.sources.web_client.resuming_context", lambda: context)
    one = QUICK.model_copy(update={"concurrency": 1, "robots_txt": False})
    found = fetched(tmp_path, [f"{server.url}/close/{n}" for n in range(4)], one)
    assert [(item.reason, item.data) for item in found] == [(None, BODY)] * 4
    assert server.resumed == [False, True, True, True]


def test_a_session_of_a_host_that_failed_is_not_continued(tmp_path: Path, server: Server) -> None:
    server.context.maximum_version = ssl.TLSVersion.TLSv1_2
    one = QUICK.model_copy(update={"concurrency": 1, "robots_txt": False})
    found = fetched(tmp_path, [f"{server.url}/close/{n}" for n in range(4)], one)
    assert [item.reason for item in found] == ["certificate"] * 4
    assert server.resumed == []


def test_a_certificate_that_fails_is_a_reason_of_its_own(tmp_path: Path, server: Server) -> None:
    found = fetched(tmp_path, [f"{server.url}/{what}/1" for what in ("ok", "odd", "away")], QUICK)
    assert [item.reason for item in found] == ["certificate"] * 3
    assert all("certificate" in item.detail for item in found)


def test_one_that_is_accepted_is_named_in_the_sample(tmp_path: Path, server: Server) -> None:
    accepting = QUICK.model_copy(update={"accept_failing_certificates": True})
    found = fetched(tmp_path, [f"{server.url}/{what}/1" for what in ("ok", "odd", "away", "close")], accepting)
    assert [(item.reason, item.data) for item in found] == [(None, BODY)] * 4
    for item in found:
        assert "self-signed certificate" in str(item.fields["unverified_certificate"])
    assert found[2].fields["final_url"] == f"{server.url}/ok/1"
