"""The command line on a small real corpus: images over HTTP from a loopback server, through Ray."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from obstore.exceptions import PermissionDeniedError
from PIL import Image
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from microdit.pipeline.storage.disk import Disk

ROOT = Path(__file__).parents[3]
COUNT, SHARD, BAD = 24, 4, (5, 17)

CONFIG = """
name: small
corpus: {corpus}
shard_samples: 4
max_failures: 0.2
sources:
  pictures: {{adapter: urls, list: {list}, unit_inputs: 8, fetch: {{concurrency: 1, allow_networks: [127.0.0.0/8]}}}}
images: {{min_side: 16, max_side: 64}}
columns:
  captions/source: {{}}
  scores/basic: {{}}
"""


class Pictures(BaseHTTPRequestHandler):
    """`/<number>.png`, slowly; the bad ones are 404."""

    def do_GET(self) -> None:
        time.sleep(0.1)
        number = int(Path(self.path).stem)
        if number in BAD:
            self.send_error(404)
            return
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "png")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(buffer.tell()))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@dataclass
class Built:
    """A corpus that was built by the command line, interrupted once."""

    config: Path
    corpus: Path
    interrupted: "subprocess.CompletedProcess[str]"
    left_by_it: int
    finished: Result


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("cli")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    (folder / "list.tsv").write_text("".join(f"{url}/{i}.png\tpicture number {i}\n" for i in range(COUNT)))
    config, corpus = folder / "small.yaml", folder / "corpus"
    config.write_text(CONFIG.format(corpus=folder / "nowhere", list=folder / "list.tsv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        interrupted = interrupt(["build", str(config), "--corpus", str(corpus)], corpus)
        left = COUNT // SHARD - len(list((corpus / "commits/images").rglob("*.json")))
        yield Built(config, corpus, interrupted, left, microdit("build", config, "--corpus", corpus, "--json"))
    server.shutdown()
    server.server_close()


def interrupt(arguments: list[str], corpus: Path) -> "subprocess.CompletedProcess[str]":
    """Run a build in a process group of its own, and press Ctrl-C after the first shard."""
    program = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", *arguments]
    process = subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until = time.monotonic() + 150
        while not list((corpus / "commits/images").rglob("*.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "the build did not begin"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def test_a_list_that_is_gone_is_needed_no_more(built: Built) -> None:
    """All that it lists is committed."""
    result = microdit("build", built.config, "--corpus", built.corpus, "sources.pictures.list=/not/there.tsv")
    assert result.exit_code == 0 and "/not/there.tsv" in result.output and "what is committed" in result.output


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(built: Built) -> None:
    assert built.interrupted.returncode == 130, built.interrupted.stderr
    assert built.interrupted.stderr.splitlines()[-1] == (
        "microdit: stopped by SIGINT; run the same command again and it goes on"
    )
    assert "Traceback" not in built.interrupted.stderr
    assert built.left_by_it > 0  # it came in the middle


def test_a_build_ends_with_a_summary_that_adds_up(built: Built) -> None:
    assert built.finished.exit_code == 0, built.finished.output
    summary = json.loads(built.finished.stdout)  # one object and nothing else
    assert summary["units"] == {"total": 3, "read": 3, "set_aside": 0}
    assert summary["columns"]["images"]["built"] == built.left_by_it
    for column in ("images", "captions/source", "scores/basic"):
        entry = summary["columns"][column]
        assert (entry["inputs"], entry["out"], entry["failed"]) == (COUNT, COUNT - len(BAD), len(BAD))
    assert summary["columns"]["images"]["reasons"] == {"http_404": 2}
    assert summary["columns"]["scores/basic"]["reasons"] == {"upstream": 2}


def test_the_same_command_again_has_nothing_to_do(built: Built) -> None:
    result = microdit("build", built.config, "--corpus", built.corpus)
    assert result.exit_code == 0
    assert result.stdout.startswith("nothing to do")
    assert "images: failed for http_404 2" in result.stdout
    assert json.loads(microdit("build", built.config, "--corpus", built.corpus, "--json").stdout)["worked"] is False


def test_more_failures_than_allowed_are_exit_status_1(built: Built) -> None:
    result = microdit("build", built.config, "--corpus", built.corpus, "max_failures=0.05")
    assert result.exit_code == 1
    assert "images: 8.3% of its inputs failed, the config allows max_failures = 0.05" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shard_samples=8"], ["shard_samples", "is 4", "says 8"]),
        (["images.quality=90"], ["'pictures'", "images.quality", "95", "90"]),
        (["imgaes.quality=90"], ["imgaes", "no such field"]),
        (["shard_samples=many"], ["shard_samples", "'many'", "integer"]),
        (["--columns", "captions/none"], ["'captions/none'", "captions/source"]),
    ],
)
def test_a_wrong_request_is_exit_status_2_and_one_message(built: Built, arguments: list[str], named: list[str]) -> None:
    result = microdit("build", built.config, "--corpus", built.corpus, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("microdit: ")
    for text in named:
        assert text in result.stderr


def test_commands_that_need_a_corpus_say_that_there_is_none(tmp_path: Path) -> None:
    for command in (["status"], ["verify"], ["gc"], ["report"], ["query", "SELECT 1"], ["ls", "images"]):
        result = microdit(command[0], tmp_path / "none", *command[1:])
        assert result.exit_code == 2
        assert "there is no corpus.json" in result.stderr


def test_status(built: Built) -> None:
    found = json.loads(microdit("status", built.corpus, "--json").stdout)
    assert found["columns"]["scores/basic"]["pictures"]["done"] == COUNT // SHARD
    text = microdit("status", built.corpus).stdout
    assert "source pictures: " in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("scores/basic")]
    assert line[1:9] == ["pictures", "6", "0", "0", "0", "24", "22", "2"]


def test_verify_finds_nothing_and_then_a_flipped_bit(built: Built, tmp_path: Path) -> None:
    result = microdit("verify", built.corpus)
    assert result.exit_code == 0, result.output
    assert "images: in 24 = out 22 + failed 2" in result.stdout
    assert "0 problems" in result.stdout
    subprocess.run(["cp", "-r", built.corpus, tmp_path / "copy"], check=True)
    victim = sorted((tmp_path / "copy/images").rglob("*.tar"))[0]
    data = bytearray(victim.read_bytes())
    data[700] ^= 1
    victim.write_bytes(data)
    result = microdit("verify", tmp_path / "copy", "--json")
    assert result.exit_code == 1
    assert any(victim.name in json.dumps(problem) for problem in json.loads(result.stdout)["problems"])


def test_query_select_and_ls(built: Built) -> None:
    sql = "SELECT status, count(*) AS n FROM samples GROUP BY 1 ORDER BY 1"
    expected = [{"status": "failed", "n": 2}, {"status": "ok", "n": 22}]
    assert json.loads(microdit("query", built.corpus, sql, "--json").stdout) == {
        "columns": ["status", "n"],
        "rows": expected,
    }
    lines = [line.split() for line in microdit("query", built.corpus, sql).stdout.splitlines()]
    assert lines == [["status", "n"], ["failed", "2"], ["ok", "22"]]
    many = microdit("query", built.corpus, "SELECT unnest(range(120)) AS [x]".replace("[x]", "x")).stdout
    assert "... 20 rows more" in many
    odd = microdit("query", built.corpus, "SELECT 'nan'::DOUBLE AS x, [1.5, 'inf'::DOUBLE] AS y", "--json")
    assert json.loads(odd.stdout, parse_constant=pytest.fail)["rows"] == [{"x": None, "y": [1.5, None]}]
    bad = microdit("query", built.corpus, "SELECT nothing FROM samples", "--json")
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert "nothing" in bad.stderr

    rows = "SELECT source, shard, row FROM samples WHERE status = 'ok'"
    chosen = json.loads(microdit("select", built.corpus, "good", rows, "--json").stdout)
    assert (chosen["name"], chosen["rows"]) == ("good", 22)
    assert (built.corpus / chosen["path"]).is_file()
    assert microdit("select", built.corpus, "good", rows).stdout.strip() == f"good@{chosen['hash']}: 22 rows"

    names = microdit("ls", built.corpus, "images").stdout.splitlines()
    assert len(names) == COUNT // SHARD
    assert all(Path(name).is_file() for name in names)


def test_gc_leaves_what_is_committed(built: Built) -> None:
    kept = sorted(path for path in built.corpus.rglob("*.tar"))
    stray = kept[0].with_name(kept[0].name.split(".")[0] + ".20200101T000000-0a1b2c3d.tar")
    stray.write_bytes(b"left by a killed worker")
    os.utime(stray, (0, 0))
    assert stray.name in microdit("gc", built.corpus, "--dry-run").stdout
    assert stray.exists()
    assert json.loads(microdit("gc", built.corpus, "--json").stdout)["attempts"] == 1
    assert sorted(path for path in built.corpus.rglob("*.tar")) == kept


@pytest.mark.parametrize("command", [["gc", "--older-than-hours", "0"], ["dedup"]])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system", "/data/x"),
        PermissionError(errno.EACCES, "Permission denied", "/data/x"),
        PermissionDeniedError("Forbidden: /data/x"),
    ],
)
def test_a_storage_that_may_not_be_written_is_one_message(
    built: Built, command: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise error

    for name in ("delete", "scratch"):
        monkeypatch.setattr(Disk, name, refuse)
    result = microdit(command[0], built.corpus, *command[1:])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("microdit: ") and "/data/x" in result.stderr and "your rights" in result.stderr


def test_report(built: Built, tmp_path: Path) -> None:
    result = microdit("report", built.corpus, "--out", tmp_path / "page.html")
    assert result.stdout.strip() == str(tmp_path / "page.html")
    assert "http_404" in (tmp_path / "page.html").read_text()


def test_train_says_what_is_wrong_with_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: empty\n")
    result = microdit("train", recipe)
    assert result.exit_code == 2
    assert f"config {recipe}: stages" in result.stderr


def test_generate_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    result = microdit("generate", "--checkpoint", tmp_path / "none", "--prompt", "red apple", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{tmp_path / 'none'}: there is no checkpoint" in result.stderr
    assert microdit("generate", "--checkpoint", tmp_path).exit_code == 2  # no prompt


def test_help_teaches_and_imports_nothing_heavy() -> None:
    program = """
import sys
from typer.testing import CliRunner
from microdit.pipeline.cli.app import app
print(CliRunner().invoke(app, ["--help"]).output)
assert not {"torch", "ray", "duckdb", "pyarrow", "obstore", "pydantic"} & set(sys.modules), sorted(sys.modules)
"""
    text = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for command in ("demo", "build", "status", "report", "query", "select", "verify", "ls", "gc", "train", "generate"):
        assert f" {command} " in text
        assert microdit(command, "--help").exit_code == 0
    assert microdit("no-such-command").exit_code == 2
