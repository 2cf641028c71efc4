"""A build on a cluster of three hosts that are started as infra/aws.yaml says, one of which loses its power.

Real: the commands of aws.yaml and of README.md, Ray's daemons, token authentication, job submission, the build, its web
server and its S3 server, all over the network. Not real: the machines, which are namespaces of this one
(tests/infra/hosts.py), so that no autoscaler starts them.
"""

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import VerifiedSamples, verify
from tests.infra.conftest import ROOT, SHARD, Pictures, committed, pictures
from tests.infra.hosts import Host, network, wait_for
from tests.servers.s3 import BUCKET, environ, s3_at

DASHBOARD = "http://127.0.0.1:8265"  # as `ray dashboard infra/aws.yaml` forwards it
SHARDS, FREE = 6, 2

QUICK = {  # a silent host is given up after some 20 s, not after minutes
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}


@dataclass
class Cluster:
    head: Host
    workers: list[Host]
    work: Pictures
    corpus: str


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    config = yaml.safe_load((ROOT / "infra/aws.yaml").read_text())
    options = [option.split(" ", 1) for option in config["docker"]["run_options"]]
    environment |= dict(value.split("=", 1) for flag, value in options if flag == "--env")
    (tmp_path / "token").write_text(secrets.token_hex(32))
    environment |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), **QUICK}
    with ExitStack() as stack:
        address, hosts = stack.enter_context(network(["head", "worker-1", "worker-2"], tmp_path, environment))
        aws = stack.enter_context(s3_at(address))
        stack.enter_context(environ(aws))
        work = stack.enter_context(pictures(address, tmp_path / "work", SHARDS, FREE))
        for host in hosts:
            host.environment |= {**aws, "RAY_HEAD_IP": hosts[0].address}
        # ...up to three times: Ray gives its daemons 30 s to start, however busy the machine is
        begin = " && ".join(config["head_start_ray_commands"])
        begin = begin.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
        hosts[0].run(f"({begin}) || ({begin}) || ({begin})")
        begin = " && ".join(config["worker_start_ray_commands"])
        starts = [host.start(f"({begin}) || ({begin}) || ({begin})", "start.log") for host in hosts[1:]]
        assert [start.wait() for start in starts] == [0, 0]
        yield Cluster(hosts[0], hosts[1:], work, f"s3://{BUCKET}/{tmp_path.name}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_goes_on_when_a_host_loses_its_power(cluster: Cluster) -> None:
    head, corpus_url = cluster.head, cluster.corpus

    def jobs() -> str:
        return head.run(f"ray job list --address {DASHBOARD}", check=False)

    wait_for(lambda: "Traceback" not in jobs(), jobs)  # the dashboard may begin to answer after the rest
    refused = head.run(f"ray job list --address {DASHBOARD}", {"RAY_AUTH_TOKEN_PATH": "/dev/null"}, check=False)
    assert "uthentication" in refused

    submit = (
        f"ray job submit --address {DASHBOARD} --submission-id build --working-dir {cluster.work.folder} "
        f"-- microdit build corpus.yaml --corpus {corpus_url}"
    )
    job = head.start(submit, "job.log")

    def running() -> None:
        assert job.poll() is None, said()

    def said() -> str:
        return (head.folder / "job.log").read_text()

    wait_for(lambda: committed(corpus_url, "latents/demo-64") == FREE, said, running)

    # all that is left hangs in the closed gate, at work on some host
    busy = [host for host in cluster.workers if "ray::ingest" in host.processes()]
    assert busy
    busy[0].lose_power()
    assert busy[0].init.returncode is not None
    assert committed(corpus_url, "images") == FREE < SHARDS
    cluster.work.gate.set()
    assert job.wait() == 0, said()

    nodes = head.run("ray list nodes --format json --limit 10 --address " + DASHBOARD)
    states = Counter(node["state"] for node in yaml.safe_load(nodes[nodes.index("[") :]))
    assert states == {"ALIVE": 2, "DEAD": 1}  # the loss was noticed, and the build ended without the host
    corpus = Corpus.open(corpus_url)
    found = verify(corpus)
    assert found.problems == []
    assert found.totals.samples["latents/demo-64"] == VerifiedSamples(SHARDS * SHARD, SHARDS * SHARD, failed=0)
    for column in ("images", "captions/source", "scores/basic", "latents/demo-64"):
        assert Counter(corpus.committed(column).values()) == {0: SHARDS}  # every shard once
    assert status(corpus).set_aside == []
    assert len(head.run(f"microdit ls {corpus_url} latents/demo-64").split()) == SHARDS
