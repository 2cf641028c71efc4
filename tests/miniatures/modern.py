"""The open sets of 2026: whatever `tests/data/layouts/modern.yaml` tells of them, built by one function."""

from functools import cache
from typing import Any

import pyarrow as pa

from tests.miniatures import Expected, Miniature, Repository, beside, layout
from tests.miniatures.packing import EMPTY_TAR, json_bytes, parquet, tar, tgz
from tests.miniatures.pictures import picture

EACH = 3  # samples of a unit
SIZE = (300, 256)


@cache
def modern(name: str) -> Miniature:
    about = layout("modern")["sets"][name]
    files = beside(["README.md"], name) | dict.fromkeys(about.get("others", []), EMPTY_TAR)
    expected: list[Expected] = []
    table: list[dict[str, Any]] = []
    for unit in about["units"]:
        values = [_values(name, about, len(expected) + n) for n in range(EACH)]
        expected += [_expected(about, unit, each) for each in values]
        if "columns" in about:
            files[unit] = _table([_filled(about["columns"], each) for each in values])
        else:
            files |= _archive(about, unit, values)
        if "table" in about:
            table += [_filled(about["table"]["row"], each) for each in values]
    repositories = {about["repository"]: Repository(files, gated=about.get("gated", False))}
    if table:
        path = about["table"]["path"]
        content = {path: json_bytes(table) if path.endswith(".json") else _table(table)}
        files |= content if "repository" not in about["table"] else {}
        if "repository" in about["table"]:
            repositories[about["table"]["repository"]] = Repository(content)
    return Miniature(expected, repositories)


def _values(name: str, about: dict[str, Any], n: int) -> dict[str, Any]:
    extensions = about.get("extensions", ["png" if about.get("image", "").endswith("png") else "jpg"])
    extension = extensions[n % len(extensions)]
    made: dict[str, Any] = {"n": n, "text": f"The caption {n} of {name}: a “red” fox.", "extension": extension}
    made["image"] = picture(f"{name}/{n}", SIZE, extension)
    made["member"] = about.get("image", about.get("member", "")).format(**made)
    return made


def _filled(template: Any, values: dict[str, Any]) -> Any:
    if isinstance(template, dict):
        return {key: _filled(each, values) for key, each in template.items()}
    if template == "IMAGE":
        return {"bytes": values["image"].data, "path": None}
    if template == "ODD":
        return bool(values["n"] % 2)
    return template.format(**values) if isinstance(template, str) else template


def _expected(about: dict[str, Any], unit: str, values: dict[str, Any]) -> Expected:
    fields = dict(about.get("fields", {}))
    if "odd" in about:  # behind a gate: there for the odd ones only
        fields |= about["odd"] if values["n"] % 2 else dict.fromkeys(about["odd"])
    member = values["member"]
    if member.startswith("row-"):
        member = f"row-{values['n'] % EACH}"
    return Expected(unit, member, _filled(about["caption"], values), _filled(fields, values), values["image"])


def _archive(about: dict[str, Any], unit: str, values: list[dict[str, Any]]) -> dict[str, bytes]:
    members = []
    for each in values:
        stem = each["member"].rpartition(".")[0]
        for extension, content in about.get("beside", {}).items():
            filled = _filled(content, each)
            members.append((f"{stem}.{extension}", json_bytes(filled) if isinstance(filled, dict) else filled.encode()))
        members.append((each["member"], each["image"].data))
    if "parts" not in about:
        return {unit: tar(members)}
    whole, count = tgz(members), about["parts"]
    cut = len(whole) // count + 1
    return {f"{unit}.{n:02d}": whole[n * cut : (n + 1) * cut] for n in range(count)}


def _table(rows: list[dict[str, Any]]) -> bytes:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {}
    for name, value in rows[0].items():
        kind = image if isinstance(value, dict) else pa.string() if value is None else pa.scalar(value).type
        columns[name] = (kind, [row[name] for row in rows])
    return parquet(columns)
