"""A build on a cluster that grows: Ray's own autoscaler sees what the build asks for, and adds nodes.

Real: the autoscaler, the demand, the nodes' daemons, the build, its web server and its S3 server. Not real: the
provider, Ray's `fake_multinode`, which starts a node as processes of the head's host; the node types are those of
infra/aws.yaml with fewer CPUs. It never takes a node away: that part of the autoscaler is not tried.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.infra.conftest import ROOT, Pictures, committed, pictures
from tests.infra.hosts import Host, network, wait_for
from tests.servers.s3 import BUCKET, environ, s3_at

SHARDS, FREE = 8, 2

PROVIDER = {
    "type": "fake_multinode",
    "head_node_id": "fffffffffffffffffffffffffffffffffffffffffffffffffff00000",
    "disable_node_updaters": True,  # which log in by ssh
    "disable_launch_config_check": True,
    "foreground_node_launch": True,
    "use_node_id_as_ip": True,  # all nodes have one address: by it none is known to be there
}


@dataclass
class Growing:
    head: Host
    work: Pictures
    corpus: str


def config_of(folder: Path) -> Path:
    """infra/aws.yaml for the fake provider: a head without CPUs, workers of one CPU, none of them at the start."""
    config = yaml.safe_load((ROOT / "infra/aws.yaml").read_text())
    types = config["available_node_types"]
    del types["gpu"]
    types["cpu"] |= {"resources": {"CPU": 1}, "min_workers": 1, "max_workers": 2, "node_config": {}}
    types["ray.head.default"] = types.pop("head") | {"node_config": {}, "max_workers": 0}
    found = {
        "cluster_name": config["cluster_name"],
        "max_workers": 2,
        "idle_timeout_minutes": config["idle_timeout_minutes"],
        "upscaling_speed": 1.0,
        "provider": PROVIDER,
        "auth": {},
        "docker": {},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    path = folder / "autoscaler.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


@pytest.fixture
def growing(tmp_path: Path, environment: dict[str, str]) -> Iterator[Growing]:
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1"}
    with ExitStack() as stack:
        address, (head,) = stack.enter_context(network(["head"], tmp_path, environment))
        aws = stack.enter_context(s3_at(address))
        stack.enter_context(environ(aws))
        work = stack.enter_context(pictures(address, tmp_path / "work", SHARDS, FREE))
        head.environment |= {**aws, "RAY_ADDRESS": f"{head.address}:6379"}
        start = f"ray start --head --port=6379 --num-cpus=0 --autoscaling-config={config_of(tmp_path)}"
        head.run(f"env -u RAY_ADDRESS {start} || env -u RAY_ADDRESS {start}")
        yield Growing(head, work, f"s3://{BUCKET}/{tmp_path.name}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_grows_to_what_the_build_may_take(growing: Growing) -> None:
    head = growing.head

    def nodes(state: str) -> int:
        """Nodes with CPUs: the head has none."""
        said = head.run("ray list nodes --format json --limit 100", check=False)
        found = yaml.safe_load(said[said.index("[") :]) if "[" in said else []
        return sum(node["state"] == state and "CPU" in node["resources_total"] for node in found)

    def said() -> str:
        monitor = list((head.folder / "ray").glob("session_2*/logs/monitor.log"))
        return (head.folder / "build.log").read_text() + "\n".join(path.read_text()[-3000:] for path in monitor)

    wait_for(lambda: nodes("ALIVE") == 1, lambda: "no first worker")
    build = head.start(
        f"cd {growing.work.folder} && microdit build corpus.yaml --corpus {growing.corpus} resources.cpus=2",
        "build.log",
    )
    wait_for(lambda: nodes("ALIVE") == 2, said)  # the pictures that are left are asked for, and do not come
    assert committed(growing.corpus, "latents/demo-64") <= FREE
    growing.work.gate.set()
    assert build.wait() == 0, said()

    corpus = Corpus.open(growing.corpus)
    assert verify(corpus).problems == []
    for column in ("images", "captions/source", "scores/basic", "latents/demo-64"):
        assert Counter(corpus.committed(column).values()) == {0: SHARDS}
    assert status(corpus).set_aside == []
