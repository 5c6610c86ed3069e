"""An exported folder -> a model repository on the Hugging Face hub.

    check_name(repository)   raises UserError unless it is OWNER/NAME
    push(folder, ...)        uploads the folder and returns what to print
"""
import shlex
from pathlib import Path

from plumbing.cli import UserError, explain


def check_name(repository: str) -> None:
    """Raise UserError unless a repository is named OWNER/NAME, in the characters that the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid, why = repository.count("/") == 1, ""
    except HFValidationError as error:
        is_valid, why = False, f" ({explain(error)})"
    if not is_valid:
        raise UserError(f"--push_to_hub is {repository!r}, it must be OWNER/NAME: your name on the hub, or that of an "
                        f"organization, and the model's{why}")


def status_of(error: BaseException | None) -> int | None:
    """Return the status with which a server has answered, from an error or one of its causes; None if it has not."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return status
        error = error.__cause__ or error.__context__
    return None


def push(folder: Path, repository: str, shown: str) -> str:
    """Upload a folder, in one commit, to a repository that is made if it does not exist; return what to print.

    Raises UserError, with the remedy, if that fails; the folder, whose name for the user is `shown`, stays.
    """
    from huggingface_hub import HfApi, errors

    again = f"{shown} is complete; upload it with `hf upload {repository} {shlex.quote(shown)} .`"
    try:
        HfApi().create_repo(repository, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=repository, folder_path=folder,
                                       commit_message="Exported by export_hf.py")
    except Exception as error:  # the hub's client has dozens of errors
        status = status_of(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            remedy = "unset HF_HUB_OFFLINE"
        elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
            remedy = "log in with `hf auth login`, with a token that may write"
        elif status in (403, 404, 409):
            remedy = f"you may not write to {repository}: name one of your own, or use a token that may write there"
        elif status:
            is_passing = status in (408, 429) or status >= 500
            remedy = f"the hub answered {status}, " + ("try it again later" if is_passing else "which refuses it")
        else:
            remedy = "check the network"
        raise UserError(f"cannot upload to {repository}: {remedy} ({explain(error):.200}). {again}") from error
    return f"uploaded to {commit.repo_url}"
