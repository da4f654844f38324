"""What other programs say of the exported model: transformers on its folder, llama.cpp on its GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octavo.certify.judge import Check, Finding, Said, judge
from octavo.certify.prompts import Numbers, Prompt
from octavo.certify.reference import Reference
from octavo.errors import ConfigError, OctavoError
from octavo.hub.folder import FAMILIES, NATIVE, choose_family, read_config
from octavo.nn.quantized import quantized_modules

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel

EXACT = 1e-3
LLAMA = 0.02
"""Of ln p: llama.cpp in fp32, whose exponentials and norms are its own."""
LLAMA_CODES = 0.3
"""Of ln p: llama.cpp rounds activations to 8 bits where weights are codes."""
CHILD = Path(__file__).with_name("llama_cpp_child.py")
SECONDS = 3600


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


# ------------------------------------------------------------------------------------------- transformers


def ask_transformers(
    lm: LanguageModel, place: Path, exported: Path | None, reference: Reference, prompts: Sequence[Prompt]
) -> Finding:
    """The folder that was given, the model's own where it is in the words of a family, or one made for this."""
    finding = Finding("transformers")
    if missing("transformers"):
        finding.skipped = "transformers is not installed"
        return finding
    with tempfile.TemporaryDirectory(prefix="octavo-certify-") as made:
        try:
            folder = exported or _folder(lm, place, Path(made) / "model")
        except ConfigError as error:
            finding.skipped = error.what
            return finding
        model_type = read_config(folder)["model_type"]
        if model_type == NATIVE:
            finding.skipped = "no Hugging Face family can say this model"
            return finding
        import transformers

        finding.version = transformers.__version__
        if model_type in FAMILIES and not hasattr(transformers, FAMILIES[model_type].architecture):
            finding.skipped = f"transformers has no class of its own for {model_type}"
            return finding
        if folder != place:
            finding.checks["weights"] = _same_weights(lm.network, folder)
        with _quiet(transformers):
            try:
                said = _transformers_says(transformers, folder, reference, prompts)
            except Exception as error:  # whatever another program does with a folder that it should read
                what = f"{type(error).__name__}: {error}"
                finding.checks["log-probabilities"] = Check(False, "not read", f"{folder} is not read: {what}")
                return finding
    finding.checks |= judge(reference, prompts, said, EXACT)
    return finding


def _folder(lm: LanguageModel, place: Path, made: Path) -> Path:
    if place.is_dir():
        return place
    if quantized_modules(lm.network) or choose_family(lm.network.config) == NATIVE:
        raise ConfigError("no Hugging Face family can say this model", fix="leave it out")
    lm.save(made)
    return made


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def _transformers_says(transformers: Any, folder: Path, reference: Reference, prompts: Sequence[Prompt]) -> Said:
    here = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **here).eval()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    greedy = transformers.GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=reference.n_new, eos_token_id=ends or None, pad_token_id=0
    )
    said = Said(scores=[], texts=[], stop_ids=frozenset(ends))
    assert said.scores is not None and said.texts is not None
    for prompt, row in zip(reference.prompts, reference.rows, strict=True):
        tokens = torch.tensor([row])
        table = model(tokens).logits[0, :-1, : reference.n_tokens].float().log_softmax(-1)
        said.scores.append(table.gather(-1, tokens[0, 1:, None])[:, 0].double().numpy())
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        said.texts.append(out[0, len(prompt) :].tolist())
    if any(prompt.text is not None or prompt.messages is not None for prompt in prompts):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
        said.rendered, said.ids = [], []
        for prompt in prompts:
            text, ids = _read_there(tokenizer, prompt)
            said.rendered.append(text)
            said.ids.append(ids)
    return said


def _read_there(tokenizer: Any, prompt: Prompt) -> tuple[str | None, list[int] | None]:
    if prompt.messages is not None:
        how: dict[str, Any] = {"add_generation_prompt": True}
        ids = tokenizer.apply_chat_template(prompt.messages, tokenize=True, return_dict=True, **how)["input_ids"]
        return tokenizer.apply_chat_template(prompt.messages, tokenize=False, **how), list(ids)
    return None, None if prompt.text is None else list(tokenizer(prompt.text)["input_ids"])


def _same_weights(network: Any, place: Path) -> Check:
    """What was exported, read back here, is the same numbers."""
    from octavo import language_model

    try:
        back = language_model.load(place, torch.float32).network
    except OctavoError as error:
        return Check(False, "not read", error.what)
    own, theirs = network.state_dict(), back.state_dict()
    odd = sorted(own.keys() ^ theirs.keys())
    wrong = odd or [name for name in own if not torch.equal(own[name].float(), theirs[name].float())]
    if not wrong:
        return Check(True, "equal")
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Check(False, f"{len(wrong)} tensors", f"{wrong[0]} is not the same{more}")


# ---------------------------------------------------------------------------------------------- llama.cpp


def ask_llama_cpp(lm: LanguageModel, exported: Path | None, reference: Reference, prompts: Sequence[Prompt]) -> Finding:
    """The GGUF file that was given, or one made for this, in a process of its own."""
    finding = Finding("llama.cpp")
    if missing("llama_cpp"):
        finding.skipped = "llama-cpp-python is not installed"
        return finding
    if isinstance(lm.tokenizer, Numbers):
        finding.skipped = "a GGUF file has a tokenizer, this model none"
        return finding
    with tempfile.TemporaryDirectory(prefix="octavo-certify-") as made:
        file = exported
        if file is None:
            from octavo.hub import gguf_write

            file = Path(made) / "model.gguf"
            try:
                gguf_write.write(lm.network, lm.tokenizer, file)
            except ConfigError as error:
                finding.skipped = error.what
                return finding
        small = bool(quantized_modules(lm.network))
        if not small:
            finding.checks["weights"] = _same_weights(lm.network, file)
        said = _child(file, Path(made), reference, prompts)
    if isinstance(said, str):
        finding.checks["log-probabilities"] = Check(False, "not read", said)
        return finding
    finding.version = said["version"]
    if lm.tokenizer.chat_template is not None:
        same = said["template"] == lm.tokenizer.chat_template
        words = "" if same else f"the file has another chat template ({len(said['template'] or '')} characters)"
        finding.checks["template"] = Check(same, "equal" if same else "another", words)
    scores = [np.array(row) for row in said["scores"]]
    theirs = Said(ids=said["ids"], scores=scores, texts=said["greedy"], stop_ids=frozenset(said["stop_ids"]))
    finding.checks |= judge(reference, prompts, theirs, LLAMA_CODES if small else LLAMA)
    return finding


def _child(file: Path, scratch: Path, reference: Reference, prompts: Sequence[Prompt]) -> dict[str, Any] | str:
    """Its answer, or in words why there is none."""
    question, answer = scratch / "question.json", scratch / "answer.json"
    asked = {
        "gguf": str(file.absolute()), "threads": torch.get_num_threads(), "n_tokens": reference.n_tokens,
        "context": max(len(p) + reference.n_new for p in reference.prompts) + 1, "n_new": reference.n_new,
        "rows": reference.rows, "prompts": reference.prompts,
        "texts": [(p.rendered, True) if p.messages is not None else (p.text, False) for p in prompts],
    }  # fmt: skip
    question.write_text(json.dumps(asked), "utf-8")
    command = [sys.executable, str(CHILD), str(question), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"llama.cpp gave no answer in {SECONDS:,} s"
    if done.returncode or not answer.is_file():
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return f"llama.cpp ended with {done.returncode} and said: {last}"
    return json.loads(answer.read_text("utf-8"))
