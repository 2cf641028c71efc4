"""DPG-Bench's rules, with a server that looks at the pictures, and with a small model of random weights."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.evaluate import EvaluationOptions, evaluate_pictures
from microdit.pipeline.evaluation.questions import AskedPrompt, is_yes, load_judge, read_questions
from tests.model.pretrained.captioner_models import vision_folder

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
TABLE = HEADER + (
    'p1,"a red picture, large",,1,0,entity,whole,entity - whole (picture),Is there a picture?\n'
    'p1,"a red picture, large",,2,1,attribute,color,attribute - color (red),Is it red?\n'
    'p1,"a red picture, large",,3,"1,2",attribute,size,attribute - size (large),Is there a picture?\n'
    "p2,a blue picture,,1,0,attribute,color,attribute - color (blue),Is it blue?\n"
)


@given(st.dictionaries(st.integers(1, 6), st.booleans(), min_size=1), st.data())
def test_a_question_counts_only_with_those_that_it_depends_on(answers: dict[int, bool], data: st.DataObject) -> None:
    numbers = sorted(answers)
    depends = {
        n: data.draw(st.lists(st.sampled_from(numbers[: i + 1][:-1] or [n]), max_size=2)) for i, n in enumerate(numbers)
    }
    depends = {n: [each for each in some if each != n] for n, some in depends.items()}

    def counts(number: int) -> bool:
        return answers[number] and all(counts(each) for each in depends[number])

    prompt = AskedPrompt("a", dict.fromkeys(numbers, "?"), depends)
    assert prompt.score(answers) == sum(map(counts, numbers)) / len(numbers)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A judge that answers by the mean colour of the JPEG that it is sent."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            image, text = body["messages"][0]["content"]
            data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
            mean = np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3).mean(0)
            asked.append(text["text"])
            colour = ("red", "green", "blue")[int(mean.argmax())]
            yes = "Is there" in text["text"] or colour in text["text"]
            answer = json.dumps(
                {"choices": [{"message": {"content": "Yes." if yes else "No"}, "finish_reason": "stop"}]}
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1#colours", asked
        running.shutdown()


def pictures(folder: Path, colours: list[tuple[str, tuple[int, int, int]]]) -> Path:
    folder.mkdir()
    for number, (caption, colour) in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_pictures_are_asked_about_once(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    (tmp_path / "dpg.csv").write_text(TABLE)
    red, blue = (200, 10, 10), (10, 10, 200)
    some = pictures(
        tmp_path / "some", [("a red picture, large", red), ("a red picture, large", blue), ("a blue picture", blue)]
    )
    options = EvaluationOptions(["dpg"], models={"judge": url}, prompts=tmp_path / "dpg.csv", out=tmp_path / "out")
    found = evaluate_pictures(some, None, options)["metrics"]["dpg"]
    # red: 3 of 3; blue in place of red: 1 of 3, as the third depends on the second; blue: 1 of 1
    assert found["value"] == pytest.approx(100 * (1 + 1 / 3 + 1) / 3)
    assert (found["prompts"], found["questions"], found["judge"]) == (2, 7, url)
    assert len(asked) == 7 and asked[0].endswith("Answer with yes or no.")
    path = tmp_path / "out" / "answers.jsonl"
    path.write_text(path.read_text()[:-10])  # it was stopped within the last line
    assert evaluate_pictures(some, None, options)["metrics"]["dpg"] == found and len(asked) == 8
    (some / "2.txt").write_text("something else")
    with pytest.raises(RequestError, match=r"2\.png: its caption 'something else' is none of the prompts"):
        evaluate_pictures(some, None, options)


def test_a_captioner_answers(tmp_path: Path) -> None:
    judge = load_judge(str(vision_folder(tmp_path / "vlm", "qwen3_vl")), "cpu")
    answers = judge(np.zeros((40, 40, 3), np.uint8), ["Is it red?", "Is it blue?"])
    assert len(answers) == 2 and all(isinstance(each, str) for each in answers)


@pytest.mark.parametrize(
    ("answer", "yes"), [("Yes", True), (" yes, it is", True), ("**Yes**", True), ("No", False), ("", False)]
)
def test_answers_are_read_by_their_first_word(answer: str, yes: bool) -> None:
    assert is_yes(answer) == yes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\na\n", "no table of questions .*expected the columns item_id, text, proposition_id"),
        (HEADER, "there is no question in it"),
        (HEADER + "p1,a,,1,4,,,,Is it?\n", "question 1 of 'a' depends on 4, which is not there"),
        (HEADER + "p1,a,,x,0,,,,Is it?\n", "no table of questions"),
    ],
)
def test_other_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_questions(tmp_path / "a.csv")


def test_a_judge_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text(TABLE)
    with pytest.raises(RequestError, match="give --prompts dpg-bench, and --model judge=NAME"):
        EvaluationOptions(["dpg"], prompts=tmp_path / "dpg.csv").check()
    with pytest.raises(RequestError, match=r"which model\? Give http://host/v1#NAME"):
        load_judge("http://host/v1", "cpu")
    with pytest.raises(RequestError, match="--model judge=/nowhere"):
        load_judge("/nowhere", "cpu")
