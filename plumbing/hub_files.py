"""Datasets on the Hugging Face hub: their names, the files in them, and their commits."""
import re
from typing import NamedTuple


class Dataset(NamedTuple):
    """A dataset on the hub, or a folder of one. Without a revision it is the newest commit."""

    repository: str
    revision: str | None = None
    folder: str | None = None


def parse_dataset(name: str) -> Dataset | None:
    """Parse OWNER/NAME[@REVISION][/FOLDER]. Returns None if the name has another form."""
    match = re.fullmatch(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<folder>.*))?", name)
    return Dataset(**match.groupdict()) if match else None


def list_hub_files(dataset: Dataset) -> tuple[list[list], str]:
    """Return ([[hf:// address, bytes], ...], commit) for everything in the dataset's folder."""
    from huggingface_hub import HfApi, HfFileSystem

    commit = HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha
    root = f"datasets/{dataset.repository}@{commit}/{dataset.folder or ''}".rstrip("/")
    found = HfFileSystem(skip_instance_cache=True).find(root, detail=True)
    return [[f"hf://{name}", entry["size"]] for name, entry in found.items()], commit


def list_bin_files(dataset: Dataset) -> tuple[list, str]:
    """Return ([entry, ...], commit) for the .bin files at the top of the dataset.

    An entry has path, size and lfs, which holds the file's sha256; lfs is None if the hub has no hash of the file.
    """
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha
    entries = HfApi().list_repo_tree(dataset.repository, repo_type="dataset", revision=commit)
    return [entry for entry in entries if entry.path.endswith(".bin")], commit
