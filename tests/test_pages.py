"""The pages: what is generated is up to date, links lead somewhere, lines are short, commands can be parsed."""

import ast
import re
import runpy
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.config.yaml import load_yaml
from microdit.pipeline.evaluation.request import EvaluationRequest
from microdit.trainer.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "infra/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LONGEST_LINE = 160
README_WORDS, README_LINE = 700, 120


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


page = pytest.mark.parametrize("path", PAGES, ids=name_of)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        kept = (c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
        anchor, number = "".join(kept).replace(" ", "-"), 0
        while f"{anchor}-{number}".removesuffix("-0") in found:
            number += 1
        found.add(f"{anchor}-{number}".removesuffix("-0"))
    return found


def test_the_generated_pages_are_up_to_date() -> None:
    renew = runpy.run_path(str(ROOT / "docs/reference/renew.py"))
    for name, text in renew["pages"]().items():
        here = (ROOT / "docs/reference" / name).read_text()
        assert here == text, f"docs/reference/{name} is not what the code says: run `{renew['COMMAND']}`"


@page
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{name_of(path)}: there is no {link}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(path)}: {target or 'this page'} has no heading #{anchor}"


@page
def test_lines_are_short(path: Path) -> None:
    lines = FENCE.sub("", path.read_text()).splitlines()
    long = [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]
    assert not long, f"{name_of(path)}: {len(long)} lines of more than {LONGEST_LINE} characters, e.g. {long[0]!r}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= README_WORDS
    assert max(map(len, text.splitlines())) <= README_LINE


def commands_of(path: Path) -> Iterator[str]:
    """The commands `microdit ...` of a page: lines of its sh blocks, indented lines, and what stands in backquotes."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"^ {4}(microdit .*)$", text, re.MULTILINE)
    lines += re.findall(r"`(microdit [^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        command = line.split("  #")[0].strip()
        if command.startswith("microdit "):
            yield command


def example(command: str) -> bool:
    """Whether a command is one to type: neither a form (`microdit train RECIPE`) nor a name (`microdit gc`)."""
    words = command.split()
    return len(words) > 2 and not any(word.strip("[]").isupper() or word in ("...", "[OPTIONS]") for word in words)


@page
def test_commands_can_be_parsed(path: Path) -> None:
    """Options and arguments exist; what names a config or a recipe of ours loads with the overrides beside it."""
    group = typer.main.get_command(app)
    for command in commands_of(path):
        words = shlex.split(command)
        assert words[1] in group.commands or words[1].startswith("-"), f"{name_of(path)}: {command}"
        if not example(command) or words[1].startswith("-"):
            continue
        given = group.commands[words[1]].make_context(words[1], words[2:]).params  # exits if an option is unknown
        if str(given.get("config", "")).startswith("configs/"):
            if words[1] == "evaluate":
                load_yaml(ROOT / given["config"], EvaluationRequest)
            else:
                load_config(ROOT / given["config"], given["overrides"] or ())
        if str(given.get("recipe", "")).startswith("configs/"):
            load_recipe(ROOT / given["recipe"], given["overrides"] or ())


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """Each piece between `...` of a quoted message stands in a text of the code."""
    texts = [
        node.value
        for folder in ("pipeline", "trainer", "model")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 20
    for message in quoted:
        for piece in filter(str.strip, message.split("...")):
            assert any(piece in text for text in texts), f"{message!r}: no message of the code has {piece!r}"


@page
def test_programs_and_files_that_a_page_names_are_there(path: Path) -> None:
    """`python -m benchmarks.NAME`, `make TARGET`, and files of the tree in backquotes or commands."""
    text = path.read_text()
    for module in re.findall(r"python -m (benchmarks\.[a-z_]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{name_of(path)}: there is no {module}"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"{name_of(path)}: there is no make {target}"
    for file in re.findall(r"\b((?:configs|infra|benchmarks|docs)/[A-Za-z0-9_/-]+\.(?:yaml|sbatch|py|md|sql))", text):
        assert (ROOT / file).exists(), f"{name_of(path)}: there is no {file}"
