"""Hosts on one machine: each has a network, processes, a name and a /tmp/ray of its own, and can lose its power.

A host is a set of Linux namespaces (network, process, mount, hostname), wired to one bridge by a virtual cable. Disk,
memory and CPUs are the machine's. Root and the command `ip` (Debian: iproute2) are needed.
"""

import os
import random
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

INIT = "trap : TERM; while :; do sleep 600 & wait; done"  # the first process of a host: reaps what others leave behind
PATIENCE = 300.0  # seconds that anything may take: the machine may be busy


@dataclass
class Host:
    """One host; `run` and `start` are for commands on it."""

    name: str
    address: str
    cable: str
    """The bridge's end of its cable."""
    folder: Path
    """Outputs of what it runs, and its /tmp/ray."""
    environment: dict[str, str]
    init: "subprocess.Popen[bytes]"
    pid: int
    """Of its first process, as the machine counts."""
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", "--uts", "--", *words]

    def run(self, script: str, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Run a bash script to its end; what it says."""
        done = subprocess.run(
            self.command("bash", "-c", script), env=self.environment | dict(environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {script}\nended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def start(self, script: str, log: str) -> "subprocess.Popen[bytes]":
        """Start a bash script; what it says goes to the file `log` of its folder."""
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                self.command("bash", "-c", script), env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    def processes(self) -> str:
        """The command lines of all that runs on it."""
        return self.run("ps -e -o args=")

    def lose_power(self) -> None:
        """Link down, so that no other host hears of it, then SIGKILL of every process at once."""
        ip(f"link set {self.cable} down")
        os.kill(self.pid, 9)  # the kernel ends all others of its namespace with it
        self.init.wait()


def ip(arguments: str) -> None:
    done = subprocess.run(["ip", *shlex.split(arguments)], capture_output=True, text=True)
    assert not done.returncode, f"ip {arguments}: {done.stderr}"


def missing() -> str:
    """Why this process cannot make hosts; empty if it can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    done = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True)
    return f"this root may not make namespaces: {done.stderr.decode().strip()}" if done.returncode else ""


@contextmanager
def network(names: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, list[Host]]]:
    """Hosts on one bridge, and the address at which they find this machine; all is gone at the end."""
    number = random.SystemRandom().randrange(2**16)
    net, bridge = f"10.{128 + number // 256 % 128}.{number % 256}", f"md{number:x}"
    hosts: list[Host] = []
    names_file = folder / "hosts"
    addresses = {name: f"{net}.{index}" for index, name in enumerate(names, 1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    names_file.write_text("\n".join(lines) + "\n")
    Path("/tmp/ray").mkdir(exist_ok=True)
    ip(f"link add {bridge} type bridge")
    try:
        ip(f"addr add {net}.254/24 dev {bridge}")
        ip(f"link set {bridge} up")
        for index, (name, address) in enumerate(addresses.items()):
            cable = f"{bridge}-{index}"
            hosts.append(_host(name, address, f"{net}.254", cable, folder / name, names_file, environment))
        yield f"{net}.254", hosts
    finally:
        for host in hosts:
            host.init.kill()
            with suppress(ProcessLookupError):
                os.kill(host.pid, 9)
            for process in [host.init, *host.started]:
                process.wait()
        ip(f"link del {bridge}")


def _host(
    name: str, address: str, gateway: str, cable: str, folder: Path, names_file: Path, environment: Mapping[str, str]
) -> Host:
    (folder / "ray").mkdir(parents=True)
    setup = f"""
        hostname {name}
        mount --bind {shlex.quote(str(folder / "ray"))} /tmp/ray
        mount --bind {shlex.quote(str(names_file))} /etc/hosts
        {INIT}"""
    flags = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "init.log").open("wb") as log:
        init = subprocess.Popen(["unshare", *flags, "bash", "-ec", setup], stdout=log, stderr=subprocess.STDOUT)
    children = Path(f"/proc/{init.pid}/task/{init.pid}/children")
    wait_for(lambda: children.read_text().strip(), lambda: f"{name} has no first process")
    pid = int(children.read_text())
    host = Host(name, address, cable, folder, dict(environment), init, pid)
    ip(f"link add {cable} type veth peer name eth0 netns {pid}")
    ip(f"link set {cable} master {cable.partition('-')[0]} up")
    host.run(
        f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {gateway}"
    )
    wait_for(lambda: name in host.run("hostname; cat /etc/hosts"), lambda: f"{name} does not know its name")
    return host


def wait_for(ready: Callable[[], object], what: Callable[[], str], during: Callable[[], None] = lambda: None) -> None:
    """Wait until something is true; fails with `what` if it does not become so. `during` may find out earlier."""
    until = time.monotonic() + PATIENCE
    while not ready():
        during()
        assert time.monotonic() < until, what()
        time.sleep(0.05)
