"""A model asked in every way there is to run it, against the trainer's forward pass; the result stays with it."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo import language_model
from octavo.certify import elsewhere, engines
from octavo.certify.judge import ASPECTS, Finding
from octavo.certify.prompts import asked, numbers_for, read
from octavo.certify.reference import Reference
from octavo.errors import ConfigError
from octavo.files import sha256_file, write_json
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder
from octavo.nn.quantized import quantized_modules
from octavo.quantize.model import quantize
from octavo.quantize.scheme import scheme_of
from octavo.run import find_model

NAME = "certificate.json"
BACKENDS = ("engine", "transformers", "llama-cpp")
PACKAGES = {"transformers": "transformers", "llama-cpp": "llama_cpp"}
NEW_TOKENS = 32
N_PROMPTS = 16
HASHED = (".safetensors", ".json", ".jinja")


@dataclass
class Certificate:
    """What was found, and of what."""

    model: dict[str, Any]
    prompts: int
    new_tokens: int
    findings: list[Finding]
    versions: dict[str, str] = field(default_factory=dict)
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def equal(self) -> bool:
        return all(finding.equal for finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """As it is stored."""
        backends = [{**asdict(finding), "equal": finding.equal} for finding in self.findings]
        return {
            "format": 1, "equal": self.equal, "made": self.made,
            "versions": self.versions, "model": self.model, "prompts": self.prompts, "new_tokens": self.new_tokens,
            "reference": "the forward pass as training calls it, in fp32, each text whole and alone",
            "backends": backends,
        }  # fmt: skip


def certify(
    path: Path,
    *,
    prompts: Path | None = None,
    n: int | None = None,
    n_new: int = NEW_TOKENS,
    weights: Sequence[str] = (),
    against: Sequence[str] = BACKENDS,
    exported: Sequence[Path] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Ask every backend and compare.

    Args:
        path: what ``octavo.load`` takes.
        prompts: a file of them; otherwise texts of our own, for a run beginnings of its documents too.
        n: how many; of a file all, otherwise 16.
        n_new: tokens of each greedy text at most.
        weights: schemes of small weights (``octavo.quantize``) to try beside the model's own.
        against: some of BACKENDS.
        exported: folders and GGUF files that were made of this model, to be asked in place of ones made for this.
        on_progress: told what is done next.

    Raises:
        ConfigError: a model that writes no text, a scheme that does not exist, an export that is not there.
    """
    schemes = [(name, scheme_of(name)) for name in weights]
    folders, files = _exports(exported)
    place = find_model(path, files=True)
    on_progress("the model is read")
    lm = language_model.load(path, tokenizer=numbers_for(place))  # type: ignore[arg-type]
    served = lm.model
    if not isinstance(served, Decoder) or not served.capabilities.incremental:
        raise ConfigError(f"{path} is no model that continues texts: there is nothing to serve token by token",
                          fix="give a decoder")  # fmt: skip
    if schemes and quantized_modules(served):
        raise ConfigError(f"{path} is quantised already", fix="leave --weights out, or give the model it was made of")
    lm = LanguageModel(copy.deepcopy(served).float().eval(), lm.tokenizer)
    longest = served.max_seq_len - n_new
    if longest < 1:
        raise ConfigError(f"{n_new} new tokens leave no room for a prompt: the context is {served.max_seq_len} tokens",
                          fix="give fewer with --tokens")  # fmt: skip
    given = read(lm, prompts, n, longest) if prompts else asked(lm, path, n or N_PROMPTS, longest)
    on_progress("the reference")
    reference = Reference(
        lm.model,
        given,
        n_tokens=min(served.vocab_size, lm.tokenizer.vocab_size),
        stop_ids=frozenset(lm.tokenizer.stop_ids),
        n_new=n_new,
    )
    findings: list[Finding] = []

    def ask(name: str, one: Callable[[], Finding]) -> None:
        on_progress(name)
        findings.append(one())

    ask("the trainer", lambda: engines.ask_trainer(reference, given, lm.tokenizer))
    if "engine" in against:
        native = engines.CODES if quantized_modules(lm.network) else engines.EXACT
        ways = [("plain, paged", lm.model, True, engines.EXACT), ("native, paged", lm.model, False, native)]
        if next(served.parameters()).dtype == torch.bfloat16:
            within = engines.within_sixteen(served, reference, given)
            ways += [("plain, bf16", served, True, within), ("native, bf16", served, False, within)]
        for name, model, plain, within in ways:
            ask(name, lambda n=name, m=model, p=plain, w=within: engines.ask_engine(
                f"engine, {n}", m, lm.tokenizer, reference, given, plain=p, within=w))  # fmt: skip
        for name, scheme in schemes:
            small = quantize(lm.model, scheme)
            ask(name, lambda n=name, m=small: engines.ask_small(f"engine, {n}", m, lm.tokenizer, reference, given))
    if "transformers" in against:
        folder = folders[0] if folders else None
        ask("transformers", lambda: elsewhere.ask_transformers(lm, place, folder, reference, given))
    if "llama-cpp" in against:
        file = files[0] if files else None
        ask("llama.cpp", lambda: elsewhere.ask_llama_cpp(lm, file, reference, given))
    return Certificate(_about(path, place, lm), len(given), n_new, findings, _versions(findings))


def _exports(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders, and files."""
    for path in paths:
        if not path.is_file() and not (path / "config.json").is_file():
            raise ConfigError(f"{path} is neither a model folder nor a GGUF file", fix="give what was exported")
    folders, files = [p for p in paths if p.is_dir()], [p for p in paths if p.is_file()]
    if len(folders) > 1 or len(files) > 1:
        raise ConfigError("--exported names several folders, or several files", fix="certify one after the other")
    return folders, files


def _about(path: Path, place: Path, lm: LanguageModel) -> dict[str, Any]:
    files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in HASHED and f.name != NAME)
    sums = {file.name: sha256_file(file) for file in files}
    whole = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return {
        "path": str(path), "sha256": whole, "files": sums, "vocab_size": lm.model.vocab_size,
        "parameters": sum(parameter.numel() for parameter in lm.network.parameters()),
        "quantised": bool(quantized_modules(lm.network)),
    }  # fmt: skip


def _versions(findings: Sequence[Finding]) -> dict[str, str]:
    own = {"octavo": octavo.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {finding.name: finding.version for finding in findings if finding.version}


def store(certificate: Certificate, path: Path, out: Path | None = None) -> Path:
    """Write it beside the model (``certificate.json`` in its folder, ``NAME.certificate.json`` beside a file)."""
    place = find_model(path, files=True)
    target = out or (place / NAME if place.is_dir() else place.with_name(f"{place.name}.{NAME}"))
    write_json(target, certificate.plain())
    return target


def table(certificate: Certificate) -> list[str]:
    """For people: a line for each backend, and the first difference of every aspect that has one."""
    rows = [["", *ASPECTS]]
    for finding in certificate.findings:
        checks = [finding.checks.get(aspect) for aspect in ASPECTS]
        cells = ["-" if check is None else f"{'' if check.equal else 'NO: '}{check.figure}" for check in checks]
        name = f"{finding.name} {finding.version}".rstrip()
        rows.append([name, *(["-"] * len(ASPECTS) if finding.skipped else cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for finding in certificate.findings:
        if finding.skipped:
            lines.append(f"not asked: {finding.name}: {finding.skipped}")
        if finding.figures:
            lines.append(_cost(finding, certificate.prompts))
    for finding in certificate.findings:
        for aspect, check in finding.checks.items():
            lines += [] if check.equal else [f"differs: {finding.name}: {aspect}: {check.difference}"]
    return lines


def _cost(finding: Finding, n: int) -> str:
    f = finding.figures
    return (
        f"{finding.name}: beside the weights before, ln p of a token changes by {f['mean_change']:.2g} "
        f"(at most {f['largest_change']:.2g}), and {f['same_texts']} of {n} greedy texts stay the same"
    )


def require(against: Sequence[str]) -> None:
    """Refuse names that are no backend, and packages that were asked for by name and are not there."""
    from octavo.errors import did_you_mean

    for name in against:
        if name not in BACKENDS:
            raise ConfigError(f"--against {name} is not known", fix=did_you_mean(name, BACKENDS))
        if name in PACKAGES and elsewhere.missing(PACKAGES[name]):
            package = "llama-cpp-python" if name == "llama-cpp" else name
            raise ConfigError(f"{package} is not installed", fix=f"pip install {package}")
