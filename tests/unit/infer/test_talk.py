"""A model on disk, talked to through every door: octavo.load, the verbs, and a served endpoint."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
import transformers
from scripted import Scripted

import octavo
from octavo.cli.chat import converse
from octavo.cli.main import main
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import ByteBPE, Tokenizer, train

TEXT = ["To be, or not to be, that is the question.", "八开本是一种书。", "def f(x):\n    return x + 1\n"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(ByteBPE(vocab_size=320), TEXT)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of our own making."""
    attention = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}
    config = Decoder.Config(
        d_model=32,
        n_layers=2,
        max_seq_len=96,
        vocab_size=tokenizer.vocab_size,
        blocks={"block": {"mixer": attention}},
    )
    path = tmp_path_factory.mktemp("models") / "tiny-model"
    path.mkdir(exist_ok=True)
    LanguageModel(build(config, seed=3), tokenizer).save(path)
    return path


def reference(kind: str, vocab_size: int) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    same = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5, **same)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    config = transformers.LlamaConfig(**sizes, **heads, **same)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.rows("I1", "I3")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_text_is_that_of_transformers(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = reference(kind, tokenizer.vocab_size)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    lm = octavo.load(tmp_path, dtype="float32")
    prompts = [tokenizer.encode(text) for text in ("To be", "that is the question. To be", "def")]
    ours = generate(lm.model, lm.tokenizer, prompts, SamplingConfig(temperature=0, max_new_tokens=24), stop_ids=(2,))
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=24)[:, width:].tolist()
    assert len({tuple(completion.ids) for completion in ours}) == 3
    for completion, ids in zip(ours, theirs, strict=True):
        ended = ids.index(2) + 1 if 2 in ids else len(ids)
        assert list(completion.ids) == ids[:ended]


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--max-new-tokens", "20", "--seed", "4"]
    assert main(["generate", str(folder), "To be", *options]) == 0
    said = capsys.readouterr().out
    assert said == "To be" + octavo.load(folder).generate("To be", SETTINGS) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be"))
    assert main(["generate", str(folder), *options]) == 0
    assert capsys.readouterr().out == said
    assert main(["generate", str(folder), "To be", *options, "--n", "3"]) == 0
    several = capsys.readouterr().out
    assert [line for line in several.splitlines() if line.startswith("--- ")] == ["--- 1", "--- 2", "--- 3"]
    assert said in several


SETTINGS = SamplingConfig(max_new_tokens=20, seed=4, temperature=0.8, top_p=0.95)


def test_chat_from_a_script(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(*lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "8"]) == 0
        return capsys.readouterr().out

    lm = octavo.load(folder)
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    first = [{"role": "user", "content": "hello"}]
    one = lm.generate(first, greedy)
    two = lm.generate([*first, {"role": "assistant", "content": one}, {"role": "user", "content": "and?"}], greedy)
    again = lm.generate([{"role": "user", "content": "and?"}], greedy)
    assert talk("hello", "", "and?") == f"{one}\n{two}\n"
    assert talk("hello", "/reset", "and?") == f"{one}\n{again}\n"
    assert talk("hello", "/exit", "and?") == f"{one}\n"
    assert talk("/help").startswith("Enter sends")


class Keyboard(io.StringIO):
    """A terminal at which the given lines are typed."""

    def __init__(self, *typed: str | type[BaseException]):
        super().__init__()
        self.typed = list(typed)

    def isatty(self) -> bool:
        return True

    def ask(self, prompt: str) -> str:
        line = self.typed.pop(0) if self.typed else EOFError
        if isinstance(line, str):
            return line
        raise line


def at_keyboard(monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]) -> None:
    keyboard = Keyboard(*typed)
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", keyboard.ask)


def test_chat_at_a_terminal(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted(
        [*tokenizer.encode("Yes, of course."), tokenizer.special.eos], tokenizer.vocab_size, max_seq_len=120
    )
    at_keyboard(monkeypatch, "hello", "again", "x " * 200, "/reset", "hello", "/exit", "never asked")
    converse(model, tokenizer, SamplingConfig(temperature=0), name="tiny")
    said = capsys.readouterr().out
    assert said.count("Yes, of course.") == 3  # the message that does not fit is refused and forgotten
    assert "the model's context is 120" in said and "begins anew" in said and "cut off" not in said
    at_keyboard(monkeypatch, "hello", KeyboardInterrupt, "never asked")
    converse(model, tokenizer, SamplingConfig(temperature=0, max_new_tokens=2), name="tiny")
    assert "[cut off at the limit]" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Scripted):
        def __call__(self, *args, **more):
            if self.n_passes == 3:
                self.n_passes += 1
                raise KeyboardInterrupt
            return super().__call__(*args, **more)

    model = Interrupted([*tokenizer.encode("ABCDEFG"), tokenizer.special.eos], tokenizer.vocab_size)
    at_keyboard(monkeypatch, "hello", "again")
    converse(model, tokenizer, SamplingConfig(temperature=0), name="tiny")
    said = capsys.readouterr().out
    assert "ABC" in said and "[stopped]" in said and "ABCDEFG" in said


def test_a_conversation_that_is_too_long_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x " * 200 + "\n"))
    assert main(["chat", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "the model's context is 96" in error and error.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
@pytest.mark.parametrize("path", ["no/such/model", __file__, str(Path(__file__).parent)])
def test_a_model_that_is_not_there(verb: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"generate": ["x"], "serve": ["--port", "0"], "chat": []}[verb]
    assert main([verb, path, *more]) in (2, 4)
    error = capsys.readouterr().err
    assert error.startswith("error[") and error.count("\n") == 1 and "Fix:" in error


@pytest.mark.parametrize(
    ("words", "option"), [(["--temperature", "nan"], "--temperature"), (["--top-p", "3"], "--top-p")]
)
def test_options_out_of_range(words: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["generate", "nowhere", "x"], ["chat", "nowhere"]):
        assert main([*verb, *words]) == 2
        assert capsys.readouterr().err.startswith(f"error[CONFIG]: {option} = ")


def test_serve_refuses_an_open_door(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    assert main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "there is no key" in capsys.readouterr().err
    assert main(["serve", str(folder), "--api-key", " "]) == 2


def test_serve(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert first.startswith("tiny-model is served at http://127.0.0.1:"), first + process.stderr.read()
        url = process.stdout.readline().split("base_url=")[1].split(",")[0]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=6) as client:
            ask = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
            whole = client.chat.completions.create(**ask, max_tokens=12)
            parts = client.chat.completions.create(**ask, max_tokens=12, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in parts)
        greedy = SamplingConfig(temperature=0, max_new_tokens=12)
        expected = octavo.load(folder).generate([{"role": "user", "content": "hi"}], greedy)
        assert text == whole.choices[0].message.content == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
