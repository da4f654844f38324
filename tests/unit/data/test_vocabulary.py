"""A run's tokenizer is the same wherever it is trained, and a stop is heard while it is."""

import signal
import time
from pathlib import Path

import pytest
from recipes import write_texts

from octavo.data import prepare, vocabulary
from octavo.data.workers import elsewhere
from octavo.errors import ResourceError, StopRequested
from octavo.tokenizer import ByteBPE


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    config = prepare.DataConfig.model_validate({"sources": [str(write_texts(folder / "texts.jsonl"))]})
    prepare.clean_documents(config, folder / "data", workers=1)
    return folder / "data"


def test_in_a_process_of_its_own_the_same_tokenizer_comes_out(data, tmp_path, monkeypatch):
    config, asked = ByteBPE(vocab_size=320), []
    here = vocabulary.learn(config, data, tmp_path / "here", lambda: asked.append(1))
    assert len(asked) >= 50  # for every text
    monkeypatch.setattr(vocabulary, "SOON_BYTES", 0)
    there = vocabulary.learn(config, data, tmp_path / "there", lambda: None)
    assert here.vocab_size == there.vocab_size > 300
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("here", "there")]
    assert files[0] == files[1]


@pytest.mark.parametrize("soon", [0, 1 << 30])
def test_what_is_asked_meanwhile_ends_it(data, tmp_path, monkeypatch, soon):
    monkeypatch.setattr(vocabulary, "SOON_BYTES", soon)

    def check() -> None:
        raise StopRequested("SIGTERM")

    with pytest.raises(StopRequested):
        vocabulary.learn(ByteBPE(vocab_size=320), data, tmp_path / "tokenizer", check)
    assert not (tmp_path / "tokenizer").exists()


def test_a_long_call_elsewhere_is_ended_when_asked():
    began, asked = time.monotonic(), []

    def check() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise StopRequested("enough")

    with pytest.raises(StopRequested):
        elsewhere(time.sleep, 60, check=check)
    assert time.monotonic() - began < 30
    assert elsewhere(divmod, 17, 5, check=lambda: None) == (3, 2)


def test_a_process_that_is_killed_is_likely_out_of_memory():
    where = r"killed by signal 9, likely out of memory \(peak [\d.]+ of [\d.]+ GiB\)"
    with pytest.raises(ResourceError, match=where) as caught:
        elsewhere(signal.raise_signal, signal.SIGKILL, check=lambda: None)
    assert caught.value.exit_code == 6
