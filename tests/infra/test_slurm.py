"""infra/slurm/*.sbatch: what they do on a signal, with stubs; and whole, on a real Slurm of two nodes.

Real in `test_a_build...` and `test_a_training...`: Debian's slurmctld, slurmd, sbatch, srun, scancel and scontrol, the
scripts as they are, Ray, torchrun, the build and the training. Not real: the machines (namespaces of this one,
tests/infra/hosts.py), munge (Slurm's own `auth/none` instead), and the time limit: `scancel` sends its SIGUSR1.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.upkeep.verify import verify
from tests.infra.conftest import ROOT, SHARD, committed, pictures
from tests.infra.hosts import PATIENCE, Host, network, wait_for
from tests.servers.s3 import BUCKET, environ, s3_at
from tests.trainer.conftest import MODEL, STAGE, build_corpus

SCRIPTS = ROOT / "infra/slurm"


# -- the scripts alone: every command that they call is a stub ---------------------------------------------------------
STUBS = {
    "srun": """
        while [[ $1 = --* ]]; do shift; done
        export SLURM_LAUNCH_NODE_IPADDR=192.0.2.1
        set -m # one task, here, with a process group of its own
        "$@" & echo $! > task
        wait $!""",
    "scancel": '[ "${2%.*}" = 123456 ] && kill "${1/--signal=/-}" -- -$(cat task)',
    "ray": '[[ $* = *--address* ]] && exec sleep 60; exec test -z "$NO_RAY"',
    "microdit": 'trap "exit 143" TERM; printf "%s|" "$@" "$RAY_ADDRESS" "$RAY_AUTH_MODE" > asked; eval "$WORK"',
    "torchrun": 'trap "exit 1" TERM; printf "%s|" "$@" > asked; eval "$WORK"',  # it answers a SIGTERM with 1
    "scontrol": 'echo "$@" > scontrol-asked',
}

ASKED = {
    "build.sbatch": "build|one|two words|192.0.2.1:23456|token|",
    "train.sbatch": "--nnodes=2|--nproc-per-node=8|--max-restarts=3|--rdzv-backend=c10d|"
    "--rdzv-endpoint=192.0.2.1:23456|--rdzv-id=123456|-m|microdit.trainer|one|two words|",
}


@contextmanager
def script(name: str, folder: Path, work: str, **more: str) -> Iterator["subprocess.Popen[str]"]:
    """A script whose program does `work`; what it says goes to the file `out`."""
    for command, text in STUBS.items():
        (folder / command).write_text(f"#!/bin/bash\n{text}\n")
        (folder / command).chmod(0o755)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "2", "SLURM_GPUS_ON_NODE": "8", "WORK": work,
    }  # fmt: skip
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            ["bash", str(SCRIPTS / name), "one", "two words"], cwd=folder, env=environment | more, text=True,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("name", ["build.sbatch", "train.sbatch"])
@pytest.mark.parametrize(("number", "asked"), [(signal.SIGTERM, None), (signal.SIGUSR1, "requeue 123456\n")])
def test_a_signal_is_passed_on_and_the_job_ends_with_143(
    name: str, number: signal.Signals, asked: str | None, tmp_path: Path
) -> None:
    with script(name, tmp_path, "sleep 0.1\n" * 3000) as process:
        wait_for((tmp_path / "asked").exists, (tmp_path / "out").read_text)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 143, (tmp_path / "out").read_text()
    found = tmp_path / "scontrol-asked"
    assert (found.read_text() if found.exists() else None) == asked


@pytest.mark.parametrize("name", ["build.sbatch", "train.sbatch"])
@pytest.mark.parametrize("status", [0, 1, 2])
def test_without_a_signal_the_job_ends_as_its_program_does(name: str, status: int, tmp_path: Path) -> None:
    with script(name, tmp_path, f"exit {status}") as process:
        assert process.wait(PATIENCE) == status, (tmp_path / "out").read_text()
    assert (tmp_path / "asked").read_text() == ASKED[name]
    assert not (tmp_path / "scontrol-asked").exists()


def test_a_job_in_which_ray_cannot_start_ends(tmp_path: Path) -> None:
    with script("build.sbatch", tmp_path, "exit 0", NO_RAY="1") as process:
        assert process.wait(PATIENCE) == 1
    assert not (tmp_path / "asked").exists()


# -- on a real Slurm ---------------------------------------------------------------------------------------------------
SLURM_CONF = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
NodeName=node[1-2] CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """Two nodes; jobs are submitted on the first."""

    def __init__(self, hosts: list[Host], address: str, folder: Path):
        self.hosts, self.address, self.folder = hosts, address, folder

    def submit(self, script: str, *arguments: str) -> None:
        """`sbatch` on both nodes, from the folder `work`."""
        options = f"--nodes=2 --output={self.folder}/job.out"
        self.hosts[0].run(f"cd {self.folder}/work && sbatch {options} {SCRIPTS / script} {' '.join(arguments)}")

    def job(self) -> dict[str, str]:
        words = self.hosts[0].run("scontrol --oneliner show job 1").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self) -> str:
        path = self.folder / "job.out"
        return path.read_text() if path.exists() else ""

    def running(self) -> None:
        state = self.job()["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}: {self.output()}"

    def warn_of_the_time_limit(self) -> None:
        """What `--signal=B:USR1` makes Slurm do; gives back control when the job waits in the queue again."""
        self.hosts[0].run("scancel --batch --signal=USR1 1")
        wait_for(lambda: self.job()["Restarts"] == "1", lambda: f"not requeued: {self.job()} {self.output()}")

    def wait(self) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        wait_for(lambda: self.job()["JobState"] in over, lambda: f"not over: {self.job()} {self.output()}")
        assert (self.job()["JobState"], self.job()["ExitCode"]) == ("COMPLETED", "0:0"), self.output()


@pytest.fixture
def slurm(tmp_path: Path, environment: dict[str, str]) -> Iterator[Slurm]:
    config = tmp_path / "slurm.conf"
    config.write_text(SLURM_CONF.format(folder=tmp_path))
    (tmp_path / "state").mkdir()
    with network(["node1", "node2"], tmp_path, environment | {"SLURM_CONF": str(config)}) as (address, hosts):
        hosts[0].start("slurmctld -D", "slurmctld.log")
        for host in hosts:
            host.start("slurmd -D", "slurmd.log")

        def nodes() -> str:
            return hosts[0].run("sinfo -h -o %T%D", check=False).strip()

        wait_for(lambda: nodes() == "idle2", nodes)
        yield Slurm(hosts, address, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_build_stops_before_its_time_is_up_and_goes_on_from_the_queue(slurm: Slurm) -> None:
    shards, free, url = 6, 2, f"s3://{BUCKET}/{slurm.folder.name}"
    columns = ("images", "captions/source", "scores/basic")
    with ExitStack() as stack:
        aws = stack.enter_context(s3_at(slurm.address))
        stack.enter_context(environ(aws))
        work = stack.enter_context(pictures(slurm.address, slurm.folder / "work", shards, free))
        for host in slurm.hosts:
            host.environment |= aws

        def made() -> int:
            return min(committed(url, column) for column in columns)

        slurm.submit("build.sbatch", "corpus.yaml", "--corpus", url, "--columns", ",".join(columns))
        wait_for(lambda: made() == free, lambda: f"it did not get that far: {slurm.output()}", slurm.running)
        for host in slurm.hosts:
            wait_for(lambda host=host: "/raylet" in host.processes(), slurm.output, slurm.running)
        slurm.warn_of_the_time_limit()
        assert made() == free < shards
        assert "stopped by SIGTERM" in slurm.output()
        for host in slurm.hosts:
            assert "/raylet" not in host.processes() and "microdit" not in host.processes()
            assert "ray-1" not in host.run("ls /tmp").split()

        work.gate.set()
        slurm.wait()
        corpus = Corpus.open(url)
        assert verify(corpus)["problems"] == []
        for column in columns:
            commits = corpus.commits(column)
            assert sum(commit.counts["out"] for commit in commits) == shards * SHARD
            assert len(commits) == shards


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_training_writes_a_checkpoint_before_its_time_is_up_and_goes_on_from_it(slurm: Slurm) -> None:
    (slurm.folder / "work").mkdir()
    corpus = build_corpus(slurm.folder / "corpus")
    steps, run = 300, slurm.folder / "run"
    recipe = {
        "name": "test", "corpus": corpus.url, "out": str(run), "model": MODEL, "lanes": 8, "precision": "fp32",
        "text": {"text/tiny@source": 1.0}, "text_lengths": [8], "stages": [STAGE | {"steps": steps}],
        "log_every": 1, "checkpoint_every": 10_000,
    }  # fmt: skip
    (slurm.folder / "work/recipe.yaml").write_text(yaml.safe_dump(recipe))

    def logged() -> list[int]:
        path = run / "log.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    slurm.submit("train.sbatch", "recipe.yaml", "seed=1")
    wait_for(logged, lambda: f"the training did not begin: {slurm.output()}", slurm.running)
    for host in slurm.hosts:
        assert "-m microdit.trainer" in host.processes()  # one training on both nodes
    slurm.warn_of_the_time_limit()
    (before,) = (run / "checkpoints").iterdir()
    stopped = int(before.name.partition("-")[2])
    assert 0 < stopped < steps
    assert "stopped:" in slurm.output()
    slurm.wait()
    assert f"from {before}" in slurm.output()
    assert logged() == list(range(1, steps + 1))  # no step twice, none left out
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir()
