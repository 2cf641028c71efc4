"""Prompts of files, of a corpus and of templates are read, chosen and given by ranges; bad ones are told plainly."""

import csv
import gzip
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.prompts import PromptsConfig
from microdit.pipeline.sources.synthesis import prompt_choice
from microdit.pipeline.sources.synthesis.prompts import Prompt, Prompts, open_prompts
from tests.pipeline.helpers.small_corpus import NEXT, fill, make_corpus

PLAIN = {"{{": "{", "}}": "}"}
quickly = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = ["red", "cat", "Cat", "dog", "hill", "on", "a"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def prompts_of(scratch: Path, **options: Any) -> list[Prompt]:
    prompts = open_prompts(PromptsConfig(**options), scratch)
    return prompts.read(0, len(prompts))


def lines_file(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def message(scratch: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        open_prompts(PromptsConfig(**options), scratch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- files -------------------------------------------------------------------------------------------------------------
def write(path: Path, prompts: list[str], seeds: list[int]) -> None:
    """Write prompts as a file of the kind that the path's name says."""
    name = path.name.removesuffix(".gz")
    opened = gzip.open if path.name.endswith(".gz") else open
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"caption": prompts, "seed": seeds}), path, row_group_size=3)
        return
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            rows = zip(prompts, seeds, strict=True)
            file.writelines(json.dumps({"seed": seed, "caption": text}) + "\n" for text, seed in rows)
        elif name.endswith(".txt"):
            file.writelines(f"{text}\n" for text in prompts)
        else:
            writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",", lineterminator="\n")
            writer.writerows([["seed", "caption"], *zip(seeds, prompts, strict=True)])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.tsv", "a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
@given(data=st.data())
@quickly
def test_any_text_comes_back_from_any_kind_of_file(name: str, data: st.DataObject, tmp_path_factory: Any):
    unlike = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd\u2028\u2029\x85\ufeff")
    prompts = data.draw(st.lists(st.text(unlike, min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=9))
    folder = tmp_path_factory.mktemp("prompts")
    write(folder / name, prompts, list(range(len(prompts))))
    fields = {} if name.startswith("a.txt") else {"number": "seed"}
    found = prompts_of(folder, path=str(folder / name), fields=fields, duplicates="keep")
    assert [prompt.text for prompt in found] == [" ".join(text.split()) for text in prompts]
    assert [prompt.row for prompt in found] == list(range(len(prompts)))
    if fields:
        assert [int(prompt.fields["number"]) for prompt in found] == list(range(len(prompts)))


def test_rows_count_on_over_several_files_and_blank_lines(tmp_path: Path, scratch: Path):
    lines_file(tmp_path / "p-1.txt", "one", "", "two")
    lines_file(tmp_path / "p-10.txt", "four")
    lines_file(tmp_path / "p-2.txt", "three")
    found = prompts_of(scratch, path=str(tmp_path / "p-*.txt"))
    assert [(prompt.row, prompt.text) for prompt in found] == [(0, "one"), (2, "two"), (3, "three"), (4, "four")]


def test_quotes_of_a_tsv_that_are_part_of_the_text_stay(tmp_path: Path, scratch: Path):
    path = lines_file(tmp_path / "a.tsv", "Prompt\tCategory", '"Stop" on a sign\tsigns', '"open\tsigns', "a cat\tcats")
    found = prompts_of(scratch, path=path, fields={"category": "Category"})
    assert [prompt.text for prompt in found] == ['"Stop" on a sign', '"open', "a cat"]
    assert [prompt.fields["category"] for prompt in found] == ["signs", "signs", "cats"]


def test_a_column_inside_of_others_and_fields_of_several_kinds(tmp_path: Path, scratch: Path):
    rows = [{"meta": {"prompt": "a cat", "scores": [1, 2]}, "width": 512, "ok": True, "nan": float("nan")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    fields = {"scores": "meta.scores", "width": "width", "ok": "ok", "nan": "nan"}
    [prompt] = prompts_of(scratch, path=str(tmp_path / "a.parquet"), column="meta.prompt", fields=fields)
    assert prompt == Prompt("a cat", 0, {"scores": "[1, 2]", "width": 512, "ok": 1})


def test_utf_16_with_a_byte_order_mark(tmp_path: Path, scratch: Path):
    (tmp_path / "a.txt").write_bytes("eine Möwe\nein Hund\n".encode("utf-16"))
    assert [prompt.text for prompt in prompts_of(scratch, path=str(tmp_path / "a.txt"))] == ["eine Möwe", "ein Hund"]


def test_bytes_that_are_no_text_are_left_out_with_their_place(tmp_path: Path, scratch: Path):
    (tmp_path / "a.txt").write_bytes(b"a cat\na caf\xe9\na\0dog\n")
    bad = pa.array([b"a cat", b"a caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    for name, count in (("a.txt", 2), ("a.parquet", 1)):
        prompts = open_prompts(PromptsConfig(path=str(tmp_path / name)), scratch)
        assert (len(prompts), prompts.left_out) == (1, {"not_text": count})
        assert f"row 2 of {name}" in prompts.examples[0]


@pytest.mark.parametrize(
    ("name", "data", "options", "expected"),
    [
        ("a.txt", b"", {}, "prompts.path: there is no prompt; it is empty"),
        ("a.txt", b"\n  \n", {}, "there is no prompt; it is empty"),
        ("a.txt", b"x" * 10_000, {}, "1 too_long (too_long: row 1 of a.txt: 10,000 characters, at most 4,000"),
        ("a.txt", b"\xff\xfd\n", {}, "1 not_text"),
        ("a.txt", b"a cat\n", {"column": "text"}, "text without columns"),
        ("a.md", b"a cat\n", {}, "expected a file as *.txt, *.tsv"),
        ("a.csv", b"name,score\ncat,1\n", {}, "no column prompt or caption or text (it has: name, score)"),
        ("a.csv", b"text,score\ncat,1\n", {"column": "prompt"}, "no column 'prompt' (it has: text, score)"),
        ("a.tsv", b"text\tscore\ncat\t1\n", {"fields": {"origin": "seed"}}, "no column 'seed' (it has: text, score)"),
        ("a.jsonl", b'{"name": "cat"}\n', {}, "no column prompt or caption or text (it has: name)"),
        ("a.jsonl", b"cat\n", {}, "1 no_json"),
        ("a.jsonl", b'{"prompt": 5}\n', {}, "1 no_prompt"),
        ("a.parquet", b"PAR1 and no more", {}, "a.parquet: it cannot be read behind row 0"),
        ("a.txt.gz", gzip.compress(b"a cat\n" * 9)[:-9], {}, "a.txt.gz: it cannot be read behind row"),
        ("a.csv", b'text\n"a ""b"" c" d\n', {}, "1 no_csv"),
    ],
)
def test_a_file_without_prompts_is_refused_in_one_line(
    name: str, data: bytes, options: dict, expected: str, tmp_path: Path, scratch: Path
):
    (tmp_path / name).write_bytes(data)
    assert expected in message(scratch, path=str(tmp_path / name), **options)


def test_a_file_that_is_not_there(tmp_path: Path, scratch: Path):
    assert "prompts.path = " in message(scratch, path=str(tmp_path / "none.txt"))
    assert "prompts.blocklist = " in message(scratch, path=lines_file(tmp_path / "a.txt", "a"), blocklist="none.txt")


# -- templates ---------------------------------------------------------------------------------------------------------
@given(
    lists=st.dictionaries(
        st.sampled_from(["animal", "place", "c_1"]), st.lists(st.text("xyz{}% ", min_size=1), min_size=1, max_size=4),
        min_size=1,
    ),
    between=st.lists(st.sampled_from([" a ", "{{", "}}", "%s", ""]), min_size=4, max_size=4),
    shuffle=st.none() | st.integers(-5, 2**70),
)  # fmt: skip
@quickly
def test_templates_make_every_combination_once(
    lists: dict[str, list[str]], between: list[str], shuffle: int | None, tmp_path_factory: Any
):
    template, wanted = "p", ["p"]
    for text, (name, entries) in zip(between, lists.items(), strict=False):
        template += f"{text}{{{name}}}"
        wanted = [before + PLAIN.get(text, text) + entry for before in wanted for entry in entries]
    wanted = [" ".join((before + PLAIN.get(between[-1], between[-1])).split()) for before in wanted]
    template += between[-1]
    options = {"templates": [template], "lists": lists, "duplicates": "keep", "shuffle": shuffle}
    found = prompts_of(tmp_path_factory.mktemp("prompts"), **options)
    if shuffle is None:
        assert [prompt.text for prompt in found] == wanted
    assert sorted(prompt.row for prompt in found) == list(range(len(wanted)))
    assert all(prompt.text == wanted[prompt.row] for prompt in found)


def test_a_limit_takes_a_fair_choice_of_more_combinations_than_can_be_made(scratch: Path):
    lists = {name: [f"{name}{number}" for number in range(100)] for name in "abcdef"}
    options = {"templates": ["{a} {b} {c} {d} {e} {f}"], "lists": lists}
    assert "they make 1,000,000,000,000 prompts" in message(scratch, **options)
    found = prompts_of(scratch, **options, limit=2000, shuffle=1)
    assert len({prompt.text for prompt in found}) == 2000
    for name in lists:
        assert len({prompt.fields[name] for prompt in found}) == 100
    assert found != prompts_of(scratch, **options, limit=2000, shuffle=2)


def test_lists_come_from_files(tmp_path: Path, scratch: Path):
    path = lines_file(tmp_path / "animals.txt", "cat", "", "dog")
    found = prompts_of(scratch, templates=["a {animal}", "the {animal}"], lists={"animal": path})
    assert [prompt.text for prompt in found] == ["a cat", "a dog", "the cat", "the dog"]
    assert found[3].fields == {"animal": "dog"}
    path = lines_file(tmp_path / "animals.txt")
    assert "it is empty; expected an entry a line" in message(scratch, templates=["{animal}"], lists={"animal": path})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "expected one of path, corpus and templates"),
        ({"path": "a.txt", "templates": ["a"]}, "expected one of path, corpus and templates"),
        ({"templates": ["a {cat}"]}, "no list 'cat', which is asked for at character 3 of 'a {cat}' (lists: none)"),
        ({"templates": ["a {a} {}"], "lists": {"a": ["x"]}}, "no list '', which is asked for at character 7"),
        ({"templates": ["a { cat"]}, "a brace alone at character 3 of 'a { cat'; write it twice"),
        ({"templates": ["a } cat"]}, "a brace alone at character 3"),
        ({"templates": ["a"], "lists": {"b": ["x"]}}, "no template has {b}"),
        ({"templates": ["{a}"], "lists": {"a": []}}, "it is empty"),
        ({"templates": ["{A}"], "lists": {"A": ["x"]}}, "a name is lower-case letters"),
        ({"templates": ["{size}"], "lists": {"size": ["x"]}}, "each picture has a field of this name already"),
        ({"path": "a.txt", "fields": {"seed": "seed"}}, "each picture has a field of this name already"),
        ({"path": "a.txt", "where": "true"}, "it is for corpus, not for path"),
        ({"corpus": "c", "column": "text"}, "it is for path, not for corpus"),
        ({"corpus": "c", "captions": "long"}, "expected a column as captions/NAME"),
        ({"path": "a.txt", "min_words": 5, "max_words": 4}, "expected at least min_words = 5"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(options: dict, expected: str):
    with pytest.raises(ValidationError) as caught:
        PromptsConfig(**options)
    assert expected in str(caught.value)


# -- another corpus ----------------------------------------------------------------------------------------------------
def test_captions_of_a_corpus_are_chosen_by_sql(tmp_path: Path, scratch: Path):
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus)
    every = prompts_of(scratch, corpus=corpus.url, duplicates="keep")
    assert [prompt.text for prompt in every] == [f"picture {row} — é" for row in (1, 3, 5)] * 2
    assert [prompt.row for prompt in every] == list(range(6))
    assert every[4].fields == {"sample": f"demo/{NEXT.shard}-3"}
    some = prompts_of(scratch, corpus=corpus.url, where="width > 66 -- pixels", captions="captions/source", limit=1)
    assert some[0].text.startswith("picture 3")
    assert "no such column (captions/source)" in message(scratch, corpus=corpus.url, captions="captions/long")
    assert "prompts.where = 'widht > 3'" in message(scratch, corpus=corpus.url, where="widht > 3")
    assert "random() gives other samples each time" in message(scratch, corpus=corpus.url, where="random() < 0.5")
    assert "there is no prompt" in message(scratch, corpus=corpus.url, where="width > 1000")
    assert "SQL: 2 statements" in message(scratch, corpus=corpus.url, where="true); SELECT (1")


def test_the_identity_is_that_of_the_prompts_alone(tmp_path: Path, scratch: Path):
    first = lines_file(tmp_path / "a.txt", "a cat", "a dog")
    (tmp_path / "elsewhere").mkdir()
    second = lines_file(tmp_path / "elsewhere" / "b.txt", "a cat", "a dog", "a Dog")
    one = open_prompts(PromptsConfig(path=first), scratch)
    assert one.identity == open_prompts(PromptsConfig(path=second), scratch / "other").identity
    lines_file(tmp_path / "a.txt", "a cat", "a dog", "a cow")
    assert open_prompts(PromptsConfig(path=first), scratch).identity != one.identity
    assert pickle.loads(pickle.dumps(one)).read(0, 1) == one.read(0, 1)


# -- choosing ----------------------------------------------------------------------------------------------------------
def test_lengths_and_the_blocklist_leave_out_with_their_reasons(tmp_path: Path, scratch: Path):
    lines = [
        "cat",
        "a red cat",
        "a cat with a NUDE  statue",
        "a nudeness",
        "one two three four five six seven",
        "b" * 50,
    ]
    path = lines_file(tmp_path / "a.txt", *lines)
    options = {"min_words": 1, "max_words": 6, "max_characters": 40, "blocklist": ["nude statue", "red"]}
    prompts = open_prompts(PromptsConfig(path=path, **options), scratch)
    assert [prompt.text for prompt in prompts.read(0, 9)] == ["cat", "a nudeness"]
    assert prompts.left_out == {"blocked": 2, "too_long": 2}
    assert "'a red cat' has 'red'" in prompts.examples[0]
    listed = lines_file(tmp_path / "list.txt", "Nude Statue", "red")
    again = open_prompts(PromptsConfig(path=path, **{**options, "blocklist": listed}), scratch)
    assert again.identity == prompts.identity
    assert "'!!' has no word" in message(scratch, path=path, blocklist=["!!"])
    assert "too_short" in message(scratch, path=path, min_words=9)


@given(given=st.lists(texts, min_size=1, max_size=40), limit=st.none() | st.integers(1, 12), least=st.integers(1, 7))
@quickly
def test_of_equal_prompts_the_first_is_taken(given: list[str], limit: int | None, least: int, tmp_path_factory: Any):
    folder = tmp_path_factory.mktemp("prompts")
    path = lines_file(folder / "a.txt", *given)
    first: dict[str, int] = {}
    for row, text in enumerate(given):
        first.setdefault(text.casefold(), row)
    wanted = list(first.values())[:limit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_choice, "LEAST", least)
        prompts = open_prompts(PromptsConfig(path=path, limit=limit), folder)
        assert [prompt.row for prompt in prompts.read(0, 99)] == wanted
        if limit is None:
            assert prompts.left_out.get("duplicate", 0) == len(given) - len(wanted)
        shuffled = prompts_of(folder, path=path, limit=limit, shuffle=7)
    assert len(shuffled) == len(wanted)
    assert {prompt.row for prompt in shuffled} <= set(first.values())


def test_similar_prompts_are_dropped_and_others_are_not(tmp_path: Path, scratch: Path):
    draw = random.Random(5)
    words = [f"word{number}" for number in range(2000)]
    lines = [" ".join(draw.choices(words, k=40)) for _ in range(300)]
    changed = []
    for line in lines[:100]:  # 35 of 41 runs of three words stay: a share of 0.85
        some = line.split()
        some[20] = "other"
        changed.append(" ".join(some))
    quite = [" ".join(line.split()[:20] + draw.choices(words, k=20)) for line in lines[100:200]]
    path = lines_file(tmp_path / "a.txt", *lines, *changed, *quite)
    prompts = open_prompts(PromptsConfig(path=path, duplicates="near"), scratch)
    rows = {prompt.row for prompt in prompts.read(0, 999)}
    assert rows >= set(range(300)) | set(range(400, 500))
    assert prompts.left_out["near_duplicate"] == 500 - len(prompts) > 75
    exact = open_prompts(PromptsConfig(path=path), scratch)
    assert (len(exact), exact.left_out) == (500, {})


def test_ranges_are_read_across_row_groups(tmp_path: Path, scratch: Path):
    path = lines_file(tmp_path / "a.txt", *(f"prompt {number}" for number in range(10_000)))
    prompts = open_prompts(PromptsConfig(path=path), scratch)
    assert len(prompts) == 10_000
    for start, stop in ((0, 1), (4095, 4097), (4096, 8192), (9990, 20_000), (5, 5), (10_000, 10_001)):
        rows = [prompt.row for prompt in prompts.read(start, stop)]
        assert rows == list(range(start, min(stop, 10_000)))


def test_damaged_prepared_prompts_are_named(tmp_path: Path, scratch: Path):
    config = PromptsConfig(path=lines_file(tmp_path / "a.txt", "a cat"))
    prompts: Prompts = open_prompts(config, scratch)
    prompts.path.write_bytes(b"PAR1")
    with pytest.raises(RequestError, match="remove that file"):
        open_prompts(config, scratch)
