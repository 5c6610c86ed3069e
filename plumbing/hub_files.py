"""The Hugging Face hub: names of datasets, the files in them, their commits; and files of a model."""
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from plumbing.progress import busy, load_tqdm
from plumbing.threads import in_background

SITES = "huggingface.co", "www.huggingface.co", "hf.co"
PAGES = "tree", "blob", "resolve", "raw"  # of a dataset, each followed by a revision and a path
REPOSITORY = r"(?P<repository>\w[\w.-]*/\w[\w.-]*)"
REVISION = r"(?P<revision>refs/convert/[\w.-]+|refs/pr/\d+|[^/@]+)"  # those with slashes that the hub has


class Dataset(NamedTuple):
    """A dataset on the hub, or a folder or file of one. Without a revision it is the newest commit."""

    repository: str
    revision: str | None = None
    folder: str | None = None

    @property
    def name(self) -> str:
        """Return it as --source takes it."""
        revision = self.revision or ""
        revision = revision if re.match("refs/(convert|pr)/", revision) else quote(revision, safe="")
        return self.repository + (f"@{revision}" if revision else "") + (f"/{self.folder}" if self.folder else "")


def parse_dataset(name: str) -> Dataset | None:
    """Parse OWNER/NAME[@REVISION][/PATH], with hf://datasets/ or datasets/ before it, or the address of a web page.

    What follows the host in an address will do, as OWNER/NAME/tree/main/PATH. The revision may hold slashes, as
    refs/convert/parquet and refs/pr/1 do, or %2F for others. Returns None if the name has another form.
    """
    address = urlsplit(re.sub(rf"^(?={'|'.join(map(re.escape, SITES))}/)", "https://", name))
    is_page = address.scheme in ("http", "https")
    if is_page:
        if address.netloc not in SITES or not address.path.startswith("/datasets/"):
            return None
        form = rf"{REPOSITORY}(/({'|'.join(PAGES)})/{REVISION}(/(?P<folder>.*))?|/viewer|/discussions)?"
        name = re.sub(r"^/datasets/|/$", "", address.path)
        name = re.sub(r"(?i)/refs%2F(convert|pr)%2F", r"/refs/\1/", name)
    else:
        if not name.startswith("hf://"):  # as it is copied from an address
            name = re.sub(rf"^((?:datasets/)?{REPOSITORY})/(?:tree|blob|resolve)/(?=[^/])", r"\1@", name)
        name = re.sub(r"^hf://(?=datasets/)|^(?=datasets/)", "", name).removeprefix("datasets/")
        form = rf"{REPOSITORY}(@{REVISION})?(/(?P<folder>.*))?"
        name = re.sub(r"(?i)@refs%2F(convert|pr)%2F", r"@refs/\1/", name)
    match = re.fullmatch(form, name)
    if not match:
        return None
    repository, revision, folder = (match[key] or "" for key in Dataset._fields)
    folder = (unquote(folder) if is_page else folder).strip("/")
    return Dataset(repository, unquote(revision) or None, folder or None)


@busy("listing the files on the hub")
def list_hub_files(dataset: Dataset) -> tuple[list[list], str]:
    """Return ([[hf:// address, bytes], ...], commit) for everything in the dataset's folder."""
    from huggingface_hub import HfApi, HfFileSystem

    commit = HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha
    root = f"datasets/{dataset.repository}@{commit}/{dataset.folder or ''}".rstrip("/")
    found = HfFileSystem(skip_instance_cache=True).find(root, detail=True)
    return [[f"hf://{name}", entry["size"]] for name, entry in found.items()], commit


@busy("listing the files on the hub")
def list_bin_files(dataset: Dataset) -> tuple[list, str]:
    """Return ([entry, ...], commit) for the .bin files at the top of the dataset.

    An entry has path, size and lfs, which holds the file's sha256; lfs is None if the hub has no hash of the file.
    """
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha
    entries = HfApi().list_repo_tree(dataset.repository, repo_type="dataset", revision=commit)
    return [entry for entry in entries if entry.path.endswith(".bin")], commit


def download_model(repository: str, revision: str, names: tuple[str, ...]) -> Path:
    """Download files of a model into the hub's cache, unless they are there; return their folder there."""
    from huggingface_hub import hf_hub_download

    bars = {"tqdm_class": load_tqdm()}
    with busy(f"downloading {repository}"):
        paths = in_background(lambda: [hf_hub_download(repository, name, revision=revision, **bars) for name in names])
    return Path(paths[0]).parent
