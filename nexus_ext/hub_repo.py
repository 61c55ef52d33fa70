"""A model on the hub: which files it has, what they must be, and the hub's own cache layout.

    models--org--name/blobs/<digest>           the bytes, named by what they are
    models--org--name/snapshots/<commit>/file  links to them
    models--org--name/refs/main                the commit a branch was, when it was last asked

huggingface_hub lists, names and authorises; the bytes are fetched, and checked, here. Other
programs that use the hub's cache find what was fetched; what they fetched is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from nexus_ext.download import Download, Downloader
from nexus_ext.errors import (
    AccessDenied,
    CheckpointFormatError,
    ConfigError,
    ContentMismatch,
    MissingExtra,
    SourceUnavailable,
    WriteError,
)
from nexus_ext.files import write_whole
from nexus_ext.shards import Here, Shard

__all__ = [
    "INDEX",
    "SINGLE",
    "Repo",
    "RepoFile",
    "cached_snapshot",
    "fetch_descriptions",
    "fetch_repo",
    "is_offline",
    "keep_repo",
    "list_repo",
    "start_shards",
    "streamable_shards",
    "weight_files",
]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_WEIGHTS = ".safetensors"

# Weights as safetensors, and what describes them; never pickles.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_READ_BYTES = 8 << 20
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository.

    Attributes:
        name: Its path in the repository.
        nbytes: Its size.
        url: Where it is fetched.
        sha256: Of its bytes; None for small files, which have a `git_sha1` instead.
    """

    name: str
    nbytes: int
    url: str = field(repr=False)
    sha256: str | None
    git_sha1: str

    @property
    def blob(self) -> str:
        """The name of its bytes in the cache."""
        return self.sha256 or self.git_sha1

    def is_right(self, path: Path) -> bool:
        """Read all of it and compare."""
        whole = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.nbytes)
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                whole.update(data)
        return whole.hexdigest() == self.blob


@dataclass(frozen=True)
class Repo:
    """What a revision of a model consists of, and where that goes."""

    name: str
    revision: str
    commit: str
    root: Path
    files: tuple[RepoFile, ...]
    headers: Mapping[str, str] = field(repr=False)

    @property
    def snapshot(self) -> Path:
        """The folder with the files under their names."""
        return self.root / "snapshots" / self.commit

    def blob(self, file: RepoFile) -> Path:
        return self.root / "blobs" / file.blob


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says so."""
    return bool(_hub().constants.HF_HUB_OFFLINE)


def cached_snapshot(name: str, revision: str | None) -> Path:
    """What the hub's cache has of a model; asks nobody.

    Raises:
        ConfigError: Nothing, or not all.
    """
    hub = _hub()
    try:
        found = hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_WANTED), local_files_only=True
        )
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError, OSError) as error:
        raise ConfigError(
            f"Offline, a model must have been fetched before; the hub's cache has no {name}: "
            f"{error}"
        ) from error
    return Path(found)


def list_repo(name: str, revision: str | None) -> Repo:
    """Ask the hub what there is.

    Raises:
        ConfigError: It knows no such model or revision.
        AccessDenied: It wants a token, or another.
        SourceUnavailable: It cannot be reached.
        CheckpointFormatError: A file name, or a digest that becomes one, that could leave the
            folder; a size that is none.
    """
    hub = _hub()
    info = _info(hub, name, revision)
    _check_digest(info.sha, _SHA1, name, "its commit")
    headers = hub.utils.build_hf_headers()
    files = tuple(
        _repo_file(hub, name, info.sha, sibling)
        for sibling in info.siblings or ()
        if any(fnmatch(str(sibling.rfilename), pattern) for pattern in _WANTED)
    )
    folder = f"models--{name.replace('/', '--')}"
    root = Path(hub.constants.HF_HUB_CACHE) / folder
    return Repo(name, revision or "main", info.sha, root, files, headers)


def _info(hub: Any, name: str, revision: str | None) -> Any:
    import httpx2

    try:
        return hub.HfApi(endpoint=hub.constants.ENDPOINT).model_info(
            name, revision=revision, files_metadata=True
        )
    except hub.errors.GatedRepoError as error:
        raise AccessDenied(
            f"{name} is given to those who accepted its terms; the hub says: {error}. Accept them "
            "on its page, and log in with `hf auth login`."
        ) from error
    except hub.errors.HFValidationError as error:
        raise ConfigError(f"A model is a folder, a URL or a hub id; {name!r}: {error}") from error
    except hub.errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        kind = SourceUnavailable if status >= 500 or status == 429 else ConfigError
        raise kind(
            f"A model is a folder, a URL or a hub id; of {name!r} the hub says: {error}"
        ) from error
    except (httpx2.HTTPError, hub.errors.OfflineModeIsEnabled, OSError) as error:
        raise SourceUnavailable(f"The hub must be reachable to list {name}; {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a web page, perhaps
        raise SourceUnavailable(
            f"The hub must answer with a list of files; what came for {name} is none: {error!r}. "
            "Look at what stands between, and at HF_ENDPOINT."
        ) from error


def _repo_file(hub: Any, name: str, commit: str, sibling: Any) -> RepoFile:
    file = sibling.rfilename
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or "\\" in file or "\0" in file or ".." in parts:
        raise CheckpointFormatError(
            f"A file of a repository has a path inside it; {name} has {file!r}. Do not use it."
        )
    lfs = sibling.lfs
    size = sibling.size if lfs is None else lfs.size
    if type(size) is not int or size < 0:
        raise CheckpointFormatError(
            f"A file of a repository has a size; {name} says {size!r} of {file!r}. Do not use it."
        )
    if lfs is not None:
        _check_digest(lfs.sha256, _SHA256, name, file)
    else:
        _check_digest(sibling.blob_id, _SHA1, name, file)
    return RepoFile(
        file,
        size,
        hub.hf_hub_url(name, file, revision=commit),
        None if lfs is None else lfs.sha256,
        sibling.blob_id,
    )


def _check_digest(digest: Any, pattern: re.Pattern[str], name: str, what: str) -> None:
    """It becomes the name of a file or folder."""
    if not isinstance(digest, str) or not pattern.fullmatch(digest):
        raise CheckpointFormatError(
            f"A repository says digests in hexadecimal; {name} says {digest!r} of {what}. Do not "
            "use it."
        )


def fetch_repo(repo: Repo, downloader: Downloader, *, verify: bool) -> int:
    """Bring what is missing; returns the bytes that were there.

    Raises:
        DownloadError: See `Downloader.fetch`; small files that differ from git's digest as well.
        WriteError: The disk would not take it.
    """
    with _filing(repo):
        missing = [file for file in repo.files if not _is_there(repo, file, verify)]
        distinct = {file.blob: file for file in missing}
        repo.snapshot.mkdir(parents=True, exist_ok=True)
        (repo.root / "blobs").mkdir(exist_ok=True)
    downloader.fetch_all(_download(repo, file) for file in distinct.values())
    for file in distinct.values():
        _check_small(repo, file)
    keep_repo(repo)
    return sum(file.nbytes for file in repo.files) - sum(file.nbytes for file in missing)


def streamable_shards(repo: Repo) -> list[RepoFile] | None:
    """The files with weights, where those are one checkpoint that can be streamed while it comes,
    and something of it is missing. Its index, if it has one, is here.

    None where all must be fetched first: other weights beside it, an index that names others.
    """
    weights = [file for file in repo.files if file.sha256 and file.name.endswith(_WEIGHTS)]
    if all(_is_there(repo, file, verify=False) for file in weights):
        return None
    names = {file.name for file in repo.files if file.name.endswith(_WEIGHTS)}
    if names != {file.name for file in weights} or names != _listed(repo):
        return None
    return weights


def weight_files(repo: Repo) -> list[RepoFile] | None:
    """The files of its one checkpoint, by name; its index, if it has one, is here. None where there
    are others beside it, or some without a SHA-256.
    """
    weights = [file for file in repo.files if file.name.endswith(_WEIGHTS)]
    names = {file.name for file in weights if file.sha256}
    if len(names) < len(weights) or names != _listed(repo):
        return None
    return sorted(weights, key=lambda file: file.name)


def _listed(repo: Repo) -> set[str]:
    index = repo.snapshot / INDEX
    if not index.exists():
        return {SINGLE}
    try:
        listed = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return set()  # whoever opens it says what is wrong
    return listed


def fetch_descriptions(repo: Repo, downloader: Downloader) -> None:
    """All but the weights. Raises as `fetch_repo`."""
    small = tuple(file for file in repo.files if not file.name.endswith(_WEIGHTS))
    # The branch is noted when all is there.
    fetch_repo(replace(repo, files=small, revision=repo.commit), downloader, verify=False)


def start_shards(
    repo: Repo, shards: Sequence[RepoFile], downloader: Downloader
) -> dict[str, Shard]:
    """Begin what is missing, lazily; by name."""
    with _filing(repo):
        (repo.root / "blobs").mkdir(exist_ok=True)
    return {
        file.name: Here(repo.blob(file))
        if _is_there(repo, file, verify=False)
        else downloader.start(_download(repo, file), lazily=True)
        for file in shards
    }


def keep_repo(repo: Repo) -> None:
    """All of it is in the cache: give the files their names, and note the branch.

    Raises:
        WriteError: The disk would not take it.
    """
    with _filing(repo):
        for file in repo.files:
            _link(repo, file)
        if repo.revision != repo.commit:
            write_whole(repo.root / "refs" / repo.revision, repo.commit)


@contextmanager
def _filing(repo: Repo) -> Iterator[None]:
    """What the disk refuses becomes a `WriteError`."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"The hub's cache must take {repo.name}; {repo.root} would not: {error}. Make room, "
            "look at its permissions, or name another one with HF_HUB_CACHE."
        ) from error


def _download(repo: Repo, file: RepoFile) -> Download:
    return Download(file.url, repo.blob(file), file.nbytes, file.sha256, repo.headers)


def _is_there(repo: Repo, file: RepoFile, verify: bool) -> bool:
    blob = repo.blob(file)
    if not blob.is_file() or blob.stat().st_size != file.nbytes:
        return False
    return not verify or file.is_right(blob)


def _check_small(repo: Repo, file: RepoFile) -> None:
    """What has a SHA-256 was checked while it came."""
    if file.sha256 is None and not file.is_right(repo.blob(file)):
        repo.blob(file).unlink()
        raise ContentMismatch(
            f"A file must be what the hub lists; {file.name} of {repo.name} has other bytes than "
            f"git's digest {file.git_sha1} says. Fetch it again, over another network perhaps."
        )


def _link(repo: Repo, file: RepoFile) -> None:
    link = repo.snapshot / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(repo.blob(file), link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(target)
    temporary.replace(link)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise MissingExtra(
            "a hub id needs huggingface_hub: pip install 'nexus_ext[hub]'."
        ) from None
    return huggingface_hub
