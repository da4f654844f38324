"""Pickles read in a child: what they may not do; older folders; and the folder that convert makes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from nano_checkpoints import gpt_weights, read_here, save_gpt, save_letters

import octavo
from octavo.cli.main import main
from octavo.errors import CheckpointError
from octavo.hub import pickled


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(pickled, "_run_child", read_here)


# ----------------------------------------------------------------------- older folders, and what else pickles are


def test_a_folder_with_pytorch_model_bin(tmp_path, capsys):
    """Through the real child: the command that the refusal names works."""
    import transformers

    shape = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "tie_word_embeddings": True}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).eval()
    source = tmp_path / "old"
    model.config.save_pretrained(source)
    from octavo.tokenizer import Byte, train

    train(Byte(), ["x"]).save(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    for given in (source, source / "pytorch_model.bin"):
        assert main(["generate", str(given), "x"]) == 4
        err = capsys.readouterr().err
        assert "is a pickle, and reading one can run code" in err
        assert f"octavo convert --from-pickle {given} TARGET" in err and err.count("\n") == 1
    assert main(["convert", str(source), str(tmp_path / "new")]) == 4
    assert "--from-pickle" in capsys.readouterr().err
    assert main(["convert", "--from-pickle", str(source), str(tmp_path / "new")]) == 0
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(octavo.load(tmp_path / "new").logits([5, 6, 7]), wanted, rtol=0, atol=1e-5)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, capsys):
    marker = tmp_path / "marker"
    torch.save({"model": {"w": Evil(marker)}}, tmp_path / "evil.pt")
    for command in (["generate", str(tmp_path / "evil.pt"), "x"], ["chat", str(tmp_path / "evil.pt")]):
        assert main(command) == 4
        assert f"Fix: octavo convert --from-pickle {tmp_path / 'evil.pt'} TARGET." in capsys.readouterr().err
    assert main(["convert", "--from-pickle", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 4
    err = capsys.readouterr().err
    assert "it holds more than weights: posix.system" in err and err.count("\n") == 1
    assert not marker.exists() and not (tmp_path / "out").exists()


def nested(depth: int, width: int) -> bytes:
    """A dictionary of lists that each hold the one before ``width`` times: small here, vast when written out."""
    parts = [b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00aq\x00s"]
    for i in range(1, depth):
        parts.append(b"X\x01\x00\x00\x00" + bytes([97 + i]) + b"]q" + bytes([i]))
        parts.append(b"(" + (b"h" + bytes([i - 1])) * width + b"es")
    return b"".join(parts) + b"."


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def test_archives_that_cannot_be_honest(tmp_path, in_process):
    path, plain = tmp_path / "x.pt", {"a/version": b"3", "a/byteorder": b"little"}
    torch.save({"m": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(CheckpointError, match="its tensors are larger than the file"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": nested(14, 10), **plain})
    with pytest.raises(CheckpointError, match="holds more than 1,048,576 values"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(10**7), **plain}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is not an archive that torch"):
        pickled.unpickle(path)
    archive(path, {"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}.", **plain})
    with pytest.raises(CheckpointError, match="is not an archive"):
        pickled.unpickle(path)
    torch.save({"m": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:100], b"", b"\x80\x02}."):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match="is damaged, or older than torch"):
            pickled.unpickle(path)
    torch.save({"m": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="weights of no known kind"):
        pickled.read(path)


@pytest.mark.parametrize(("limit", "value"), [("BASE_MEMORY_BYTES", 64 << 20), ("BASE_SECONDS", 1)])
def test_the_child_may_not_grow_or_run_on(tmp_path, monkeypatch, limit, value):
    torch.save({"m": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr(pickled, limit, value)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        pickled.unpickle(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------------- the target


def test_convert_overwrites_nothing_and_leaves_nothing_half(tmp_path, in_process, capsys, monkeypatch):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(True))
    save_letters(tmp_path)
    out = tmp_path / "made" / "folder"
    command = ["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(out)]
    from octavo.language_model import LanguageModel

    monkeypatch.chdir(tmp_path)  # where the traceback of a bug is left
    with monkeypatch.context() as broken:
        broken.setattr(LanguageModel, "save", lambda self, folder, **_: (folder.mkdir(), 1 / 0))
        assert main(command) == 1
    capsys.readouterr()
    assert not list((tmp_path / "made").iterdir())
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 2
    assert f"{out} exists, and nothing is overwritten" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


def test_convert_between_folders_changes_dtype_and_family(tmp_path, in_process, capsys):
    save_gpt(tmp_path / "ckpt.pt", gpt_weights(True))
    save_letters(tmp_path)
    first, second = tmp_path / "one", tmp_path / "two"
    assert main(["convert", "--from-pickle", str(tmp_path / "ckpt.pt"), str(first)]) == 0
    assert main(["convert", str(first), str(second), "--dtype", "bfloat16", "--family", "octavo"]) == 0
    assert "two: octavo, " in capsys.readouterr().out
    lm = octavo.load(second, "saved")
    assert lm.model.embed.weight.dtype == torch.bfloat16
    assert main(["convert", str(first), str(tmp_path / "three"), "--family", "qwen3"]) == 2
    assert "cannot be written as 'qwen3'" in capsys.readouterr().err
    assert main(["convert", str(first), str(tmp_path / "three"), "--dtype", "float99"]) == 2
    assert main(["convert", "--from-pickle", str(first / "config.json"), str(tmp_path / "three")]) == 4
    assert main(["convert", "--from-pickle", str(tmp_path / "nothing.pt"), str(tmp_path / "three")]) == 2
    assert not (tmp_path / "three").exists()
