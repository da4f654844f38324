"""Models from a hub, or from a mirror of it: what safetensors models consist of, and nothing else.

Every file is fetched aside, compared with the size and hash that the hub states, and only when all are there do they
take their places, config.json last: a folder with a config.json is whole. A pull that was cut off goes on where it
was, within a file too. HF_ENDPOINT names a mirror, HF_TOKEN a token for what is not public.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError, ConfigError, LockedError, ResourceError
from octavo.files import fsync_path, make_folder, sha256_file, write_json
from octavo.hub import pulled
from octavo.hub.formats import INDEX, PICKLED, WEIGHTS

HUB = "https://huggingface.co"
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
MAX_SMALL_BYTES = 256 << 20
ASIDE, RECORD = ".pull", "pull.json"
RETRIES, RETRY_SECONDS, TIMEOUT_SECONDS = 5, 1.0, 30.0
CHUNK_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""Called with bytes that have come (of all wanted, what an earlier pull fetched included) and bytes in all."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository as the hub describes it; ``sha256`` for large ones, ``blob`` (git's) for all others."""

    name: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    def differs(self, path: Path) -> str:
        """How the file at ``path`` is not this one, empty if it is."""
        if (size := path.stat().st_size) != self.size:
            return f"it has {size:,} bytes instead of {self.size:,}"
        if self.sha256 is not None and sha256_file(path) != self.sha256:
            return "its sha256 differs"
        if self.sha256 is None and self.blob is not None:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            with open(path, "rb") as file:
                while block := file.read(CHUNK_BYTES):
                    digest.update(block)
            if digest.hexdigest() != self.blob:
                return "its hash differs"
        return ""

    @property
    def part(self) -> str:
        """The name while it is fetched: of this content alone, so that no two versions are ever joined."""
        return f"{self.name.replace('/', '--')}.{(self.sha256 or self.blob or str(self.size))[:16]}"


def pull(name: str, target: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch a repository ``org/name`` or ``org/name@revision``; what is there already and right is not fetched again.

    Args:
        target: the folder; by default one in ``pulled.models_folder()``, where the name is found again.
        progress: told about every piece that comes.

    Returns:
        The model folder.

    Raises:
        ConfigError: no such repository or revision, no access, or no model in safetensors in it.
        CheckpointError: a file is not what the hub says it is.
        ResourceError: the hub cannot be reached, or the disk is too small.
        LockedError: another process pulls into the same folder.
    """
    if not pulled.is_name(name):
        raise ConfigError(f"{name!r} is no repository's name", fix="write org/name or org/name@revision")
    repository, revision = pulled.split(name)
    target = target or pulled.folder_of(name)
    hub = _Hub(repository, revision, target)
    commit, listing = hub.listing()
    aside = target / ASIDE
    make_folder(aside)
    with _locked(aside / "lock", target):
        wanted = _choose(hub, listing, aside)
        total, done = sum(file.size for file in wanted), 0
        missing = []
        for file in wanted:
            if (target / file.name).is_file() and not file.differs(target / file.name):
                done += file.size
            else:
                missing.append(file)
        _enough_disk(missing, aside)
        tell = progress or (lambda come, of: None)
        for file in missing:
            already = done
            hub.fetch(file, aside, lambda come, before=already: tell(before + come, total))
            done += file.size
        tell(done, total)
        _take_places(target, aside, missing, wanted)
        record = {"repository": repository, "revision": revision, "commit": commit, "endpoint": hub.endpoint}
        write_json(target / RECORD, {**record, "files": {file.name: file.sha256 or file.blob for file in wanted}})
    shutil.rmtree(aside, ignore_errors=True)
    return target


class _Hub:
    """One repository at one revision."""

    def __init__(self, repository: str, revision: str | None, target: Path):
        self.repository, self.revision, self.target = repository, revision, target
        # Read when the library is imported: nothing but the model is asked for, and nobody is told who asks.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self.endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        self.commit = revision or "main"

    def listing(self) -> tuple[str, list[RemoteFile]]:
        """The commit, and the files at the top of the repository and what else a model may need."""
        from huggingface_hub import HfApi

        with self._explained():
            api = HfApi(endpoint=self.endpoint)
            info = api.model_info(self.repository, revision=self.revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        self.commit = info.sha or self.commit
        files = []
        for file in info.siblings or ():
            strange = "/" in file.rfilename or "\\" in file.rfilename or file.rfilename.startswith(".")
            if strange and file.rfilename not in SMALL_FILES:
                continue
            size = file.lfs.size if file.lfs else file.size
            if type(size) is not int or size < 0:
                raise CheckpointError(f"{self.endpoint} states no size of {file.rfilename}", fix="use another mirror")
            files.append(RemoteFile(file.rfilename, size, file.lfs.sha256 if file.lfs else None, file.blob_id))
        return self.commit, files

    def fetch(self, file: RemoteFile, aside: Path, come: Callable[[int], None]) -> Path:
        """Fetch ``file`` into ``aside``, from where an earlier attempt ended; the path when it is whole."""
        from httpx2 import HTTPError
        from huggingface_hub.errors import HfHubHTTPError

        path, tries = aside / file.part, 0
        while True:
            have = path.stat().st_size if path.is_file() else 0
            come(min(have, file.size))
            try:
                if have < file.size or not path.is_file():
                    with self._explained(HTTPError):
                        self._stream(file, path, come)
            except HfHubHTTPError as error:
                raise self._refusal(error) from None
            except HTTPError as error:  # the connection, not an answer
                tries = 0 if path.is_file() and path.stat().st_size > have else tries + 1
                if tries >= RETRIES:
                    raise self._refusal(error) from None
                time.sleep(RETRY_SECONDS * tries)
                continue
            if wrong := file.differs(path):
                path.unlink()
                raise CheckpointError(
                    f"{file.name} of {self.repository} came damaged: {wrong}", fix="run the same command again"
                )
            return path

    def _stream(self, file: RemoteFile, path: Path, come: Callable[[int], None]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repository, file.name, revision=self.commit, endpoint=self.endpoint)
        with open(path, "ab", buffering=0) as out:  # what has come is on record, whatever ends this process
            have = out.tell()
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            headers |= {"Range": f"bytes={have}-"} if have else {}
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
                if response.status_code >= 400:
                    response.read()
                hf_raise_for_status(response)
                if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    out.truncate(0)  # the server began anew
                    have = 0
                for block in response.iter_bytes():
                    have += len(block)
                    if have > file.size:
                        out.close()
                        path.unlink()
                        raise CheckpointError(
                            f"{file.name} of {self.repository} is longer than the {file.size:,} bytes the hub states",
                            fix="run the same command again",
                        )
                    out.write(block)
                    come(have)
            os.fsync(out.fileno())

    @contextlib.contextmanager
    def _explained(self, *passed: type[BaseException]) -> Iterator[None]:
        """Errors of the hub's library in our form, except those of the types ``passed``."""
        from httpx2 import HTTPError
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            yield
        except passed:
            raise
        except OfflineModeIsEnabled:
            raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pulled", fix="unset HF_HUB_OFFLINE") from None
        except HTTPError as error:
            raise self._refusal(error) from None
        except (ValueError, KeyError, TypeError, AttributeError):  # a page of some other server
            what = f"{self.endpoint} does not answer as a hub does"
            raise ResourceError(what, fix="check HF_ENDPOINT") from None

    def _refusal(self, error: Exception) -> Exception:
        """The one line for what a hub answers, or for none."""
        from huggingface_hub import errors

        name, page = self.repository, f"{self.endpoint}/{self.repository}"
        kept = f"what has come, in {self.target / ASIDE}" if (self.target / ASIDE).is_dir() else ""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError) or status == 403:
            fix = f"accept the terms at {page} and set HF_TOKEN"
            return ConfigError(f"{name} is gated, and this account has no access", fix=fix)
        if isinstance(error, errors.RevisionNotFoundError):
            return ConfigError(f"{name} has no revision {self.revision!r}", fix=f"see {page}/tree/main")
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            near = self._near()
            fix = f"did you mean `{near}`?" if near else "check the spelling; for a private one set HF_TOKEN"
            return ConfigError(f"there is no {name} at {self.endpoint}, or it is private", fix=fix)
        what = f"{self.endpoint} cannot be reached"
        if status is not None:
            what = f"{self.endpoint} answers {status}"
        elif text := " ".join(str(error).split()):
            what += f" ({type(error).__name__}: {text[:120]})"
        return ResourceError(what, fix="check the connection (HF_ENDPOINT names a mirror) and run it again", kept=kept)

    def _near(self) -> str:
        """A repository of the same owner with a similar name, empty if there is none or nobody answers."""
        from huggingface_hub import HfApi

        owner = self.repository.partition("/")[0]
        try:
            names = [model.id for model in HfApi(endpoint=self.endpoint).list_models(author=owner, limit=200)]
        except Exception:  # only a hint
            return ""
        others = [name for name in names if name != self.repository]
        return next(iter(difflib.get_close_matches(self.repository, others, n=1)), "")


def _choose(hub: _Hub, listing: Sequence[RemoteFile], aside: Path) -> list[RemoteFile]:
    """The files that make up the model; the small ones first.

    Raises:
        ConfigError: there is no model in safetensors.
    """
    files = {file.name: file for file in listing}
    if INDEX in files:
        if files[INDEX].size > MAX_SMALL_BYTES:
            raise CheckpointError(f"{INDEX} of {hub.repository} is too large", fix="do not use it")
        try:
            content = json.loads(hub.fetch(files[INDEX], aside, lambda come: None).read_text(encoding="utf-8"))
            shards = sorted(set(content["weight_map"].values()))
            weights = [files[INDEX], *(files[shard] for shard in shards)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{INDEX} of {hub.repository} is damaged: {error!r}", fix="do not use it") from None
    elif WEIGHTS in files:
        weights = [files[WEIGHTS]]
    else:
        raise _no_safetensors(hub, list(files))
    if "config.json" not in files:
        raise ConfigError(f"{hub.repository} has no config.json, so it is no model folder", fix="pull another one")
    small = [files[name] for name in SMALL_FILES if name in files and files[name].size <= MAX_SMALL_BYTES]
    return [*small, *weights]


def _no_safetensors(hub: _Hub, names: Sequence[str]) -> ConfigError:
    pickles = [name for name in names if name.endswith(PICKLED)]
    if ggufs := fnmatch.filter(names, "*.gguf"):
        what = f"{hub.repository} has no {WEIGHTS}, only GGUF: {', '.join(ggufs[:3])}"
        page = f"{hub.endpoint}/{hub.repository}/resolve/main/{ggufs[0]}"
        return ConfigError(what, fix=f"download {page} and give octavo that file")
    if pickles:
        what = f"{hub.repository} holds its weights as pickles only ({', '.join(pickles[:3])}), which can run code"
        return ConfigError(what, fix="pull a repository with safetensors")
    return ConfigError(f"{hub.repository} holds no {WEIGHTS}", fix="pull a repository with safetensors")


def _enough_disk(missing: Sequence[RemoteFile], aside: Path) -> None:
    parts = [aside / file.part for file in missing]
    needed = sum(file.size for file in missing) - sum(path.stat().st_size for path in parts if path.is_file())
    free = shutil.disk_usage(aside).free
    if needed > free:
        raise ResourceError(
            f"{needed / 1e9:.1f} GB are still to come, {free / 1e9:.1f} GB are free at {aside.parent}",
            fix="free some space, or choose another place with --to DIR",
        )


def _take_places(target: Path, aside: Path, missing: Sequence[RemoteFile], wanted: Sequence[RemoteFile]) -> None:
    """Rename what has come; while a model changes, it has no config.json."""
    if not missing:
        return
    config = next(file for file in wanted if file.name == "config.json")
    if config not in missing:  # it has to go and come back, as the others change under it
        (target / config.name).rename(aside / config.part)
    (target / config.name).unlink(missing_ok=True)
    kept = {file.name for file in wanted}
    for old in target.iterdir():  # weights and shards of another version would not fit
        if old.name not in kept and (old.suffix == ".safetensors" or old.name == INDEX):
            old.unlink()
    for file in [*(file for file in missing if file != config), config]:
        if file == config:
            fsync_path(target)
        make_folder((target / file.name).parent)
        (aside / file.part).rename(target / file.name)
    fsync_path(target)


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[Any]:
    import fcntl  # not on native Windows, which is refused earlier

    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(f"another process pulls into {target}", fix="wait for it") from None
        yield file
