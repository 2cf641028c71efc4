"""Model files from a folder and from a hub, through the real client."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download

from microdit.model.pretrained.hub import ModelFilesError, fetch, require
from tests.servers.hub import TOKEN, Hub

WEIGHTS = (("model.safetensors",), ("model.safetensors.index.json", "model-?????-of-?????.safetensors"), ("model.bin",))
CONFIG = b'{"a": 1}'


def test_a_branch_becomes_a_commit(hub: Hub):
    first = hub.add("owner/name", {"config.json": CONFIG, "model.safetensors": b"1" * 100})
    files = fetch("owner/name", ["config.json"], weights=WEIGHTS)
    assert files.origin() == {"repo": "owner/name", "revision": first}
    assert (files.folder / "model.safetensors").read_bytes() == b"1" * 100
    second = hub.add("owner/name", {"config.json": CONFIG, "model.safetensors": b"2" * 100})
    assert fetch("owner/name", ["config.json"]).revision == second
    old = fetch("owner/name", ["config.json"], weights=WEIGHTS, revision=first)
    assert old.revision == first
    assert (old.folder / "model.safetensors").read_bytes() == b"1" * 100


def test_the_beginning_of_a_hash_is_a_commit(hub: Hub):
    first = hub.add("owner/name", {"config.json": CONFIG})
    hub.add("owner/name", {"config.json": b"{}"})
    assert fetch("owner/name", ["config.json"], revision=first[:7]).revision == first
    hub.close()  # a commit that was fetched is found in the cache
    assert (fetch("owner/name", ["config.json"], revision=first[:12]).folder / "config.json").read_bytes() == CONFIG


def test_the_beginning_of_no_hash_or_of_two(hub: Hub):
    hub.add("owner/name", {"config.json": CONFIG}, commit="abcdef01" + "2" * 32)
    hub.add("owner/name", {"config.json": CONFIG}, commit="abcdef01" + "3" * 32)
    for beginning in ("abcdef01", "0000000"):
        with pytest.raises(ModelFilesError, match=f"owner/name has no revision '{beginning}': give a branch, a tag or"):
            fetch("owner/name", ["config.json"], revision=beginning)
    hub.add("owner/name", {"config.json": b"{}"}, branch="20240721")  # a name that looks like one
    assert (fetch("owner/name", ["config.json"], revision="20240721").folder / "config.json").read_bytes() == b"{}"
    hub.close()
    assert (fetch("owner/name", ["config.json"], revision="20240721").folder / "config.json").read_bytes() == b"{}"
    with pytest.raises(ModelFilesError, match="cannot download owner/name at revision 1234567, and the cache does not"):
        fetch("owner/name", ["config.json"], revision="1234567")


def test_one_copy_of_the_weights_is_taken(hub: Hub):
    single = {"config.json": CONFIG, "model.safetensors": b"s", "model.bin": b"b", "model.fp16.safetensors": b"h"}
    hub.add("owner/single", {**single, "sub/model.safetensors": b"u"})
    assert fetch("owner/single", ["config.json"], weights=WEIGHTS).weights == ("model.safetensors",)
    shards = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
    hub.add("owner/shards", {"config.json": CONFIG, "model.safetensors.index.json": b"{}", **shards, "model.bin": b"b"})
    assert len(fetch("owner/shards", ["config.json"], weights=WEIGHTS).weights) == 3
    hub.add("owner/bin", {"config.json": CONFIG, "model.bin": b"b", "model.h5": b"h"})
    assert fetch("owner/bin", ["config.json"], weights=WEIGHTS).weights == ("model.bin",)
    assert sorted(hub.downloads()) == sorted(
        ["config.json", "model.safetensors", "model.safetensors.index.json", *shards, "model.bin"]
    )


def test_no_weights(hub: Hub, tmp_path: Path):
    commit = hub.add("owner/name", {"config.json": CONFIG, "model.h5": b"h"})
    with pytest.raises(ModelFilesError, match=rf"owner/name at {commit} holds no weights; expected one of model\.safe"):
        fetch("owner/name", ["config.json"], weights=WEIGHTS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelFilesError, match="folder holds no weights"):
        fetch(tmp_path / "folder", ["config.json"], weights=WEIGHTS)


def test_a_pinned_commit_in_the_cache_needs_no_network(hub: Hub):
    commit = hub.add("owner/name", {"config.json": CONFIG, "model.bin": b"b"})
    fetch("owner/name", ["config.json"], weights=WEIGHTS, revision=commit)
    before = len(hub.requests)
    assert fetch("owner/name", ["config.json"], weights=WEIGHTS, revision=commit).weights == ("model.bin",)
    assert len(hub.requests) == before
    fetch("owner/name", ["config.json"])
    hub.close()
    assert fetch("owner/name", ["config.json"], weights=WEIGHTS).revision == commit  # main as it was last seen


def index_of(*parts: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{i}": part for i, part in enumerate(parts)}}).encode()


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_what_is_missing_is_named_before_weights_are_downloaded(where: str, hub: Hub, tmp_path: Path):
    """Of a repository and of a folder the same, in one message."""
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"model.safetensors.index.json": index_of(*shards, *shards)}
    words = ["a.json", "b.json"]
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"b.json": b"", "model.safetensors": b"w"}, ""),
        ({"a.json": b"", "model.bin": b"w"}, ""),
        ({"a.json": b"", **index, **dict.fromkeys(shards, b"w")}, ""),
        ({"model.safetensors": b"w"}, "lacks a.json or b.json"),
        ({"a.json": b""}, r"lacks weights \(model.safetensors or model.safetensors.index.json or model.bin\)"),
        ({}, r"lacks a.json or b.json, weights \(model.safetensors or "),
        ({**index, shards[1]: b"w"}, f"lacks a.json or b.json, {shards[0]}, {shards[2]}[:;]"),
        ({"a.json": b"", shards[0]: b"w"}, "lacks model.safetensors.index.json[:;]"),
        ({"a.json": b"", **index, "model.bin": b"w"}, f"lacks {', '.join(shards)}[:;]"),
        ({"a.json": b"", "model.safetensors.index.json": b"{}"}, "index.json is damaged .it has no weight_map"),
    ]
    for number, (files, message) in enumerate(cases):
        if where == "hub":
            commit = hub.add(f"owner/m{number}", {"config.json": CONFIG, **files})
            found = fetch(f"owner/m{number}", ["config.json"])
        else:
            folder = tmp_path / f"m{number}"
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            found = fetch(folder, ["config.json"])
        if not message:
            require(found, words, weights=WEIGHTS)
            continue
        begins = rf"^owner/m{number} at {commit} " if where == "hub" else rf"^m{number} "
        with pytest.raises(ModelFilesError, match=message if "damaged" in message else begins + message) as error:
            require(found, words, weights=WEIGHTS)
        assert "\n" not in str(error.value)
    assert not any(file.endswith((".safetensors", ".bin")) for file in hub.downloads())


def test_what_the_cache_holds_is_not_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    files = {"config.json": CONFIG, "model.safetensors.index.json": index_of("model-00001-of-00001.safetensors")}
    hub.add("owner/whole", {**files, "model-00001-of-00001.safetensors": b"w"})
    hub.add("owner/part", {**files, "model-00001-of-00001.safetensors": b"w"})
    whole = fetch("owner/whole", ["config.json"], weights=WEIGHTS)
    part = fetch("owner/part", ["config.json"])
    before = len(hub.requests)
    require(whole, ["config.json"], weights=WEIGHTS)
    assert len(hub.requests) == before
    require(part, ["config.json"], weights=WEIGHTS)
    assert len(hub.requests) > before
    lacks = "the cache lacks model-00001-of-00001.safetensors of owner/part at [0-9a-f]{40}, and the hub cannot be"
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        require(whole, ["config.json"], weights=WEIGHTS)
        with pytest.raises(ModelFilesError, match=lacks):
            require(part, ["config.json"], weights=WEIGHTS)
    hub.close()
    require(whole, ["config.json"], weights=WEIGHTS)
    with pytest.raises(ModelFilesError, match=lacks):
        require(part, ["config.json"], weights=WEIGHTS)


def test_a_folder_is_known_by_its_bytes(tmp_path: Path):
    for name in ("one", "two"):
        folder = tmp_path / name / "same"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(CONFIG)
        (folder / "notes.txt").write_text(name)
    one, two = (fetch(tmp_path / name / "same", []).origin("config.json") for name in ("one", "two"))
    assert one == two  # wherever it lies, and whatever else is in it
    assert one["folder"] == "same"
    (tmp_path / "two" / "same" / "config.json").write_bytes(b"{}")
    assert fetch(tmp_path / "two" / "same", []).origin("config.json") != one
    with pytest.raises(ValueError, match="is a folder, which has no revisions: leave out revision='main'"):
        fetch(tmp_path / "one" / "same", [], revision="main")
    with pytest.raises(ValueError, match="'nowhere' is neither an existing folder nor a hub repository id"):
        fetch("nowhere", [])


def test_a_damaged_file_says_what_to_do(hub: Hub, tmp_path: Path):
    hub.add("owner/name", {"config.json": b"{", "model.safetensors": b"1"})
    files = fetch("owner/name", ["config.json"], weights=WEIGHTS)
    cached = Path(constants.HF_HUB_CACHE) / "models--owner--name"
    with pytest.raises(ModelFilesError, match=r"owner/name: config\.json is damaged \(Expecting property") as error:
        files.read_json("config.json")
    assert str(error.value).endswith(f"; remove {cached}, and it is downloaded again")
    with pytest.raises(ModelFilesError, match=r"name: model\.safetensors lacks 4 .* weights: a, b, c, \.\.\.; remove"):
        files.check_loaded(["d", "c", "b", "a"])
    shutil.rmtree(cached)
    hub.add("owner/name", {"config.json": CONFIG})
    assert fetch("owner/name", ["config.json"]).read_json("config.json") == {"a": 1}


def test_gated_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.add("owner/gated", {"config.json": CONFIG}, gated=True)
    message = "owner/gated is gated: accept its terms at https://huggingface.co/owner/gated, then run `hf auth login`"
    for token in (None, "hf_stranger"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ModelFilesError, match=message) as error:
            fetch("owner/gated", ["config.json"])
        assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch("owner/gated", ["config.json"]).folder / "config.json").read_bytes() == CONFIG


def test_what_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.add("owner/private", {"config.json": CONFIG}, private=True)
    for repo in ("owner/private", "owner/nothing"):
        with pytest.raises(
            ModelFilesError, match=f"the hub has no repository {repo} .*check the name, or run `hf auth"
        ):
            fetch(repo, ["config.json"])
    hub.add("owner/name", {"config.json": CONFIG})
    with pytest.raises(ModelFilesError, match="owner/name has no revision 'v9'"):
        fetch("owner/name", ["config.json"], revision="v9")
    hub.close()
    with pytest.raises(ModelFilesError, match="cannot download owner/other at revision main, and the cache does not"):
        fetch("owner/other", ["config.json"])


def test_a_broken_connection_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what reaches the disk together
    data = os.urandom(100_000)
    hub.add("owner/name", {"config.json": CONFIG, "model.safetensors": data})
    hub.faults["model.safetensors"] = [("cut", 40_000)]
    files = fetch("owner/name", ["config.json"], weights=WEIGHTS)
    assert (files.folder / "model.safetensors").read_bytes() == data
    first, second = hub.ranges("model.safetensors")
    assert first is None
    assert second is not None
    assert 30_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 40_000


def test_a_run_that_was_ended_keeps_the_files_that_were_complete(hub: Hub):
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(50_000) for i in (1, 2)}
    commit = hub.add("owner/name", {"config.json": CONFIG, "model.safetensors.index.json": b"{}", **shards})
    hub.faults["model-00002-of-00002.safetensors"] = [("status", 500)]
    with pytest.raises(ModelFilesError, match=f"cannot download owner/name at revision {commit}"):
        fetch("owner/name", ["config.json"], weights=WEIGHTS, revision=commit)
    hub.requests.clear()
    files = fetch("owner/name", ["config.json"], weights=WEIGHTS, revision=commit)
    assert hub.downloads() == ["model-00002-of-00002.safetensors"]
    assert all((files.folder / name).read_bytes() == data for name, data in shards.items())


def test_data_sets_and_long_listings(hub: Hub):
    """What this server does for the readers of data sets: pages of a listing, data set addresses, ranges."""
    hub.page = 7
    names = [f"data/part-{i:03}.tar" for i in range(30)]
    commit = hub.add("owner/set", {"README.md": b"#", **{name: name.encode() * 10 for name in names}}, kind="datasets")
    assert HfApi().list_repo_files("owner/set", repo_type="dataset") == ["README.md", *names]
    folder = HfApi().list_repo_tree("owner/set", "data", repo_type="dataset", recursive=True)
    assert [entry.path for entry in folder] == names
    [info] = HfApi().get_paths_info("owner/set", [names[3]], repo_type="dataset")
    assert info.size == len(names[3]) * 10
    path = hf_hub_download("owner/set", names[4], repo_type="dataset", revision=commit)
    assert Path(path).read_bytes() == names[4].encode() * 10


def test_the_model_stands_alone(hub: Hub, tmp_path: Path):
    """With neither ray nor obstore nor the pipeline; importing it does not import diffusers or transformers."""
    hub.add("owner/name", {"config.json": b"{}"})
    script = """
import sys
for name in ("ray", "obstore", "microdit.pipeline", "microdit.trainer"):
    sys.modules[name] = None
from microdit.model.pretrained import autoencoder, clip, hub, text
heavy = {"diffusers", "transformers", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
print(hub.fetch("owner/name", ["config.json"]).revision)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hub.repositories["models", "owner/name"].refs["main"]
