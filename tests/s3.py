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
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

server = make_server(sys.argv[1], 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@contextmanager
def s3_at(host: str) -> Iterator[dict[str, str]]:
    """A server on an address of this machine, with the bucket; gives the environment of those who use it."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, host], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = f"http://{host}:{int(server.stdout.readline())}"
            environment = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            with environ(environment):
                boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield environment
        finally:
            server.kill()


@contextmanager
def environ(environment: dict[str, str]) -> Iterator[None]:
    """This process uses the server of `environment`, whatever it used before, and so do its children."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of the server; the environment points boto3, obstore and all child processes at it, the bucket is made."""
    with s3_at("127.0.0.1") as environment, environ(environment):
        yield environment["AWS_ENDPOINT_URL"]


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """A fresh prefix in the bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def corpus_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of a corpus that is not there yet: once a folder, once a prefix on S3."""
    if request.param == "folder":
        return str(tmp_path / "corpus")
    url: str = request.getfixturevalue("s3_url")
    return url
