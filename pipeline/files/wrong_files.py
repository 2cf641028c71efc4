"""Recognise what often lies where an archive should be: pointers of git-lfs, web pages, answers of a server."""

from pathlib import Path

START = 4096  # bytes that are looked at
PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")


def what_it_is(path: Path) -> str:
    """Say what a file is that cannot be read as an archive or a table, and what to do; empty if it is not known."""
    with path.open("rb") as file:
        start = file.read(START)
    if not start:
        return "it is empty; get it again"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a git-lfs pointer, not the file: run git lfs pull where it lies"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(PAGES):
        return "it is an HTML page, not the file: its address asks for a login, or is wrong; get the file itself"
    if text.startswith(b"{") and b"error" in text:
        return f"it is a server's answer, not the file: {start[:120]!r}; get it again"
    return ""
