"""Pulling from a hub that runs on this machine: what is fetched, what is checked, and every way it can fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving

from octavo.cli.main import main
from octavo.errors import CheckpointError, ConfigError, LockedError, ResourceError
from octavo.hub import pull as door
from octavo.hub import pulled
from octavo.hub.pull import pull


def model_files(shard_bytes: int = 10**9) -> dict[str, bytes]:
    """A small model folder as it would be uploaded, with more beside it that no one wants."""
    import tempfile

    from octavo.language_model import LanguageModel
    from octavo.models.decoder import Decoder, build
    from octavo.tokenizer import Byte, train

    tokenizer = train(Byte(), ["x"])
    config = {"d_model": 16, "n_layers": 2, "vocab_size": tokenizer.vocab_size, "max_seq_len": 64,
              "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 2}}}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        lm = LanguageModel(build(Decoder.Config.model_validate(config)), tokenizer)
        if shard_bytes < 10**9:
            from octavo.hub.folder import save_model

            save_model(lm.model, Path(folder) / "m", shard_bytes=shard_bytes)
            tokenizer.save(Path(folder) / "m")
        else:
            lm.save(Path(folder) / "m")
        files = {path.name: path.read_bytes() for path in (Path(folder) / "m").iterdir()}
    unwanted = {
        "README.md": b"# tiny",
        ".gitattributes": b"*",
        "pytorch_model.bin": b"\x80\x02}.",
        "onnx/model.onnx": b"x" * 50,
        "original/consolidated.00.pth": b"y" * 50,
        "train.py": b"import os",
    }
    return files | unwanted


FILES = model_files()
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "chat_template.jinja", "model.safetensors"}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, asked by everything that HF_ENDPOINT reaches; models go to a folder of the test's own."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(door, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("OCTAVO_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(Hub(files=dict(FILES), large={"model.safetensors", "tokenizer.json"})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def one_line(capsys) -> str:
    *progress, last = capsys.readouterr().err.splitlines(keepends=True)
    assert last.startswith("error[") and not any("error" in line or "Traceback" in line for line in progress)
    return last


# ----------------------------------------------------------------------------------------- what is fetched


def test_a_model_is_pulled_and_found_by_its_name(hub, capsys, monkeypatch, tmp_path):
    assert main(["pull", "org/tiny"]) == 0
    folder = tmp_path / "models" / "org--tiny"
    assert capsys.readouterr().out.strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {*WANTED, "pull.json"}
    for name in WANTED:
        assert (folder / name).read_bytes() == FILES[name]
    record = json.loads((folder / "pull.json").read_text())
    assert (record["repository"], record["commit"], record["endpoint"]) == ("org/tiny", COMMIT, hub.url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", "org/tiny", "--temperature", "0", "--max-new-tokens", "3"]) == 0
    assert main(["generate", "org/tiny", "hello", "--temperature", "0", "--max-new-tokens", "3"]) == 0
    assert "hello" in capsys.readouterr().out
    assert main(["generate", "org/other", "hello"]) == 2
    assert "org/other does not exist. Fix: octavo pull org/other." in capsys.readouterr().err


def test_only_wanted_files_are_asked_for_and_progress_tells_of_all(hub):
    told: list[tuple[int, int]] = []
    pull("org/tiny", progress=lambda come, of: told.append((come, of)))
    fetched = {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path}
    assert fetched == WANTED
    total = sum(len(FILES[name]) for name in WANTED)
    assert told[-1] == (total, total) and {of for _, of in told} == {total}
    assert [come for come, _ in told] == sorted(come for come, _ in told)


def test_shards_are_those_of_the_index(hub):
    import octavo

    hub.files = model_files(shard_bytes=5000) | {"consolidated.safetensors": b"z" * 99}
    shards = [name for name in hub.files if name.startswith("model-")]
    assert len(shards) > 1
    folder = pull("org/tiny")
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)
    octavo.load("org/tiny")


def test_another_revision_has_a_folder_of_its_own(hub, tmp_path):
    assert pull("org/tiny@v1") == tmp_path / "models" / "org--tiny@v1"
    assert any(path.endswith("/revision/v1") for path, _ in hub.asked)
    assert pulled.find("org/tiny@v1") and not pulled.find("org/tiny")
    with pytest.raises(ConfigError, match="no revision 'v9'"):
        pull("org/tiny@v9")


def test_a_chosen_folder(hub, capsys, tmp_path):
    assert main(["pull", "org/tiny", "--to", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here" / "config.json").is_file()
    assert main(["generate", str(tmp_path / "here"), "x", "--max-new-tokens", "2"]) == 0


def test_a_second_pull_fetches_nothing_and_a_changed_file_alone(hub):
    folder = pull("org/tiny")
    hub.asked.clear()
    pull("org/tiny")
    assert not [path for path, _ in hub.asked if "/resolve/" in path]
    hub.files["generation_config.json"] = b'{"eos_token_id": [2, 4]}'
    (folder / "model.safetensors").write_bytes(b"damaged here")
    pull("org/tiny")
    fetched = sorted(path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path)
    assert fetched == ["generation_config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert (folder / "generation_config.json").read_bytes() == b'{"eos_token_id": [2, 4]}'
    assert (folder / "config.json").read_bytes() == FILES["config.json"]


def test_weights_that_a_new_version_no_longer_has_go(hub):
    folder = pull("org/tiny")
    hub.files = model_files(shard_bytes=5000)
    pull("org/tiny")
    assert not (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists()


# ---------------------------------------------------------------------------------------------- interruption


def test_dropped_connections_are_taken_up_where_they_ended(hub):
    size = len(FILES["model.safetensors"])
    order = [name for name in door.SMALL_FILES if name in FILES]
    hub.breaks = [10**9] * len(order) + [1000, 1, 0, 0, size // 2]
    folder = pull("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [asked for path, asked in hub.asked if path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=1000-", *["bytes=1001-"] * 3, f"bytes={1001 + size // 2}-"]


def test_a_server_without_ranges_is_read_from_the_start(hub):
    hub.no_range = True
    hub.breaks = [10**9] * 6 + [1000]
    folder = pull("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_after_too_many_drops_it_stops_and_the_next_pull_goes_on(hub, capsys):
    hub.breaks = [10**9] * 6 + [2000] + [0] * 50
    assert main(["pull", "org/tiny"]) == 6
    err = one_line(capsys)
    assert "cannot be reached" in err and "Kept: what has come, in " in err and ".pull." in err
    assert pulled.find("org/tiny") is None  # half a model is none
    hub.breaks = []
    hub.asked.clear()
    pull("org/tiny")
    assert [asked for path, asked in hub.asked if "/resolve/" in path] == ["bytes=2000-"]
    assert pulled.find("org/tiny")


def test_a_killed_pull_goes_on(hub, tmp_path):
    """SIGKILL in the middle of the weights; the next pull asks for the rest alone."""
    hub.breaks, hub.pause = [10**9] * 6 + [3000], threading.Event()
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", "pull", "org/tiny"], env=environment, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "models" / "org--tiny" / ".pull"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 3000 for path in part.glob("model.safetensors.*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(LockedError, match="another process pulls"):
        pull("org/tiny")
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.pause.set()
    assert all(path.startswith(("/api/models/org/tiny", "/org/tiny/resolve/")) for path, _ in hub.asked), hub.asked
    hub.breaks.clear()
    hub.asked.clear()
    folder = pull("org/tiny")
    assert [asked for path, asked in hub.asked if "/resolve/" in path] == ["bytes=3000-"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_parts_of_another_version_are_not_joined(hub):
    hub.breaks = [10**9] * 6 + [2000] + [0] * 9
    with pytest.raises(ResourceError):
        pull("org/tiny")
    hub.breaks = []
    hub.files["model.safetensors"] = bytes(reversed(FILES["model.safetensors"]))
    folder = pull("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


# ------------------------------------------------------------------------------------------ what is checked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"], ids=["sha256", "git"])
@pytest.mark.parametrize("damage", ["flip", "short", "long"])
def test_content_that_is_not_what_the_hub_states(hub, capsys, name, damage):
    content = FILES[name]
    flipped = content[:20] + bytes([content[20] ^ 1]) + content[21:]
    hub.wrong[name] = {"flip": flipped, "short": content[:-9], "long": content + b"more"}[damage]
    code = main(["pull", "org/tiny"])
    err = one_line(capsys)
    if damage == "short":  # a whole answer of too few bytes: the rest is asked for, and does not come
        assert code in (4, 6)
    else:
        assert code == 4 and name in err
        assert ("longer than" if damage == "long" else "differs") in err
    assert pulled.find("org/tiny") is None
    hub.wrong.clear()
    folder = pull("org/tiny")
    assert (folder / name).read_bytes() == content


def test_names_that_lead_out_of_the_folder_are_not_files_of_a_model(hub, tmp_path):
    hub.files["../../outside.safetensors"] = b"x"
    hub.files["..\\config.json"] = b"{}"
    folder = pull("org/tiny")
    assert {path.name for path in folder.iterdir()} == {*WANTED, "pull.json"}
    index = {"metadata": {}, "weight_map": {"a": "../../outside.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match="damaged"):
        pull("org/tiny")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.safetensors": None}, "holds its weights as pickles only (pytorch_model.bin), which can run code"),
        ({"model.safetensors": None, "pytorch_model.bin": None, "tiny.gguf": b"GGUF"}, "only GGUF: tiny.gguf"),
        ({"model.safetensors": None, "pytorch_model.bin": None}, "holds no model.safetensors"),
        ({"config.json": None}, "has no config.json"),
    ],
    ids=["pickles", "gguf", "nothing", "no config"],
)
def test_repositories_without_a_model_in_safetensors(hub, capsys, change, said):
    hub.files = {name: content for name, content in (hub.files | change).items() if content is not None}
    assert main(["pull", "org/tiny"]) == 2
    assert said in one_line(capsys)


def test_a_disk_that_is_too_small(hub, capsys, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["pull", "org/tiny"]) == 6
    assert "--to DIR" in one_line(capsys)
    assert not [path for path, _ in hub.asked if path.endswith("model.safetensors")]


# --------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ((404, "RepoNotFound"), 2, "there is no org/tiny at"),
        ((401, "RepoNotFound"), 2, "there is no org/tiny at"),
        ((401, ""), 2, "set HF_TOKEN"),
        ((403, "GatedRepo"), 2, "org/tiny is gated"),
        ((401, "GatedRepo"), 2, "accept the terms at"),
        ((403, ""), 2, "is gated"),
        ((500, ""), 6, "answers 500"),
        ((429, ""), 6, "answers 429"),
    ],
)
def test_answers_of_a_hub_that_gives_nothing(hub, capsys, monkeypatch, answer, code, said):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.answers["/api/models/"] = answer
    assert main(["pull", "org/tiny"]) == code
    assert said in one_line(capsys)


@pytest.mark.parametrize("page", [b"<html>hello</html>", b"[]", b'{"id": "x", "siblings": [{"rfilename": "a"}]}'])
def test_a_server_that_is_no_hub(hub, capsys, page):
    hub.page = page
    assert main(["pull", "org/tiny"]) in (4, 6)
    assert hub.url in one_line(capsys)


def test_a_gate_before_the_files_alone(hub, capsys):
    hub.answers["/resolve/"] = (403, "GatedRepo")
    assert main(["pull", "org/tiny"]) == 2
    assert "org/tiny is gated" in one_line(capsys)


def test_a_typo_names_the_nearest(hub, capsys):
    assert main(["pull", "org/tinny"]) == 2
    assert "there is no org/tinny at" in (err := one_line(capsys)) and "did you mean `org/tiny`?" in err


def test_no_network(hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert main(["pull", "org/tiny"]) == 6
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in one_line(capsys)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", "org/tiny"]) == 2
    assert "HF_HUB_OFFLINE is set" in one_line(capsys)


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "../x", "a/..", "/etc/passwd", "a/b@../c", "a b/c", "", "a/.b", "-a/b"]
)
def test_names_that_are_none(hub, capsys, name):
    assert main(["pull", "--", name]) == 2
    assert "no repository's name" in one_line(capsys)
    assert pulled.find(name) is None and not hub.asked


def test_where_models_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("OCTAVO_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pulled.folder_of("org/Name-1.5B@v1.0") == tmp_path / "octavo" / "models" / "org--Name-1.5B@v1.0"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pulled.models_folder() == tmp_path / ".cache" / "octavo" / "models"
