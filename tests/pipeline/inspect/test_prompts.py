"""`microdit inspect` shows prompts of files without pictures, and the first prompts and pictures of a config."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.config.synthesis import SynthesizeSource
from tests.pipeline.helpers.dataset_archives import picture
from tests.pipeline.helpers.tiny_pipelines import save_pipeline

PROMPTS = ["a red apple", "A red  apple", "a blue boat", "the sea"]


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["p.txt", "p.tsv", "p.csv", "p.jsonl", "p.parquet"])
def test_a_file_of_prompts_is_known_and_its_config_reads_it(name: str, tmp_path: Path):
    path, written = tmp_path / name, tmp_path / "my.yaml"
    rows = [{"id": number, "prompt": text, "note": "x"} for number, text in enumerate(PROMPTS)]
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(PROMPTS))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            mark = "\t" if path.suffix == ".tsv" else ","
            path.write_text("\n".join(mark.join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]))
    found = microdit("inspect", path, "--write", written, "--json")
    assert found.exit_code == 0, (found.output, found.exception)
    answer = json.loads(found.stdout)
    assert (answer["layout"], answer["notes"][:2]) == ("prompts", ["3 prompts", "left out: 1 duplicate"])
    options = load_config(written).sources["data"]
    assert isinstance(options, SynthesizeSource)
    assert options.prompts.column == (None if name == "p.txt" else "prompt")
    found = microdit("inspect", written)
    assert found.exit_code == 0, (found.output, found.exception)
    assert "a blue boat" in found.stdout and "3 prompts" in found.stdout


def test_a_table_without_texts_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("id,score\n1,2\n")
    found = microdit("inspect", tmp_path / "a.csv")
    assert found.exit_code == 2
    assert "neither URLs nor prompts; its columns are id, score" in found.stderr


def test_the_first_pictures_of_a_config_are_drawn(tmp_path: Path):
    (tmp_path / "p.txt").write_text("\n".join(f"a red apple {number}" for number in range(20)))
    maker = {"model": str(save_pipeline("sd", tmp_path / "sd")), "steps": 1, "size": 32, "dtype": "float32"}
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/cat.jpg").write_bytes(picture(1, (64, 64)))
    tree = {
        "name": "drawn",
        "corpus": str(tmp_path / "corpus"),
        "sources": {
            "drawn": {
                "adapter": "synthesize",
                "prompts": {"path": str(tmp_path / "p.txt")},
                "makers": [{**maker, "name": "one"}, {**maker, "name": "two"}],
            },
            "cats": {"adapter": "folder", "files": str(tmp_path / "tree"), "caption": ""},
        },
        "images": {"min_side": 32},
        "resources": {"scratch": str(tmp_path / "scratch")},
    }
    config, page = tmp_path / "config.yaml", tmp_path / "page.html"
    config.write_text(yaml.safe_dump(tree))
    found = microdit("inspect", config, "--out", page)
    assert found.exit_code == 0, (found.output, found.exception)
    assert "20 prompts" in found.stdout and "by one, two" in found.stdout
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 6 + 1
    assert "a red apple " in text and "drawn/one/" in text and "drawn/two/" in text and "cat.jpg" in text
    assert not (tmp_path / "corpus").exists()
    assert "is a config already" in microdit("inspect", config, "--write", tmp_path / "b.yaml").stderr
