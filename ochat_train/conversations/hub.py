"""Data sets of the Hugging Face hub: hf://OWNER/NAME[@REVISION][/CONFIG][:SPLIT] -> files of one split at one commit.

Which files a config and a split have is decided by `datasets` itself, on a folder of empty files of the same names. The
files are then read as they are: nothing is converted, and nothing is written into a cache.
"""

import dataclasses
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

_T = TypeVar("_T")


class Unreachable(ValueError):
    """A file or its server is not there, may not be read, or is another one by now."""


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_DATA_SET = re.compile(
    rf"hf://(?!(?:datasets|models|spaces|buckets|kernels)/){_REPO}(?:@(?P<revision>refs/[^/]+/[^/:]+|[^/:]+))?"
    r"(?:/(?P<config>[^/:]+))?(?::(?P<split>[^/:]+))?"
)
_FILE = re.compile(rf"hf://datasets/{_REPO}@(?P<commit>[0-9a-f]{{40}})/(?P<path>.+)")
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # where a data set says what its configs are


def is_data_set(url: str) -> bool:
    """Whether a URL names a data set of the hub, or tries to, and not files of it (hf://datasets/...)."""
    return re.match(r"hf://(?!(datasets|buckets|models|spaces|kernels)/)", url) is not None


def list_data_set(url: str, ask: Callable[[str, Callable[[], Any]], Any]) -> dict[str, int]:
    """The files of one split, hf://datasets/OWNER/NAME@COMMIT/PATH, and the size of each in bytes.

    `ask(url, action)` runs what talks to the hub. With HF_HUB_OFFLINE=1 the copy in the cache is read. Raises
    ValueError for a data set, revision, config or split that is not there, or that must be named.
    """
    found = _DATA_SET.fullmatch(url)
    if found is None:
        forms = "hf://OWNER/NAME[@REVISION][/CONFIG][:SPLIT], or of files hf://datasets/OWNER/NAME/data/train-*.parquet"
        raise ValueError(f"{url} names no data set of the hub; the form is {forms}")
    from huggingface_hub import constants

    repo, revision = found["repo"], unquote(found["revision"] or "main")

    def ask_hub(action: Callable[[], Any]) -> Any:
        return ask(url, lambda: _explained(url, repo, revision, action))

    commit, sizes = (_look_up_cache if constants.HF_HUB_OFFLINE else _look_up_hub)(url, repo, revision, ask_hub)
    sizes = {path: size for path, size in sizes.items() if ".." not in PurePosixPath(path).parts and path[:1] != "/"}

    def fetch_card(name: str) -> str:
        from huggingface_hub import hf_hub_download

        return str(ask_hub(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=commit)))

    splits, name = _resolve(url, repo, found["config"], sizes, fetch_card)
    split = found["split"] or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        counts = ", ".join(f"{name} ({len(files):,} file{'s' * (len(files) != 1)})" for name, files in splits.items())
        wrong = f"no split {split}" if split else "several splits and none named"
        example = url.removesuffix(f":{found['split']}") + f":{next(iter(splits))}"
        raise ValueError(f"{url}: {wrong}; config {name} has {counts}: name one, as in {example}")
    urls = {path: path if "://" in path else f"hf://datasets/{repo}@{commit}/{path}" for path in splits[split]}
    files = {file: sizes.get(path, -1) for path, file in urls.items()}
    if constants.HF_HUB_OFFLINE and (absent := [file for file in files if "@" in file and not cached_copy(file)]):
        raise Unreachable(
            f"{url}: HF_HUB_OFFLINE is set, and {len(absent):,} of its {len(files):,} files are not in the cache, such "
            f"as {absent[0]}; {_fetch(repo)}"
        )
    print(f"{url}: config {name}, split {split}, {len(files):,} file{'s' * (len(files) != 1)} of commit {commit[:12]}")
    return files


def is_at_commit(url: str) -> bool:
    """Whether a URL names a file of a commit, which never changes."""
    return _FILE.fullmatch(url) is not None


def cached_copy(url: str) -> str | None:
    """The file on disk that the hub's own cache has for a file of a commit, or None."""
    found = _FILE.fullmatch(url)
    if found is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(found["repo"], found["path"], repo_type="dataset", revision=found["commit"])
    return path if isinstance(path, str) else None


def _look_up_hub(_url: str, repo: str, revision: str, ask_hub: Callable[..., Any]) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and the size of each of its files; two requests."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
    commit = revision if is_commit else ask_hub(lambda: api.dataset_info(repo, revision=revision).sha)
    tree = ask_hub(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")))
    return commit, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def _look_up_cache(url: str, repo: str, revision: str, ask_hub: Callable[..., Any]) -> tuple[str, dict[str, int]]:
    """The same of the copy in the hub's cache."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = Path(
        ask_hub(  # for no file, so it only finds the folder
            lambda: snapshot_download(
                repo, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
    )
    try:
        tree = get_cached_repo_tree(repo, repo_type="dataset", revision=folder.name)
        return folder.name, {entry.path: entry.size for entry in tree}
    except CachedRepoTreeNotFoundError:
        print(f"WARNING: {url}: HF_HUB_OFFLINE is set, and nothing says whether the copy in the cache is whole")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return folder.name, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _explained(url: str, repo: str, revision: str, action: Callable[[], _T]) -> _T:
    """What `action` gives. Raises ValueError, in one line, for what the hub refuses and for what its cache lacks."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return action()
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        remedy = f"ask for access at {page}, and set HF_TOKEN to a token that has it"
        raise Unreachable(f"{url}: the data set is gated; {remedy}") from None
    except RepositoryNotFoundError:
        remedy = "check its spelling, or set HF_TOKEN"
        raise Unreachable(f"{url}: no data set {repo} at {constants.ENDPOINT}, or a private one; {remedy}") from None
    except RevisionNotFoundError:
        found = f"the data set has no revision {revision}; name a branch, a tag or a commit of it"
        raise ValueError(f"{url}: {found}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if not constants.HF_HUB_OFFLINE:
            raise error.__cause__ or error from None
        found = f"HF_HUB_OFFLINE is set, and the cache does not hold revision {revision} of it"
        raise Unreachable(f"{url}: {found}; {_fetch(repo)}") from None


def _fetch(repo: str) -> str:
    return f"run hf download --repo-type dataset {repo} with a network"


def _resolve(
    url: str, repo: str, config: str | None, sizes: dict[str, int], fetch_card: Callable[[str], str]
) -> tuple[dict[str, list[str]], str]:
    """The paths of each split of a config, and the config's name, as `datasets` finds them."""
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / repo.partition("/")[2]
        for path in sizes:
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if path in _CARDS:
                shutil.copy(fetch_card(path), file)
            elif path.endswith(".zip"):
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr("data.jsonl", b"")  # datasets looks into it for the form of the files
            else:
                file.touch()
        folder.mkdir(exist_ok=True)
        try:
            settings = load_dataset_builder(str(folder), name=config, cache_dir=f"{place}/cache").config
        except Exception as error:  # what datasets makes of a repository is in no list
            shown = " ".join(str(error).replace(str(folder), repo).split()).partition(" Example of usage")[0]
            remedy = f"name its files, as in hf://datasets/{repo}/data/train-*.parquet"
            if "Config name is missing" in shown or "not found. Available" in shown:
                remedy = f"name one, as in hf://{repo}/CONFIG:SPLIT"
            elif "scripts are no longer supported" in shown:
                remedy = f"read the hub's own copy of it, hf://{repo}@refs/convert/parquet/CONFIG:SPLIT"
            raise ValueError(f"{url}: {shown}; {remedy}") from None
        usual = type(settings)()
        own = ("name", "version", "description", "data_dir", "data_files")
        names = [field.name for field in dataclasses.fields(settings) if field.name not in own]
        if unread := [name for name in names if getattr(settings, name) != getattr(usual, name)]:
            print(f"WARNING: {url}: settings of its config that are not read: {', '.join(unread)}")
        splits = {
            str(split): [file.removeprefix(f"{folder}/") for file in map(str, files)]
            for split, files in (settings.data_files or {}).items()
        }
        return splits, settings.name
