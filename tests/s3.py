"""A real S3 server (moto's) in a process of its own on loopback, and the fixtures that give tests a corpus on it."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

BUCKET = "microdit-test"
SERVER = """
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of the server; the environment points boto3, obstore and all child processes at it, the bucket is made."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            with pytest.MonkeyPatch.context() as patch:
                for name in [name for name in os.environ if name.startswith("AWS_")]:
                    patch.delenv(name)
                patch.setenv("AWS_ENDPOINT_URL", url)
                patch.setenv("AWS_ACCESS_KEY_ID", "test")
                patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
                patch.setenv("AWS_REGION", "us-east-1")
                patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
                patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
                boto3.client("s3").create_bucket(Bucket=BUCKET)
                yield url
        finally:
            server.kill()


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
