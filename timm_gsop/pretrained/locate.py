"""Where a network's pretrained weights are: in the package, on the Hugging Face Hub, or at their origin."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.models import PretrainedCfg

from timm_gsop.pretrained.digests import SHIPPED, digest_in_name, known_digest, origin_digest, sha256_of
from timm_gsop.pretrained.download import DownloadError, download_file
from timm_gsop.pretrained.sources import addresses_of, page_of

__all__ = ["is_origin", "locate_weights", "shipped", "weights_state"]

_logger = logging.getLogger(__name__)


def shipped(model: str) -> str:
    """The file in this package that has a small model's weights."""
    return str(SHIPPED / f"{model}.safetensors")


def locate_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """Find the weights of a pretrained configuration, and download them if they are not cached.

    A file that the configuration names (those that ship with this package do) comes first, then its repository on the
    Hub; if that does not exist, its origin, at each address in turn (see :mod:`timm_gsop.pretrained.sources`). Files
    are checked at each load, cached ones too: against the digest that this package holds (see
    :mod:`timm_gsop.pretrained.digests`), the one that the Hub states, or the head of it in an origin's file name. A
    damaged file in a cache is downloaded again. Files are replaced in one step, so that processes
    may do this at the same time.

    Args:
        cfg: The configuration.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.

    Returns:
        The file, or None where timm finds the weights without us: those that are given as tensors or as a file or
        folder, and addresses whose file names have no digest.

    Raises:
        RuntimeError: If the weights are neither cached nor available, or are not what their digest says.
    """
    if cfg.state_dict or cfg.source == "local-dir":
        return None
    if cfg.file:
        _check_shipped(Path(cfg.file))
        return None
    if cfg.hf_hub_id and not cfg.hf_hub_filename:
        try:
            return _from_hub(cfg.hf_hub_id, cache_dir)
        except _DamagedError:
            raise
        except Exception as error:  # of HTTP libraries, too, which differ with the client's version
            return _without_the_hub(cfg, cache_dir, error)
    return _from_origin(cfg, cache_dir) if _digest_in(cfg.url) else None


def weights_state(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> tuple[str, str]:
    """Say where the weights of a pretrained configuration are now, without a connection and without reading them.

    Args:
        cfg: The configuration.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.

    Returns:
        The state, and the file, repository or address it is about. The state is ``"ships"`` (a file of this package),
        ``"cached"``, ``"on the Hub"`` or ``"at its origin"`` (to be downloaded), or ``"none"``.

    Example:
        >>> from timm.models import get_pretrained_cfg
        >>> from timm_gsop.pretrained.locate import weights_state
        >>> state, file = weights_state(get_pretrained_cfg("gsop_preresnet20_net1.fashion_mnist"))
        >>> state, file.rpartition("/")[2]
        ('ships', 'gsop_preresnet20_net1.fashion_mnist.safetensors')
    """
    if cfg.file:
        return ("ships" if Path(cfg.file).is_file() else "none"), str(cfg.file)
    url = cfg.url if isinstance(cfg.url, str) else ""
    origin = _origin_file(url, cache_dir) if url else None
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        filename = cfg.hf_hub_filename or "model.safetensors"
        cached = try_to_load_from_cache(repo_id, filename, revision=revision or None, cache_dir=cache_dir)
        if isinstance(cached, str):
            return "cached", cfg.hf_hub_id
    if origin is not None and origin.is_file():
        return "cached", url
    if cfg.hf_hub_id:
        return "on the Hub", cfg.hf_hub_id
    return ("at its origin", url) if url else ("none", "")


class _DamagedError(RuntimeError):
    """A file is not what its digest says."""

    def __init__(self, path: Path, digest: str, what_now: str) -> None:
        super().__init__(f"{path} was damaged: its SHA-256 is {_sha256_if_there(path)}, not {digest}. {what_now}")


def _check_shipped(path: Path) -> None:
    digest = known_digest(path)
    if digest and path.exists() and not _is(path, digest):
        raise _DamagedError(path, digest, "It is part of timm-gsop: install the package again.")


def _from_hub(hub_id: str, cache_dir: str | Path | None) -> Path:
    repo_id, _, revision = hub_id.partition("@")
    where: Any = dict(repo_id=repo_id, filename="model.safetensors", revision=revision or None, cache_dir=cache_dir)
    was_cached = isinstance(try_to_load_from_cache(**where), str)
    path = Path(hf_hub_download(**where))
    digest = known_digest(hub_id) or _stated_digest(path)
    if was_cached and not _is(path, digest):
        _logger.warning("%s was damaged: it is downloaded again", path)
        try:
            path = Path(hf_hub_download(**where, force_download=True))
        except Exception as error:
            raise _removed(path, digest) from error
    if not _is(path, digest):
        raise _removed(path, digest)
    return path


def _stated_digest(path: Path) -> str:
    """What the Hub said: its cache names large files by their SHA-256."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else ""


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


def _from_origin(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    url, path, digest = str(cfg.url), _origin_file(str(cfg.url), cache_dir), _digest_in(cfg.url)
    was_cached = path.exists()
    if was_cached and _is(path, digest):
        return path
    if was_cached:
        _logger.warning("%s was damaged: it is downloaded again", path)
    failures: dict[str, DownloadError] = {}
    for address in addresses_of(url):
        try:
            if constants.HF_HUB_OFFLINE:
                raise DownloadError("HF_HUB_OFFLINE is set")
            download_file(address, path, digest)
            return path
        except DownloadError as error:
            failures[address] = error
            if path.exists() and _is(path, digest):  # another process has brought it
                return path
    if was_cached:
        raise _removed(path, digest) from failures.popitem()[1]
    raise _unavailable(cfg, None, failures)


def _origin_file(url: str, cache_dir: str | Path | None) -> Path:
    """Where PyTorch and timm keep the file of an address."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    return folder / Path(urlparse(url).path).name


def _digest_in(url: str | tuple[str, str] | None) -> str:
    """The digest of the file at an address: "" where its name has none."""
    if not isinstance(url, str) or not digest_in_name(url):
        return ""
    return origin_digest(Path(urlparse(url).path).name)


def is_origin(path: Path, url: str | tuple[str, str] | None) -> bool:
    """Whether a file is the one at an address, by the digest in the address."""
    return bool(_digest_in(url)) and _is(path, _digest_in(url))


def _is(path: Path, digest: str) -> bool:
    """Whether a file has a digest, of which the head is enough; any file has ""."""
    return not digest or _sha256_if_there(path).startswith(digest)


def _sha256_if_there(path: Path) -> str:
    try:
        return sha256_of(path)
    except FileNotFoundError:  # another process has just removed it
        return "unknown (the file is gone)"


def _removed(path: Path, digest: str) -> _DamagedError:
    error = _DamagedError(path, digest, "It has been removed; the next try downloads it.")
    path.resolve().unlink(missing_ok=True)  # behind the link that the Hub's cache makes
    return error


def _unavailable(
    cfg: PretrainedCfg, cause: Exception | None, failures: Mapping[str, DownloadError] | None = None
) -> RuntimeError:
    """What to do without weights: from the Hub, or from an origin, whose addresses failed."""
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.hf_hub_id or cfg.architecture
    what_now = "Connect to the network and try again"
    if failures:
        places = ", ".join(failures)
        reason = "; ".join(f"{urlparse(address).netloc}: {error}" for address, error in failures.items())
        copy = f"fetch the file in a browser ({page_of(str(cfg.url))}) and pass it"
        is_released = len(addresses_of(str(cfg.url))) > 1
        convert = ", or python hub/convert.py --from fast-mpn-cov PATH FOLDER" if is_released else ""
    else:
        places = " or ".join(place for place in (cfg.hf_hub_id and f"the Hub as {cfg.hf_hub_id}", cfg.url) if place)
        lines = str(cause).strip().splitlines()
        reason = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        copy, convert = "pass a copy", ""
    if isinstance(cause, GatedRepoError):
        repo_id = str(cfg.hf_hub_id).partition("@")[0]
        what_now = (
            f"The repository is gated: accept its conditions at https://huggingface.co/{repo_id}, and log in with "
            "`hf auth login`"
        )
    return RuntimeError(
        f"The pretrained weights of {name} are not cached and cannot be had from {places}. {what_now}, or {copy}: "
        f"pretrained_cfg_overlay=dict(file='PATH') from Python, --pretrained --pretrained-path PATH for train.py"
        f"{convert}. With HF_HUB_OFFLINE=1 nothing is tried that is not cached. The cause: {reason}"
    )
