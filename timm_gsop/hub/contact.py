"""First contact with released weights: download, check, convert and measure them, and report what came of it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from timm_gsop.complete_file import replacing
from timm_gsop.hub.conversion import convert
from timm_gsop.pretrained.digests import origin_digest, sha256_of
from timm_gsop.pretrained.download import DownloadError, download_file
from timm_gsop.pretrained.sources import SOURCES, Source

__all__ = ["make_contact"]


def make_contact(
    folder: Path,
    imagenet: Path | None = None,
    validate: Path | None = None,
    sources: Sequence[Source] = SOURCES,
) -> list[dict[str, Any]]:
    """Try every source: each of its addresses in turn, the digest, conversion, and timm's validate.py.

    Args:
        folder: Where files, converted folders, ``report.json`` and ``report.md`` go. Files that are there already are
            not downloaded again.
        imagenet: Folder of ImageNet's images with ``val`` or ``validation`` in it; None measures nothing.
        validate: timm's validate.py, if ``imagenet`` is given.
        sources: What to try.

    Returns:
        What the report has: a dictionary for each source, with ``loaded`` (a date, or None) and, where something went
        wrong, ``error``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for source in sources:
        row: dict[str, Any] = dict(file=source.file, model=source.model, reported=source.error, loaded=None)
        try:
            path = _file_of(source, folder, row)
            converted = folder / f"{source.model}-{path.name.partition('.')[0]}"
            shutil.rmtree(converted, ignore_errors=True)
            convert(source.code, str(path), converted, source.model, source.model_kwargs)
            row["loaded"] = date.today().isoformat()
            if imagenet is not None and validate is not None:
                row |= _measure(converted, imagenet, validate)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            row["error"] = " ".join(str(error).split())
        rows.append(row)
        _write(folder / "report.json", json.dumps(rows, indent=2))
        _write(folder / "report.md", _as_markdown(rows))
    return rows


def _file_of(source: Source, folder: Path, row: dict[str, Any]) -> Path:
    """The file, from the folder or the first address that gives it; notes its digest and its address."""
    path, expected = folder / source.file, origin_digest(source.file)
    failures = []
    if not (path.is_file() and sha256_of(path).startswith(expected)):
        for address in source.addresses:
            try:
                download_file(address, path, expected)
                row["address"] = address
                break
            except DownloadError as error:
                failures.append(f"{address}: {error}")
        else:
            raise DownloadError("; ".join(failures))
    row["sha256"] = sha256_of(path)
    return path


def _measure(folder: Path, imagenet: Path, validate: Path) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--model", f"local-dir:{folder}", "--pretrained", "--data-dir", str(imagenet), "--device", device]
    done = subprocess.run([sys.executable, str(validate), *options], capture_output=True, text=True)
    _, found, result = done.stdout.rpartition("--result")
    if done.returncode or not found:
        raise RuntimeError(f"{validate} failed: {' '.join(done.stderr.split())[-300:]}")
    measured = json.loads(result)
    return {key: measured[key] for key in ("top1_err", "top5_err")}


def _as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| file | network | loaded |", "| --- | --- | --- |"]
    for row in rows:
        lines.append(f"| `{row['file']}` | `{row['model']}` | {_loaded(row)} |")
    sums = [f"{row['sha256']}  origin/{row['file']}" for row in rows if row["loaded"]]
    return "\n".join([*lines, "", "```", *sums, "```", ""])


def _loaded(row: dict[str, Any]) -> str:
    """What the page on weights says of a file from now on."""
    if not row["loaded"]:
        return f"no: {row['error']}"
    text = f"on {row['loaded']}, SHA-256 {row['sha256'][:8]}…"
    if "top1_err" in row:
        text += f", top-1 / top-5 error {row['top1_err']:.2f} / {row['top5_err']:.2f} % by timm's validate.py"
    return f"{text}; {row['error']}" if "error" in row else text


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
