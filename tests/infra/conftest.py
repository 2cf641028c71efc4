"""What a cluster works on: pictures on a web server, a config that lists them, and the environment of its hosts."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from tests.infra import hosts

ROOT = Path(__file__).parent.parent.parent
SHARD = 4  # pictures of a shard; a unit is one shard

CONFIG = {
    "name": "pictures",
    "corpus": "given on the command line",
    "shard_samples": SHARD,
    "sources": {
        "pictures": {
            "adapter": "urls",
            "list": "list.tsv",
            "unit_inputs": SHARD,
            "fetch": {"timeout": 600, "idle_timeout": 600, "allow_networks": ["10.0.0.0/8", "127.0.0.0/8"]},
        }
    },
    "images": {"min_side": 32},
    "columns": {
        "captions/source": {},
        "scores/basic": {},
        "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
    },
}


@dataclass
class Pictures:
    """A folder with a config and its list; the first shards asked for are served, all others when `gate` is set."""

    folder: Path
    shards: int
    gate: threading.Event


@contextmanager
def pictures(address: str, folder: Path, shards: int, free: int) -> Iterator[Pictures]:
    """Serve the pictures of so many shards on an address of this machine; `free` shards do not wait for the gate.

    Which ones these are is for the build to say, which takes its units in any order.
    """
    gate, asked, lock = threading.Event(), set[int](), threading.Lock()
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(data, "jpeg")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shard = int(self.path[1:]) // SHARD
            with lock:
                if len(asked) < free:
                    asked.add(shard)
            if shard not in asked:
                gate.wait()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data.getvalue())))
            self.end_headers()
            self.wfile.write(data.getvalue())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder.mkdir()
    lines = [f"http://{address}:{server.server_port}/{n}\tpicture {n}\n" for n in range(shards * SHARD)]
    (folder / "list.tsv").write_text("".join(lines))
    (folder / "corpus.yaml").write_text(yaml.safe_dump(CONFIG))
    try:
        yield Pictures(folder, shards, gate)
    finally:
        gate.set()
        server.shutdown()


def committed(url: str, column: str) -> int:
    """How many shards of a column are committed; none if there is no corpus yet."""
    try:
        return len(Corpus.open(url).committed(column))
    except RequestError:
        return 0


@pytest.fixture
def environment() -> dict[str, str]:
    """Of the hosts: this Python's commands, this checkout's packages, one thread; nothing of Ray or a bucket yet."""
    if reason := hosts.missing():
        pytest.skip(reason)
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return kept | {
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
