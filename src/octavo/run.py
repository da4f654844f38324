"""A run is a folder: what was asked for, on what machine, how far it came, and the result.

One process at a time may write to it (``RunFolder.lock``); evaluation, chat and the server only read
and never wait. Nothing here imports torch until the environment is recorded.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import fnmatch
import hashlib
import json
import os
import platform
import secrets
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError, ConfigError, ConfigErrors, LockedError, ResourceError
from octavo.files import make_folder, write_atomic, write_json

STAGES = ("data", "tokenizer", "count", "pretrain", "tune", "eval", "report")

# Training settings that only decide how the work is watched, kept, guarded and cut to fit the memory.
FREE_TRAIN_KEYS = (
    "log_every",
    "valid_every",
    "valid_batches",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "sample_temperature",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
    "on_nan",
    "on_spike",
    "spike_sigmas",
    "max_skips",
    "micro_batch_rows",
    "activation_checkpointing",
)

# Keys whose difference is only noted: they change neither the model's shape nor the order of its data. A new rate
# or decay acts from here on; what is finished stays.
FREE_KEYS = (
    "name",
    "eval",
    "eval.*",
    *(
        f"{section}.{key}"
        for section in ("train", "tune")
        for key in (*FREE_TRAIN_KEYS, "sample_prompts.*", "optimizer.lr", "optimizer.weight_decay")
    ),
)

_held: set[int] = set()  # descriptors of locks this process owns


class RunFolder:
    """The paths and records of one run; the folder is made when it is locked.

    Attributes:
        path: the folder.
        id: this process's name for its unfinished files, unlike that of any other process.
        killed: the owner before, if it had no time to give the folder up; known once the lock is held.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.killed = ""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a run folder", fix="give another name to the run")

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def stages_path(self) -> Path:
        return self.path / "stages.json"

    @property
    def log_path(self) -> Path:
        return self.path / "log"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def base_path(self) -> Path:
        return self.path / "base"

    @property
    def tuning_data_path(self) -> Path:
        """What tuning held out, for the scores."""
        return self.path / "tune" / "data"

    def metrics_path(self, stage: str) -> Path:
        return self.path / stage / "metrics.jsonl"

    def checkpoints_path(self, stage: str) -> Path:
        return self.path / stage / "checkpoints"

    # ------------------------------------------------------------------------------------------ lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[RunFolder]:
        """Own the folder while inside; the kernel gives it up for a process that is killed.

        Raises:
            LockedError: another process owns it.
            ResourceError: it cannot be written.
        """
        import fcntl  # not on native Windows, which is refused earlier

        try:
            make_folder(self.path)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ResourceError(
                f"{self.path} cannot be written ({error.strerror})", fix="choose another folder"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise LockedError(
                f"{self.path} is in use by {owner}",
                fix="wait for it, stop it with Ctrl-C, or give this run another folder",
                kept="nothing in the folder was touched",
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise LockedError(
                f"{self.path} is on a file system that cannot lock files ({error.strerror})",
                fix="put the run on a local disk",
            ) from None
        _held.add(descriptor)
        try:
            self.killed = _named(descriptor)
            started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.encode() + b"\n", 0)
            yield self
        finally:
            if descriptor in _held:  # not in a forked child that unwinds: the number may be another file there
                _held.discard(descriptor)
                os.ftruncate(descriptor, 0)
                os.close(descriptor)

    # ---------------------------------------------------------------------------------------- recipe

    def read_recipe(self) -> dict[str, Any] | None:
        """The resolved recipe this run was started with, None in a new folder."""
        import yaml

        try:
            recipe = yaml.safe_load(self.recipe_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            recipe = error
        if not isinstance(recipe, dict):
            raise ConfigError(
                f"{self.recipe_path} cannot be read as a recipe", fix="restore it from a copy, or use a new folder"
            )
        return recipe

    def write_recipe(
        self, resolved: Mapping[str, Any], *, allow: Sequence[str] = (), free: Sequence[str] = FREE_KEYS
    ) -> list[str]:
        """Record the resolved recipe; in a folder that has one, compare first.

        Args:
            resolved: plain JSON values.
            allow: keys (or the sections above them) that may differ although they change the run.
            free: patterns of keys whose difference is only noted.

        Returns:
            One line, ``key: old -> new``, for each difference that was accepted.

        Raises:
            ConfigErrors: one error for each other difference.
        """
        import yaml

        resolved = json.loads(json.dumps(resolved))
        existing = self.read_recipe()
        accepted, refused = [], []
        for key, line in _differences(existing, resolved) if existing is not None else []:
            allowed = any(key == name or key.startswith(f"{name}.") for name in allow)
            if allowed or any(fnmatch.fnmatchcase(key, pattern) for pattern in free):
                accepted.append(line)
            else:
                refused.append(
                    ConfigError(
                        f"{line} changes the model or the order of its data, and {self.path} has begun without it",
                        fix=f"add --allow-change {key}, or use a new folder",
                        kept="the run is as it was",
                    )
                )
        if refused:
            raise ConfigErrors(refused)
        if existing is None or accepted:
            write_atomic(self.recipe_path, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        return accepted

    # ----------------------------------------------------------------------------------- environment

    def write_environment(self, *, threads: int | None = None) -> list[str]:
        """Record the machine and the versions; one warning if the last start had others that matter.

        Args:
            threads: torch's compute threads, if they will differ from the current setting.
        """
        changed = self.environment_changes(threads)
        current = environment(threads)
        if self._environment() != current:
            write_json(self.environment_path, current)
        return [f"warning[ENVIRONMENT]: bit-identical resume not promised ({', '.join(changed)})."] if changed else []

    def environment_changes(self, threads: int | None = None) -> list[str]:
        """What decides the last bits of a result and is not as at the last start, as ``threads 2 -> 1``."""
        before, current = self._environment(), environment(threads)
        keys = ("torch", "threads", "cpu", "cpu_capability")
        return [
            f"{key} {before[key]} -> {current[key]}" for key in keys if before.get(key, current[key]) != current[key]
        ]

    def _environment(self) -> dict[str, Any]:
        try:
            return json.loads(self.environment_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    # ---------------------------------------------------------------------------------------- stages

    def stages(self) -> dict[str, dict[str, Any]]:
        """What is finished: stage name -> its entry with ``fingerprint``, ``finished`` and facts."""
        try:
            stages = json.loads(self.stages_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            stages = None
        if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
            raise CheckpointError(
                f"{self.stages_path} is damaged", fix="delete it: finished stages are then gone through again"
            )
        return stages

    def is_finished(self, stage: str, stage_fingerprint: str) -> bool:
        """Whether ``stage`` was finished from these very inputs."""
        return self.stages().get(stage, {}).get("fingerprint") == stage_fingerprint

    def finish(self, stage: str, stage_fingerprint: str, **facts: Any) -> None:
        """Record that the files of ``stage`` are complete (they must be on disk already).

        Entries of later stages made from other inputs stay: their fingerprints contain this one's, so
        they no longer match.
        """
        if stage not in STAGES:
            raise ValueError(f"{stage!r} is not one of the stages {', '.join(STAGES)}")
        finished = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"fingerprint": stage_fingerprint, "finished": finished, **facts}
        write_json(self.stages_path, {**self.stages(), stage: entry})

    # ------------------------------------------------------------------------------------------- log

    def log(self, text: str) -> None:
        """Append to ``log``, with the time."""
        moment = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with contextlib.suppress(OSError), open(self.log_path, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{moment} {text.rstrip()}\n")

    def log_error(self, error: BaseException) -> None:
        """Append the full traceback of ``error`` to ``log``."""
        self.log("".join(traceback.format_exception(error)))


def fingerprint(*parts: Any) -> str:
    """A hash of JSON-able values; include the fingerprint of the stage before, so that changes carry on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions and machine, as far as they decide speed or the last bits of a result."""
    import torch

    from octavo import __version__

    return {
        "octavo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


# ---------------------------------------------------------------------------------------- find a model


def find_model(path: str | os.PathLike[str], *, files: bool = False) -> Path:
    """The model folder meant by ``path``: itself, the final (else the pretrained) one of a run, or a pulled one.

    Args:
        files: whether one of another program's files that hold a whole model will do (`octavo.hub.formats`).

    Raises:
        ConfigError: it is missing, a file, empty, a web address, or has no model in it.
        CheckpointError: it is a pickle.
    """
    from octavo.hub import formats, pulled

    text, folder = os.fspath(path), Path(path)
    if "://" in text:
        raise ConfigError(f"{text} is a web address", fix="octavo pull ORG/NAME, or download it and give the folder")
    if not folder.exists():
        found = pulled.find(text)
        if found is None:
            remote = pulled.is_name(text) and not folder.parent.is_dir()
            raise ConfigError(f"{text} does not exist", fix=f"octavo pull {text}" if remote else _names_like(folder))
        folder = found
    if folder.is_file() and (kind := formats.recognise(folder)) is not None:
        return _model_file(folder, kind, files)
    if folder.is_file():
        inside = (folder.parent / "config.json").is_file()
        fix = f"give its folder: {folder.parent}" if inside else _names_like(folder)
        raise ConfigError(f"{text} is a file, not a run or model folder", fix=fix)
    for candidate in (folder, folder / "model", folder / "base"):
        if (candidate / "config.json").is_file():
            return candidate
    if (file := formats.locate(folder)) is not None:
        return _model_file(file, str(formats.recognise(file)), files)
    if not any(folder.iterdir()):
        raise ConfigError(f"{text} is an empty folder", fix=_names_like(folder))
    if (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{text} is a run that has no model yet", fix="run its recipe again: it goes on to the end")
    raise ConfigError(f"{text} has no config.json, so it is no model or run folder", fix=_names_like(folder))


def _model_file(file: Path, kind: str, wanted: bool) -> Path:
    """A file that holds a whole model, where one is ``wanted`` and reading it cannot run code."""
    if kind == "pickle":
        raise CheckpointError(
            f"{file} is a pickle, and reading one can run code", fix=f"octavo convert --from-pickle {file} TARGET"
        )
    if not wanted:
        raise ConfigError(f"{file} is a file, and this needs a model folder", fix=f"octavo convert {file} TARGET")
    return file


def _names_like(path: Path) -> str:
    """The three models or runs nearby whose names are nearest."""
    found: dict[str, str] = {}
    for place in (path.parent, Path("runs")):
        with contextlib.suppress(OSError):
            for entry in place.iterdir():
                if entry != path and any((entry / name).is_file() for name in ("config.json", "recipe.yaml")):
                    found.setdefault(entry.name, str(entry))
    nearest = difflib.get_close_matches(path.name, found, n=3, cutoff=0.3) or sorted(found)[:3]
    if not nearest:
        return "give a run folder or a folder with config.json"
    return "did you mean " + ", ".join(f"`{found[name]}`" for name in nearest) + "?"


# ----------------------------------------------------------------------------------------------- parts


def _forget_locks() -> None:
    """A forked worker shares its parent's lock and would keep it after the parent is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _owner(descriptor: int) -> str:
    """Who holds the lock; the owner writes its name just after it has the lock, so wait a moment for it."""
    for _ in range(20):
        if owner := _named(descriptor):
            return owner
        time.sleep(0.01)
    return "another process"


def _named(descriptor: int) -> str:
    """Whose name stands in the lock file."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['started']}"
    return ""


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and ``key: old -> new`` of every leaf that differs."""
    if isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in (*old, *new)):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            below = f"{key}.{name}" if key else str(name)
            if name not in new:
                yield below, f"{below}: {_short(old[name])} -> (absent)"
            elif name not in old:  # nothing said before, nothing now: a key that a later version knows
                if new[name] is not None:
                    yield below, f"{below}: (absent) -> {_short(new[name])}"
            else:
                yield from _differences(old[name], new[name], below)
    elif old != new or isinstance(old, bool) is not isinstance(new, bool):
        yield key, f"{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
