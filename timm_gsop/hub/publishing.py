"""Publishing a folder on the Hugging Face Hub: checked, with its model card, in one commit."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from timm_gsop.hub.hub_folder import NO_LICENSE, HubFolder, check_hub_folder, check_new_folder, is_staged
from timm_gsop.hub.model_card import model_card
from timm_gsop.pretrained.digests import sums_line

__all__ = ["Published", "publish", "stage"]


class Published(NamedTuple):
    """What was published.

    Attributes:
        url: Address of the commit or pull request.
        sums_line: The line for ``timm_gsop/pretrained/SHA256SUMS``, by which ``pretrained=True`` may load it; None of a
            pull request, whose commit is another one when it is merged.
    """

    url: str
    sums_line: str | None


def stage(
    folder: Path,
    repo_id: str,
    destination: Path,
    figure: Path | None = None,
    license: str | None = None,
    replace: bool = False,
    permission: str | None = None,
) -> None:
    """Write what would be published into a new folder, or write nothing.

    Args:
        folder: The model, as ``hub/convert.py`` or timm's ``save_for_hf`` writes it.
        repo_id: The repository that it is for, ORG/NAME.
        destination: Where to write; it must not exist, or be empty.
        figure: A picture of the architecture.
        license: Identifier of the weights' licence, where the folder does not state it.
        replace: Whether ``destination`` may be what this function wrote before: it is replaced then.
        permission: Who has permitted to publish weights whose authors state no licence, and where; for the card.

    Raises:
        ValueError: If an argument is not accepted, the folder is not sound (see :func:`check_hub_folder`), or its
            weights have no licence and ``permission`` is not given.
    """
    _check_repo_id(repo_id)
    replace = replace and is_staged(destination)
    if not replace:
        check_new_folder(destination)
    checked = check_hub_folder(folder)
    _check_permission(checked, permission)
    card = model_card(checked, repo_id, figure.name if figure else None, license, permission)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as partial:
        complete = Path(partial) / "complete"
        complete.mkdir()
        for path in [*checked.files, *([figure] if figure else [])]:
            shutil.copyfile(path, complete / path.name)
        (complete / "README.md").write_text(card, encoding="utf-8")
        if replace:
            destination.replace(Path(partial) / "former")
        complete.replace(destination)


def publish(
    folder: Path,
    repo_id: str,
    figure: Path | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    permission: str | None = None,
) -> Published:
    """Check a folder, write its card, and upload both in one commit.

    Files that an interrupted upload has sent are not sent again. The token is the one of ``hf auth login``
    or of the environment variable ``HF_TOKEN``.

    Args:
        folder: The model, as ``hub/convert.py`` or timm's ``save_for_hf`` writes it.
        repo_id: The repository, ORG/NAME; it is created if it does not exist.
        figure: A picture of the architecture.
        license: Identifier of the weights' licence, where the folder does not state it.
        private: Whether a repository that is created is private.
        revision: Branch to commit to, created if it does not exist; None for main.
        create_pr: Whether to open a pull request instead of committing to the branch.
        permission: Who has permitted to publish weights whose authors state no licence, and where; for the card.

    Returns:
        Address of the commit or pull request, and the line for the package's SHA256SUMS.

    Raises:
        ValueError: If an argument is not accepted, the folder is not sound (see :func:`check_hub_folder`), or its
            weights have no licence and ``permission`` is not given.
        PermissionError: If there is no token.
        RuntimeError: If the Hub refuses, or cannot be reached, or the upload breaks off.
    """
    _check_repo_id(repo_id)
    if get_token() is None:
        raise PermissionError("There is no token for the Hub: run `hf auth login`.")
    with tempfile.TemporaryDirectory() as partial:
        staged = Path(partial) / "staged"
        stage(folder, repo_id, staged, figure, license, permission=permission)
        try:
            commit = _upload(staged, repo_id, private, revision, create_pr)
        except Exception as error:  # of HTTP libraries, which differ with the client's version, and of the system
            reason = " ".join(str(error.__cause__ or error).split())[:500]
            raise RuntimeError(f"{repo_id} was not published. {type(error).__name__}: {reason}") from error
        line = None if commit.pr_url else sums_line(repo_id, commit.oid, staged / "model.safetensors")
    return Published(str(commit.pr_url or commit.commit_url), line)


def _upload(staged: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> CommitInfo:
    api = HfApi(library_name="timm-gsop")
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organisation has it
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path.name, path) for path in sorted(staged.iterdir())],
        commit_message=f"Add {repo_id.partition('/')[2]}",
        revision=revision,
        create_pr=create_pr,
    )


def _check_permission(folder: HubFolder, permission: str | None) -> None:
    provenance = folder.config.get("provenance") or {}
    if provenance.get("license") == NO_LICENSE and not (permission or "").strip():
        raise ValueError(
            f"permission={permission!r} is not accepted: {folder.path} has weights of {provenance.get('origin_url')}, "
            "whose authors state no licence. Ask them; accepted: --i-have-permission TEXT, which goes into the card."
        )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} is not accepted: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} is not accepted; accepted: ORG/NAME.")
