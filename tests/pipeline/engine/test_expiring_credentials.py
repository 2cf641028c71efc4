"""Real builds on a bucket whose credentials expire every few seconds, and whose successors boto3's chain finds."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.tar_build import INPUTS, write_tars
from tests.servers.faulty_s3 import FaultyS3

ROOT = Path(__file__).parents[3]
UNITS_READ, SHARD = 4, 15
BUILD = "from microdit.pipeline.cli.app import main; main()"


class Issuer(set[str]):
    """Issues session tokens, of which the bucket takes the newest alone: all others are in this set.

    Args:
        lives: seconds after which a token expires.
        early: it says that it lives for an hour.
        gap: seconds from then until the next one can be had.
        file: where the newest one lies, for `credential_process`.
    """

    def __init__(self, lives: float, early: bool, gap: float, file: Path):
        self.lives, self.early, self.gap, self.file = lives, early, gap, file
        self.number, self.ended = 0, threading.Event()
        self.used, self.refused = Counter[str](), 0
        self._valid = ""
        self._issue()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def _issue(self) -> None:
        self.number += 1
        self._valid = f"token-{self.number}"
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"Version": 1, "SessionToken": self._valid} | self._keys()))
        partial.replace(self.file)

    def _keys(self) -> dict[str, str]:
        until = datetime.now(UTC) + timedelta(seconds=3600 if self.early else self.lives)
        keys = {"AccessKeyId": f"key-{self.number}", "SecretAccessKey": "x"}
        return keys | {"Expiration": f"{until:%Y-%m-%dT%H:%M:%S.%fZ}"}

    def of_container(self) -> bytes:
        """The newest credentials as a container's endpoint gives them."""
        given = json.loads(self.file.read_text())
        return json.dumps({"Token": given.pop("SessionToken")} | given).encode()

    def _go_on(self) -> None:
        while not self.ended.wait(self.lives):
            self._valid = ""
            self.ended.wait(self.gap)
            self._issue()

    def __contains__(self, token: object) -> bool:
        if token == self._valid and token:
            self.used[str(token)] += 1
            return False
        self.refused += 1
        return True

    def __enter__(self) -> "Issuer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self._thread.join()


Container = tuple[str, list[Issuer]]


@pytest.fixture
def container() -> Iterator[Container]:
    """The endpoint from which a container has its credentials: its URL, and whose credentials it gives."""
    issuers: list[Issuer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = issuers[0].of_container()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/credentials", issuers
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "early", "gap"),
    [("process", True, 0.0), ("process", False, 3.0), ("container", True, 3.0), ("container", False, 0.0)],
)
def test_a_build_goes_on_with_the_ones_that_come(
    s3_server: str, s3_url: str, tmp_path: Path, container: Container, how: str, early: bool, gap: float
) -> None:
    """Sources and corpus are on the bucket; every fourth request takes a while, so that many tokens are needed."""
    write_tars(tmp_path / "tars", 0, UNITS_READ)
    store = open_store(f"{s3_url}/source")
    for path in (tmp_path / "tars").iterdir():
        store.create(path.name, path.read_bytes())
    source = {"adapter": "webdataset", "files": f"{s3_url}/source/*.tar"}
    config = {
        "name": "e", "corpus": f"{s3_url}/corpus", "shard_samples": SHARD, "images": {"min_side": 32},
        "sources": {"own": source}, "columns": {"captions/source": {}, "scores/basic": {}},
        "resources": {"scratch": str(tmp_path / "scratch")},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    issuer = Issuer(4.0, early, gap, tmp_path / "credentials.json")
    container[1].append(issuer)
    given = {name: value for name, value in os.environ.items() if not name.startswith("AWS_") and name != "RAY_ADDRESS"}
    given |= {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT)}
    given |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_CONFIG_FILE": str(tmp_path / "aws-config")}
    if how == "process":
        (tmp_path / "aws-config").write_text(f"[default]\ncredential_process = cat {issuer.file}\n")
    else:
        given["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = container[0]
    with FaultyS3(s3_server, 0, {"stall": 0.25}, stall_seconds=(0.3,)) as proxy, issuer:
        proxy.expired = issuer
        given["AWS_ENDPOINT_URL"] = proxy.url
        command = [sys.executable, "-c", BUILD, "build", str(tmp_path / "config.yaml")]
        done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(issuer.used) >= 3 and (issuer.refused >= 2 or not early), (issuer.used, issuer.refused)

    corpus = Corpus.open(f"{s3_url}/corpus")
    found = verify(corpus)
    assert found.problems == []
    shards = UNITS_READ * INPUTS // SHARD
    assert {name: samples.inputs for name, samples in found.totals.samples.items()} == dict.fromkeys(
        (IMAGES, "captions/source", "scores/basic"), UNITS_READ * INPUTS
    )
    for column in (IMAGES, "captions/source", "scores/basic"):
        assert Counter(corpus.committed(column).values()) == {0: shards}  # every shard once
    assert len(corpus.committed(UNITS)) == UNITS_READ and status(corpus).set_aside == []
    assert gc(corpus, older_than_hours=0, dry_run=True).attempts == 0  # and nothing was written for nothing
