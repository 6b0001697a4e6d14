"""Feature maps of a frozen backbone, computed once for every image and kept in memory-mapped files."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from timm.data import create_transform
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_gsop.probe.images import Images, Pictures
from timm_gsop.probe.network import Extractor

__all__ = ["cached_maps", "unreadable_images"]


def cached_maps(
    images: Images,
    extractor: Extractor,
    folder: Path,
    *,
    limit: float | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> list[np.ndarray]:
    """Maps of every image, from the cache; those that are not there are computed, in one run over the images.

    A file holds the maps of one feature level as float16, in NumPy's format. It has its name when it is complete;
    until then it is ``….partial``, and the next run goes on after its last complete batch. An image that cannot be
    read has NaN in place of its map.

    Args:
        images: The images.
        extractor: The backbone and its feature levels.
        folder: Where the files are.
        limit: The most bytes that all files there may have together; None for any number.
        batch_size: Images a batch.
        workers: Processes that read images; 0 for none besides this one.
        progress: Whether to say what is needed, and to show progress.

    Returns:
        Of each level: (N, C, H, W), float16, memory-mapped.

    Raises:
        OSError: If there is not enough space for the files.
        ValueError: If they would have more bytes than ``limit``, or a map is not finite in float16.
    """
    what = [extractor.weights, extractor.data_config, str(extractor.autocast), images.digest]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    files = [folder / f"{name}-{digest}.npy" for name in extractor.names]
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder, progress):
        missing = [level for level, file in enumerate(files) if not file.exists()]
        if missing:
            _extract(images, extractor, files, missing, limit, batch_size, workers, progress)
        elif progress:
            print(f"The maps of all {len(images)} images are in {folder}.")
    return [np.load(file, mmap_mode="r") for file in files]


def _extract(
    images: Images,
    extractor: Extractor,
    files: Sequence[Path],
    missing: Sequence[int],
    limit: float | None,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """Compute the maps of the levels that are missing, or the rest of them."""
    partial = [files[level].with_suffix(".partial") for level in missing]
    headers = [_header((len(images), *extractor.shapes[level])) for level in missing]
    rows = [2 * int(np.prod(extractor.shapes[level])) for level in missing]
    done = min(_complete_rows(*part) for part in zip(partial, headers, rows, strict=True))
    _check_space(files[0].parent, sum(rows) * len(images), sum(rows) * done, partial, limit, progress)
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("r+b" if done else "wb")) for path in partial]
        for file, header, row in zip(opened, headers, rows, strict=True):
            file.write(header)
            file.truncate(len(header) + done * row)
            file.seek(0, 2)
        pictures = Pictures(images, done, create_transform(**extractor.data_config))
        bar = tqdm(total=len(images), initial=done, unit="image", desc="maps", disable=not progress)
        for batch in DataLoader(pictures, batch_size, num_workers=workers, collate_fn=list):
            readable = [i for i, picture in enumerate(batch) if picture is not None]
            found = extractor(torch.stack([batch[i] for i in readable])) if readable else []
            for level, file in zip(missing, opened, strict=True):
                maps = np.full((len(batch), *extractor.shapes[level]), np.nan, np.float16)
                if readable:
                    maps[readable] = found[level].half().cpu().numpy()
                    if not np.isfinite(maps[readable]).all():
                        raise ValueError(f"backbone={extractor.names[level]!r} has maps that float16 cannot hold.")
                file.write(maps.tobytes())
                file.flush()
            bar.update(len(batch))
        bar.close()
    for level, path in zip(missing, partial, strict=True):
        path.replace(files[level])


@contextmanager
def _only_one(folder: Path, progress: bool) -> Iterator[None]:
    """Let one run at a time fill a folder; a second one waits."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"Another run is filling {folder}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def unreadable_images(maps: np.ndarray) -> np.ndarray:
    """Indices of the images that could not be read, from their maps (N, C, H, W)."""
    return np.flatnonzero(np.isnan(maps[:, 0, 0, 0]))


def _header(shape: Sequence[int]) -> bytes:
    """The beginning of a file in NumPy's format."""
    file = BytesIO()
    header: dict[str, Any] = dict(descr=np.lib.format.dtype_to_descr(np.dtype("<f2")), fortran_order=False)
    np.lib.format.write_array_header_1_0(file, dict(header, shape=tuple(map(int, shape))))
    return file.getvalue()


def _complete_rows(path: Path, header: bytes, row: int) -> int:
    """How many maps an interrupted run has left."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return 0
    return (path.stat().st_size - len(header)) // row


def _check_space(
    folder: Path, size: int, done: int, partial: Sequence[Path], limit: float | None, progress: bool
) -> None:
    """Say what the files need, and refuse it where there is not so much."""
    others = sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file not in partial)
    free = shutil.disk_usage(folder).free
    if progress:
        print(f"The maps need {_gib(size)} in {folder}, where {_gib(others)} are used and {_gib(free)} are free.")
    if limit is not None and others + size > limit:
        raise ValueError(
            f"The maps need {_gib(size)}, and {folder} has {_gib(others)} already: more than the limit of "
            f"{_gib(limit)}. Delete what is not needed there, raise the limit, or probe fewer levels or images."
        )
    if size - done > free:
        raise OSError(errno.ENOSPC, f"The maps need {_gib(size - done)}, and {_gib(free)} are free", str(folder))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
