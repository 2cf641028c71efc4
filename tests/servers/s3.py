"""A real S3 server (moto's) in a process of its own, and the fixtures that give tests a corpus on it, on loopback."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

BUCKET = "microdit-test"

SERVER = """
import sys
import io
import threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def app(environ, start_response):
    if "HTTP_IF_NONE_MATCH" not in environ:
        return moto(environ, start_response)
    # moto looks whether the name is free and writes later: one such request at a time, as S3 has it
    length = int(environ["CONTENT_LENGTH"])
    body = environ["wsgi.input"].read(length)
    if len(body) < length:
        start_response("400 Bad Request", [("Content-Length", "0")])
        return []
    environ["wsgi.input"] = io.BytesIO(body)
    with lock:
        return moto(environ, start_response)

server = make_server(sys.argv[1], 0, app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@contextmanager
def serve(host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server on an address of this machine; yield its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, host], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield f"http://{host}:{int(server.stdout.readline())}"
        finally:
            server.kill()


def environment(url: str) -> dict[str, str]:
    """Make the environment that points boto3, obstore and child processes at a server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def environ(environment: dict[str, str]) -> Iterator[None]:
    """Make this process and its children use the server of `environment`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@contextmanager
def s3_at(host: str) -> Iterator[dict[str, str]]:
    """Run a server with the bucket; yield the environment of its clients."""
    with serve(host) as url:
        found = environment(url)
        with environ(found):
            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of the server; the environment points boto3, obstore and all child processes at it, the bucket is made."""
    with s3_at("127.0.0.1") as found, environ(found):
        yield found["AWS_ENDPOINT_URL"]


@pytest.fixture
def s3_url(s3_server: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix in the bucket; what is kept of it on this machine goes with the test."""
    kept = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    monkeypatch.setenv("HF_HOME", os.environ.get("HF_HOME") or f"{kept}/huggingface")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def corpus_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of a new corpus: once a folder, once a prefix on S3."""
    if request.param == "folder":
        return str(tmp_path / "corpus")
    url: str = request.getfixturevalue("s3_url")
    return url
