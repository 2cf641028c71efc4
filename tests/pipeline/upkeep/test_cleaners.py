"""What a cleaner may remove (docs/reference/corpus.md, section 9): never what a commit names, nor what is another's."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from microdit.pipeline.base import machine as machine_module
from microdit.pipeline.corpus import presence as presence_module
from microdit.pipeline.corpus.presence import presence
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.damage import damage
from microdit.pipeline.upkeep.gc import gc
from tests.pipeline.helpers.small_corpus import LATENTS, REF, fill, make_corpus, named_objects, replace, write_images

ATTEMPT = "20200101T000000-0123abcd"
COLUMNS = ("images", LATENTS)
FOLDERS = [
    "second",
    "a/b/c",
    "images",
    "images/demo",
    "latents",
    LATENTS,
    f"{LATENTS}/demo",
    "tables",
    "tables/joins",
    "tables/samples",
]
FOLDERS += ["probes", "commits", "commits/images", "selections", "scores/second", "columns", "sources", "failures"]
STRANGE = [
    *("README", "photos/1.tar", "images/demo/notes.tar", "images/mine#7", "tables/notes", "tables/notes.json"),
    *(f"elsewhere/demo/{REF.shard}.{ATTEMPT}.tar", f"images/other/other-000000-00.{ATTEMPT}.tar", "probes/a/b"),
    *(f"images/demo/other-000000-00.{ATTEMPT}.tar", f"commits/{REF.shard}.txt", f"a/images/demo/x.{ATTEMPT}.tar#1"),
]
ORPHANS = [f"{column}/demo/{REF.shard}.{ATTEMPT}.tar" for column in COLUMNS]
OWN = [
    *(*ORPHANS, f"{ORPHANS[0]}#9", "columns/scores/basic.json#3", "selections/s@0123456789abcdef.parquet#12"),
    f"tables/samples/{'c' * 64}.{'d' * 64}.parquet",
    *(f"tables/{'a' * 64}.{ATTEMPT}.parquet", f"tables/joins/{'b' * 32}.{ATTEMPT}.parquet", "probes/old"),
]
DAMAGE = ["nothing", "no corpus.json", "no columns", "commits", "no commits", "empty"]


def _files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _age(root: Path, hours: float = 72) -> None:
    old = time.time() - hours * 3600
    for path in root.rglob("*"):
        os.utime(path, (old, old))


def _write(root: Path, name: str, data: bytes = b"x") -> bool:
    path = root / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return False
        path.write_bytes(data)
    except (FileExistsError, NotADirectoryError):  # two strange names that exclude each other
        return False
    return True


def _another(root: Path, damaged: str) -> None:
    """A corpus with orphans of its own, in some state of being built or lost."""
    other = make_corpus(root)
    if damaged != "empty":
        fill(other, shards=1, columns=[LATENTS])
    for name in OWN:
        _write(root, name, b"theirs")
    if damaged == "no corpus.json":
        (root / "corpus.json").unlink()
    if damaged == "no columns":
        other.store.delete([item.name for item in other.store.list("columns")])
    for item in list(other.store.list("commits")) if "commits" in damaged else ():
        replace(other, item.name, None if damaged == "no commits" else b"{")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nested=st.dictionaries(st.sampled_from(FOLDERS), st.sampled_from(DAMAGE), max_size=2),
    strange=st.sets(st.sampled_from(STRANGE)),
    orphans=st.sets(st.sampled_from(OWN)),
    damaged=st.booleans(),
)
def test_cleaners_remove_only_what_is_this_corpus_own(
    tmp_path_factory: pytest.TempPathFactory,
    nested: dict[str, str],
    strange: set[str],
    orphans: set[str],
    damaged: bool,
) -> None:
    root = tmp_path_factory.mktemp("outer")
    corpus = make_corpus(root)
    fill(corpus, shards=2, columns=[LATENTS])
    write_images(corpus, REF, generation=1)
    sample_table(corpus)  # its parts stay
    keep = set(_files(root))
    if damaged:
        replace(corpus, f"commits/{LATENTS}/demo/{REF.shard}.0.json", b"{")
    for folder, state in nested.items():
        _another(root / folder, state)
    theirs = set(_files(root)) - keep
    mine = {name for name in orphans if _write(root, name)}
    keep |= {name for name in strange if _write(root, name)} | theirs
    _age(root)
    before = _files(root)
    note(f"{sorted(before)}")
    done = gc(corpus)
    after = _files(root)
    assert {name: before[name] for name in keep} == {name: after[name] for name in keep}
    assert set(before) - set(after) <= mine
    assert set(done.names) == set(before) - set(after)
    below = {name for name in mine if any(name.startswith(f"{folder}/") for folder in done.foreign)}
    parts = {name for name in mine if name.startswith("tables/samples/")}
    kept = {OWN[1], *parts} if damaged else set()  # the damaged commit may name them
    if "columns" in nested:  # its corpus.json stands where a declaration of the outer one would, which is then damaged
        kept |= parts
    assert mine - below - kept <= set(before) - set(after)
    assert {folder for folder, state in nested.items() if state in ("nothing", "empty")} <= {
        folder for folder in nested for root in done.foreign if folder == root or folder.startswith(f"{root}/")
    }
    damage(corpus)  # `--repair` deletes damaged tables: its own alone
    assert {name: after[name] for name in keep} == {name: _files(root)[name] for name in keep}


def test_a_corpus_inside_another_keeps_its_images(corpus_url: str) -> None:
    """Attempts that only the inner corpus' commits name, and its unfinished work, are not the outer one's orphans."""
    outer, inner = make_corpus(corpus_url), make_corpus(f"{corpus_url}/images/second")
    for corpus in (outer, inner):
        fill(corpus, shards=1, columns=[LATENTS])
    orphan = f"images/demo/{REF.shard}.{ATTEMPT}.tar"
    for corpus in (outer, inner):
        corpus.store.create(orphan, b"orphan")
    before = {item.name for item in inner.store.list()}
    done = gc(outer, older_than_hours=0)
    assert (done.names, done.foreign) == ([orphan], ["images/second"])
    assert {item.name for item in inner.store.list()} == before >= named_objects(inner, COLUMNS)
    assert gc(inner, older_than_hours=0).names == [orphan]


def test_gc_leaves_a_living_build_what_it_holds(corpus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt is published before it is committed: in between no commit names it."""
    corpus = make_corpus(corpus_url)
    orphan = f"images/demo/{REF.shard}.{ATTEMPT}.tar"
    corpus.store.create(orphan, b"not committed yet")
    with presence(corpus) as probe:
        done = gc(corpus, older_than_hours=0)
        assert (done.names, done.builds) == ([], 1) and corpus.store.exists(probe)
        monkeypatch.setattr(machine_module, "machine", lambda: "another")
        assert gc(corpus, older_than_hours=0).names == []  # its process is not to be seen from here
        monkeypatch.undo()
        monkeypatch.setattr(machine_module.os, "getpid", lambda: 2**22 + 1)
    with presence(corpus) as probe:  # of a process that is gone
        assert gc(corpus, older_than_hours=0).names == sorted([orphan, probe])


def test_a_build_of_days_renews_its_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    monkeypatch.setattr(presence_module, "RENEW_SECONDS", 0.01)
    with presence(corpus) as probe:
        old = time.time() - 72 * 3600
        os.utime(tmp_path / probe, (old, old))
        deadline = time.monotonic() + 10
        while (tmp_path / probe).stat().st_mtime < old + 3600 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gc(corpus).names == [] and corpus.store.exists(probe)
        corpus.store.delete([probe])  # an older program's `gc`
        while not corpus.store.exists(probe) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert corpus.store.exists(probe)
    assert not corpus.store.exists(probe)


def test_gc_stops_at_a_commit_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[LATENTS])
    corpus.store.create(OWN[0], b"orphan")

    def refuse(self: object, name: str) -> bytes:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(type(corpus.store), "get", refuse)
    with pytest.raises(ValueError, match=r"cannot be read .*nothing was removed"):
        gc(corpus, older_than_hours=0)
    assert corpus.store.exists(OWN[0])
