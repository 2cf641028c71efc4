"""RAY_ADDRESS is checked before Ray is asked, which takes minutes over a head that is gone; and Ray's folder."""

import socket
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.engine import cluster


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "ray://10.0.0.1:10001", "10.0.0.1", ":6379", "host:port"])
def test_what_is_no_heads_address_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match=f"RAY_ADDRESS={address}: expected HOST:PORT"):
        cluster.check_address(address)


def test_a_head_that_is_gone_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 1.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(RequestError, match="no Ray cluster answers there"):
            cluster.check_address(address)
        listening.listen()
        cluster.check_address(address)
    cluster.check_address("auto")


def test_a_folder_too_long_for_sockets_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(RequestError, match=r"Ray cannot start here: .*RAY_TMPDIR=/tmp, or another short path"):
        cluster.joined().__enter__()
