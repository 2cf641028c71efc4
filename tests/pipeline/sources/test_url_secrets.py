"""Passwords and signatures in URLs of a list are sent, and stand in nothing that is kept."""

import base64
from pathlib import Path

from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.urls import Urls
from tests.servers.sloppy import SloppyServer, picture

QUICK = FetchOptions(contact="me@h.test", timeout=4, idle_timeout=2, allow_networks=["127.0.0.0/8"], robots_txt=False)
LOGIN = f"Basic {base64.b64encode(b'me:s3cret').decode()}"


def test_they_are_sent_and_not_kept(tmp_path: Path):
    with SloppyServer() as server:
        host = server.url.removeprefix("http://")
        mine = f"http://me:s3cret@{host}"
        urls = [
            f"{mine}/ok/1",
            f"{mine}/close/icy",
            f"{mine}/to/ok/3",
            f"{mine}/away/http://other:s3cret@{host}/ok?sig=s3cret",
            f"{mine}/away/{server.url}/ok",
            f"{server.url}/ok?X-Amz-Signature=s3cret&a=b",
            f"{mine}/status/404?token=s3cret",
            f"http://me:s3cret@{host}1/",
            f"ftp://me:s3cret@{host}/",
            f"{mine}/away/ftp://me:s3cret@{host}",
        ]
        (tmp_path / "list.tsv").write_text("".join(f"{url}\tcaption\n" for url in urls) + "x\t" * 9 + f"{mine}\n")
        source = Urls("web", tmp_path / "list.tsv", 100, QUICK)
        said: list[str] = []
        with source.running(Corpus.create(tmp_path / "corpus", "x"), said.append):
            found = list(source.read("web-000000", lambda ordinal: True))
        assert len(said) == 1 and "passwords or signatures" in said[0] and "s3cret" not in said[0]
        sent = dict(zip(server.asked, server.logins, strict=True))
    assert sent["/ok/1"] == sent["/close/icy"] == sent["/to/ok/3"] == sent["/ok/3"] == LOGIN
    assert sent["/ok"] is None and sent["/ok?sig=s3cret"] != LOGIN
    assert [item.data for item in found[:2]] == [picture("/ok/1"), picture("/close/icy")]
    assert found[5].data == picture("/ok?X-Amz-Signature=s3cret&a=b")
    assert found[5].origin == f"{server.url}/ok?X-Amz-Signature=***&a=b" and not found[5].fields
    assert found[0].origin == f"{server.url}/ok/1" and not found[0].fields
    assert found[3].fields == {"final_url": f"{server.url}/ok?sig=***"}
    assert [item.reason for item in found[6:]] == [
        *("http_404", "bad_url", "unreadable_list_line", "bad_url", "unreadable_list_line")
    ]
    for item in found:
        assert "s3cret" not in f"{item.origin} {item.detail} {item.fields}"


def test_a_list_without_any_says_nothing(tmp_path: Path):
    (tmp_path / "list.tsv").write_text("http://h/a?b=c\tsig=nature\n")
    said: list[str] = []
    with Urls("web", tmp_path / "list.tsv", 100, QUICK).running(Corpus.create(tmp_path / "corpus", "x"), said.append):
        assert said == []
