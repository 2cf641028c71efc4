"""Credentials of a bucket that expire in the middle: new ones are waited for, then one message says what to do."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import CredentialsExpired, RequestError
from microdit.pipeline.engine import retries
from microdit.pipeline.engine.plan import Job
from microdit.pipeline.engine.retries import Retries
from microdit.pipeline.engine.workers import error_report
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.storage import credentials
from microdit.pipeline.storage.store import Store, open_store
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import environ, environment

Renew = Callable[[str], None]


@pytest.fixture
def profile(tmp_path: Path) -> Renew:
    """Write a file of credentials with this session token."""

    def renew(token: str) -> None:
        text = f"[default]\naws_access_key_id = test\naws_secret_access_key = test\naws_session_token = {token}\n"
        partial = tmp_path / "partial"
        partial.write_text(text)
        partial.rename(tmp_path / "credentials")

    renew("old")
    return renew


@pytest.fixture
def proxy(s3_server: str, tmp_path: Path, profile: Renew, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A bucket whose clients have the file of credentials."""
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.05)
    with FaultyS3(s3_server, 0, rates={}) as running:
        found = {name: value for name, value in environment(running.url).items() if not name.endswith(("_ID", "_KEY"))}
        with environ(found | {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}):
            yield running


def publish(store: Store) -> None:
    with store.scratch("large") as path:
        path.write_bytes(bytes(6 << 20))
        store.publish({"large": path})


REQUESTS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.get("one"),
    "read a part": lambda store: store.get_range("one", 0, 1),
    "open": lambda store: store.open("one").read(),
    "look": lambda store: store.exists("one"),
    "list": lambda store: list(store.names()),
    "create": lambda store: store.create("two", b"2"),
    "publish": publish,
    "renew": lambda store: store.renew("one", b"1"),
    "delete": lambda store: store.delete(["one"]),
}


def test_every_request_goes_on_with_the_ones_that_come(proxy: FaultyS3, profile: Renew, s3_url: str) -> None:
    for number, request in enumerate(REQUESTS.values()):
        profile(f"token-{number}")
        store = open_store(f"{s3_url}/{number}")
        store.create("one", b"1")
        proxy.expired.add(f"token-{number}")
        timer = threading.Timer(0.2, profile, ["new"])
        timer.start()
        request(store)
        timer.join()


def test_a_download_goes_on_with_the_ones_that_come(
    proxy: FaultyS3, profile: Renew, s3_url: str, tmp_path: Path
) -> None:
    open_store(s3_url).create("x.tar", b"abc")
    proxy.expired.add("old")
    threading.Timer(0.2, profile, ["new"]).start()
    with local_copy(RemoteFile("x.tar", f"{s3_url}/x.tar", 3), tmp_path / "scratch") as path:
        assert path.read_bytes() == b"abc"


def test_a_process_that_gives_expired_ones_is_asked_again(proxy: FaultyS3, s3_url: str, tmp_path: Path) -> None:
    """boto3 says so itself then, before anything is sent."""

    def give(hours: int) -> None:
        until = datetime.now(UTC) + timedelta(hours=hours)
        keys = {"AccessKeyId": f"key{hours}", "SecretAccessKey": "test", "SessionToken": "new", "Version": 1}
        (tmp_path / "partial").write_text(json.dumps(keys | {"Expiration": f"{until:%Y-%m-%dT%H:%M:%SZ}"}))
        (tmp_path / "partial").rename(tmp_path / "given.json")

    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/given.json\n")
    files = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in files.items():
            patch.setenv(name, value)
        give(-1)
        store = open_store(s3_url)
        timer = threading.Timer(0.5, give, [1])
        timer.start()
        store.create("one", b"1")
        timer.join()
        assert store.get("one") == b"1"


@pytest.mark.parametrize("name", REQUESTS)
def test_one_message_when_none_come(name: str, proxy: FaultyS3, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials.PATIENCE < 60
    monkeypatch.setattr(credentials, "PATIENCE", 0.2)
    store = open_store(s3_url)
    proxy.expired.add("old")
    began = time.monotonic()
    with pytest.raises(CredentialsExpired, match=r"expired \(ExpiredToken\); .*credentials-file: renew them") as raised:
        REQUESTS[name](store)
    assert time.monotonic() - began < 5
    assert raised.value.may_come


def test_those_of_the_environment_cannot_change(proxy: FaultyS3, s3_url: str) -> None:
    proxy.expired.add("old")
    with pytest.MonkeyPatch.context() as patch:  # undone before what `proxy` has set
        for variable, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("SESSION_TOKEN", "old")):
            patch.setenv(f"AWS_{variable}", value)
        words = r"set new ones, or use a profile .* run the same command"
        with pytest.raises(CredentialsExpired, match=words) as raised:
            open_store(s3_url).exists("one")
    assert not raised.value.may_come and error_report(raised.value).is_request


def test_a_build_says_it_once_waits_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    report = error_report(CredentialsExpired("s3://x: the credentials have expired", may_come=True))
    assert report.credentials_expired and not report.is_request
    history, jobs = Retries(2, 8), [Job(0, "s", f"s-000000-0{number}", {}) for number in range(3)]
    for _ in range(5):
        for job in jobs:
            assert history.raised(job, report, "node") == retries.BACKOFF_SECONDS
    assert len(history.news) == 1 and "for 10 minutes new ones are waited for" in history.news[0]
    assert history.of(jobs[0]).attempts == 0
    monkeypatch.setattr(retries, "EXPIRED_SECONDS", 0.0)
    with pytest.raises(RequestError, match="None came in"):
        history.raised(jobs[0], report, "node")
    history.done(jobs[0])
    assert history.raised(jobs[1], report, "node") is not None
