"""Models whose files name Python code of their own: refused with one message, and nobody is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microdit.model.pretrained.captioners import load_captioner
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.pretrained.vision import load_vision_model
from tests.model.pretrained.captioner_models import vision_folder
from tests.model.pretrained.text_models import bert_files, qwen3_files
from tests.model.pretrained.vision_models import clip_model


def _compare(folder: Path) -> Any:
    return load_vision_model(folder, "compare")


def _blip(folder: Path) -> Any:
    return vision_folder(folder, "blip")


@pytest.mark.parametrize(
    ("make", "load", "file", "kind"),
    [
        (bert_files, load_text_encoder, "tokenizer_config.json", "AutoTokenizer"),
        (qwen3_files, load_text_encoder, "tokenizer_config.json", "AutoTokenizer"),
        (_blip, load_captioner, "tokenizer_config.json", "AutoTokenizer"),
        (_blip, load_captioner, "preprocessor_config.json", "AutoImageProcessor"),
        (clip_model, _compare, "tokenizer_config.json", "AutoTokenizer"),
        (clip_model, _compare, "preprocessor_config.json", "AutoImageProcessor"),
    ],
)
def test_code_of_a_models_own_is_refused(
    make: Callable[[Path], Any],
    load: Callable[[Path], Any],
    file: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    folder = tmp_path / "stranger"
    make(folder)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    there = [path for path in (folder / file, folder / "processor_config.json") if path.exists()]
    (folder / "processor_config.json").unlink(missing_ok=True)
    config = json.loads(there[0].read_text()) if there and there[0].name == file else {}
    named = ["own.Own", None] if kind == "AutoTokenizer" else "own.Own"
    for key in ("tokenizer_class", "image_processor_type", "processor_class"):
        config.pop(key, None)
    own = {"tokenizer_class": "Own"} if kind == "AutoTokenizer" else {"image_processor_type": "Own"}
    (folder / file).write_text(json.dumps({**config, **own, "auto_map": {kind: named}}))
    with pytest.raises(ModelFilesError, match=rf"stranger: {file} names Python code of its own") as caught:
        load(folder)
    assert not asked and not ran.exists() and "trust_remote_code" not in str(caught.value)
