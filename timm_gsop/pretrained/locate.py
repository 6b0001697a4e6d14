"""Where a network's pretrained weights are: in the package, on the Hugging Face Hub, or at their origin."""

import hashlib
import logging
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.models import PretrainedCfg
from torch.hub import download_url_to_file

__all__ = ["HUB_ORGANISATION", "hub_id", "is_origin", "locate_weights", "shipped"]

HUB_ORGANISATION = "timm-gsop"
"""Owner of our repositories on the Hub."""

SHIPPED = Path(__file__).parent / "shipped"

_logger = logging.getLogger(__name__)


def hub_id(model: str) -> str:
    """The Hub's whole id of one of our models, ``"gsop_resnet50_net2.isqrt_in1k"`` for one."""
    return f"{HUB_ORGANISATION}/{model}"


def shipped(model: str) -> str:
    """The file in this package that has a small model's weights."""
    return str(SHIPPED / f"{model}.safetensors")


def locate_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """Find the weights of a pretrained configuration, and download them if they are not cached.

    A file that the configuration names (those that ship with this package do) comes first, then its repository on the
    Hub; if that does not exist, its origin. The digest that the Hub states of a file, and the one in an origin's file
    name, are checked each time, for cached files too.

    Args:
        cfg: The configuration.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.

    Returns:
        The file, or None where timm finds the weights without us: those that are given as tensors or as a file or
        folder, and addresses whose file names have no digest.

    Raises:
        RuntimeError: If the weights are neither cached nor to be had, or are not what their digest says.
    """
    if cfg.state_dict or cfg.file or cfg.source == "local-dir":
        return None
    if cfg.hf_hub_id and not cfg.hf_hub_filename:
        try:
            path = _from_hub(cfg.hf_hub_id, cache_dir)
        except Exception as error:  # of HTTP libraries, too, which differ with the client's version
            return _without_the_hub(cfg, cache_dir, error)
        blob = path.resolve()  # the Hub's cache names large files by their SHA-256
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            _check_digest(blob, blob.name)
        return path
    return _from_origin(cfg, cache_dir) if _digest_in(cfg.url) else None


def _without_the_hub(cfg: PretrainedCfg, cache_dir: str | Path | None, error: Exception) -> Path | None:
    """Where the weights are if the Hub gave an error instead."""
    has_origin = bool(_digest_in(cfg.url))
    no_repository = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    no_file = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    if has_origin and (no_repository or no_file):
        _logger.warning("%s is not on the Hub: its weights come from their origin, %s", cfg.hf_hub_id, cfg.url)
        return _from_origin(cfg, cache_dir)
    if no_file:
        return None  # not as safetensors: timm knows the other names
    if has_origin and _origin_file(str(cfg.url), cache_dir).exists():
        _logger.warning("The Hub cannot be reached: %s comes from the cache of its origin", cfg.hf_hub_id)
        return _from_origin(cfg, cache_dir)
    raise _unavailable(cfg, error) from error


def _from_hub(hub_id: str, cache_dir: str | Path | None) -> Path:
    repo_id, _, revision = hub_id.partition("@")
    return Path(hf_hub_download(repo_id, "model.safetensors", revision=revision or None, cache_dir=cache_dir))


def _from_origin(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    path = _origin_file(str(cfg.url), cache_dir)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(str(cfg.url), str(path), hash_prefix=_digest_in(cfg.url), progress=False)
        except (OSError, RuntimeError) as error:
            raise _unavailable(cfg, error) from error
    _check_digest(path, _digest_in(cfg.url))
    return path


def _origin_file(url: str, cache_dir: str | Path | None) -> Path:
    """Where PyTorch and timm keep the file of an address."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    return folder / Path(urlparse(url).path).name


def _digest_in(url: str | tuple[str, str] | None) -> str:
    """The head of the SHA-256 in a file's name, as PyTorch's hub writes it: ``name-15991845.pth``."""
    found = re.search(r"-([0-9a-f]{8,})\.\w+$", url) if isinstance(url, str) else None
    return found.group(1) if found else ""


def is_origin(path: Path, url: str | tuple[str, str] | None) -> bool:
    """Whether a file is the one at an address, by the digest in the address."""
    return bool(_digest_in(url)) and _sha256(path).startswith(_digest_in(url))


def _check_digest(path: Path, digest: str) -> None:
    found = _sha256(path)
    if not found.startswith(digest):
        path.unlink()
        raise RuntimeError(
            f"{path} was damaged: its SHA-256 is {found}, not {digest}. It has been removed; the next try downloads it."
        )


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha256.update(part)
    return sha256.hexdigest()


def _unavailable(cfg: PretrainedCfg, cause: Exception) -> RuntimeError:
    places = " or ".join(place for place in (cfg.hf_hub_id and f"the Hub as {cfg.hf_hub_id}", cfg.url) if place)
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.hf_hub_id
    reason = str(cause).strip().splitlines()
    return RuntimeError(
        f"The pretrained weights of {name} are not cached and cannot be had from {places}. Connect "
        f"to the network and try again, or pass a copy: pretrained_cfg_overlay=dict(file='PATH'). The cause: "
        f"{type(cause).__name__}: {reason[0] if reason else ''}"
    )
