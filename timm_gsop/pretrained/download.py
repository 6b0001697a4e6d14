"""Downloading a file whole, and the right one, or not at all."""

import hashlib
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

__all__ = ["DownloadError", "download_file"]

TIMEOUT = 30
PART = 1 << 20


class DownloadError(RuntimeError):
    """An address did not give the file."""


def download_file(address: str, path: Path, digest: str = "") -> None:
    """Download a file, checking its SHA-256 as it comes; nothing is left unless it is complete and right.

    Args:
        address: Its address.
        path: Where to write it, in one step, so that processes may do this at the same time.
        digest: The head of its SHA-256, or all of it; "" for any file that is no web page.

    Raises:
        DownloadError: If the address cannot be reached, refuses, breaks off, or sends something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    sha256 = hashlib.sha256()
    try:
        request = Request(address, headers={"User-Agent": "timm-gsop"})
        with urlopen(request, timeout=TIMEOUT) as answer, partial.open("wb") as file:
            part = answer.read(PART)
            _refuse_web_page(part, answer.headers.get_content_type())
            while part:
                file.write(part)
                sha256.update(part)
                part = answer.read(PART)
        if not sha256.hexdigest().startswith(digest):
            raise DownloadError(f"it sent another file, or a damaged one: its SHA-256 is {sha256.hexdigest()}")
        partial.replace(path)
    except (OSError, HTTPException) as error:
        raise DownloadError(" ".join(f"{type(error).__name__}: {error}".split())) from error
    finally:
        partial.unlink(missing_ok=True)


def _refuse_web_page(start: bytes, content_type: str) -> None:
    """Google Drive answers with a page where it does not give a file, and so do networks that want a log-in."""
    text = start.lstrip().lower()
    if content_type != "text/html" and not text.startswith((b"<!doctype html", b"<html")):
        return
    why = ""
    if b"quota" in text:
        why = ": the quota of downloads is used up, and comes back within a day"
    elif b"virus" in text:
        why = ": its warning that it cannot scan a large file for viruses"
    raise DownloadError(f"it answered with a web page instead of the file{why}")
