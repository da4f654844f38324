"""Write docs/rows.md: which tests prove which technique, and whether they passed.

    python scripts/rows.py            run every test with a ``rows`` mark, then write docs/rows.md
    python scripts/rows.py --check    only compare the names in docs/rows.md with the tests there are

A test says what it proves with ``@pytest.mark.rows("T1", "T2")``; the mark may stand on a function, on a class
or as a module's ``pytestmark``. The comparison reads the sources without importing them, so it is quick.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "rows.md"

Outcomes = Mapping[str, Mapping[str, int]]

ROWS: dict[str, str] = {
    "T1": "Text split into bytes, characters, words or pieces, and put together again",
    "T2": "Vocabulary, unknown words, and the special tokens",
    "T3": "Byte-pair encoding, trained step by step",
    "T4": "Byte-pair encoding on bytes: lossless on anything",
    "T5": "Unigram pieces: expectation-maximisation, best path, sampling",
    "T6": "Seeing the pieces: coloured spans with their ids",
    "T7": "An embedding is a product with one-hot rows; unused rows get no gradient",
    "T8": "Learned positions added to token embeddings, with dropout",
    "P1": "A language model is a distribution: all texts of one length have probability one together",
    "P2": "Temperature as a change of the distribution",
    "P3": "A text tempered as a whole is not a text tempered word by word; temperatures that move",
    "N1": "n-grams by relative frequency",
    "N2": "Add-one and add-k smoothing",
    "N3": "Back-off (Katz, stupid) and interpolation learnt on held-out text",
    "N4": "Kneser-Ney and modified Kneser-Ney, as KenLM counts them",
    "N5": "The noisy channel: spelling, pinyin, rescoring",
    "N6": "Sparsity: how many n-grams of a text were ever seen",
    "N7": "Word vectors: CBOW and skip-gram, negative sampling, hierarchical softmax",
    "N11": "Vanishing gradients: how far back an error reaches, and what is remembered",
    "N12": "Recurrent encoder-decoder, with and without attention",
    "A1": "Encoders: BERT and RoBERTa, masked language modelling",
    "A2": "Heads for classes on encoders and decoders",
    "A3": "The causal decoder, whole",
    "A4": "Encoder-decoders: the Transformer of 2017, T5, BART",
    "A5": "Kinds of masks: causal, both ways, prefix, cross, padding, document",
    "A6": "Vectors of words in their context",
    "A7": "Models that look things up in a store",
    "A8": "Qwen2 from configuration to hidden states",
    "A9": "minimind: its folders read, and written as the classes they are",
    "A10": "DeepSeek: V2 and V3 blocks, fill in the middle",
    "A12": "Other systems' components as ours",
    "B1": "Scaled dot-product attention",
    "B2": "Many heads as one product",
    "B3": "Masked self-attention and cross-attention",
    "B4": "Grouped-query and multi-query attention, without repeated keys",
    "B5": "Multi-head latent attention: naive and absorbed forms, latent cache",
    "B6": "FlashAttention: tiles and the online softmax",
    "B7": "Paged keys and values: blocks anywhere, shared beginnings, nothing lost",
    "B8": "Sparse attention patterns, alternating with dense layers",
    "B9": "Linear attention: parallel, recurrent and chunked",
    "B10": "Dropout in its two places",
    "B11": "Attention maps of every layer",
    "B12": "What attention is without a key, a value or with a gate",
    "R1": "Sinusoidal positions in both layouts",
    "R2": "Learned positions",
    "R3": "Relative positions: Shaw, Transformer-XL, T5",
    "R4": "Rotary positions in both layouts and in complex form",
    "R5": "ALiBi",
    "R6": "Position interpolation",
    "R7": "NTK and dynamic NTK scaling",
    "R8": "ReRoPE and Leaky ReRoPE",
    "R9": "Truncated rotary bases and critical pairs",
    "R10": "Frequencies for longer contexts: YaRN, LongRoPE, llama3",
    "R11": "Parallel context windows",
    "R12": "The Lambda-shaped window: first tokens and last tokens",
    "R13": "Token selection: external memory",
    "R14": "Block selection: LongHeads and InfLLM",
    "N8": "The feed-forward language model of a fixed window",
    "N9": "One interface for all sequence models",
    "N10": "Simple, LSTM and GRU recurrences, both directions",
    "N13": "Causal convolutions",
    "F1": "The feed-forward network and its share of the parameters",
    "F2": "Activation functions",
    "F3": "Gated feed-forward networks (SwiGLU and its family)",
    "F4": "LayerNorm and RMSNorm",
    "F5": "Norm placement: before, after or around a branch; DeepNorm",
    "F6": "The residual path",
    "F7": "The output head, tied or its own",
    "F8": "The next-token loss: shift, mask, padding",
    "M1": "A dense mixture of experts and its gradient",
    "M2": "Top-k routing in both orders",
    "M3": "Capacity and overflow",
    "M4": "The load-balancing loss",
    "M5": "DeepSeek's routing: shared experts, groups, bias, sequence-wise loss",
    "S1": "Linear state spaces: convolution equals recurrence",
    "S2": "Mamba and Mamba-2",
    "S3": "RWKV",
    "S4": "Retention: parallel, recurrent, chunkwise",
    "S5": "Hyena: long convolutions with implicit filters",
    "S6": "Cost of training and decoding against length",
    "G1": "Pretraining; accumulated micro-batches equal one batch",
    "G2": "Epochs, reshuffling, and per-sample, mini-batch and full-batch updates",
    "G4": "Initialisation and activation checkpointing",
    "G5": "Validation, token counts and samples while training",
    "G7": "Ablations: several values, several seeds, intervals",
    "G9": "Multi-token prediction in training",
    "G12": "What published models weigh and cost",
    "L1": "Instruction tuning: loss on the answers only",
    "I1": "Greedy decoding, stop tokens, streaming",
    "I2": "Sampling: temperature, top-k, top-p, min-p, typical, repetition; beams",
    "I3": "Cached decoding equals the full forward pass",
    "I7": "Many requests at once on shared memory, behind the OpenAI interface",
    "X1": "Minimal pairs: the right sentence is likelier",
    "X3": "The padding row of the embedding gets no gradient",
    "X4": "Hidden states: order and values",
}

# Rows that other work is for: tests may already prove a part of them, and the page says so apart.
BEGUN: dict[str, str] = {}


def _tables(module: ast.Module) -> dict[str, list[str]]:
    """The values of the module's dictionaries of literals, by name: ``rows(ROWS[kind])`` may take any of them."""
    found = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            values = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
            found[node.targets[0].id] = list(dict.fromkeys(values))
    return found


def _marked_rows(nodes: Iterable[ast.AST], tables: Mapping[str, list[str]]) -> list[str]:
    """The row ids in every ``pytest.mark.rows(...)`` inside ``nodes``."""
    found = []
    for node in nodes:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.rows"):
                for argument in call.args:
                    chosen = isinstance(argument, ast.Subscript)
                    found += tables[ast.unparse(argument.value)] if chosen else [ast.literal_eval(argument)]
    return found


def _tests(
    body: Iterable[ast.stmt], inherited: list[str], prefix: str, tables: Mapping[str, list[str]]
) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            rows = inherited + _marked_rows(node.decorator_list, tables)
            yield from _tests(node.body, rows, f"{prefix}::{node.name}", tables)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            for row in inherited + _marked_rows(node.decorator_list, tables):
                yield row, f"{prefix}::{node.name}"


def marked_tests(folder: Path = ROOT / "tests", root: Path = ROOT) -> dict[str, set[str]]:
    """Row id -> the tests marked with it, as pytest names them but without parameters."""
    rows: dict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"), str(path))
        tables = _tables(module)
        marks = (
            node.value
            for node in module.body
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets)
        )
        whole = _marked_rows(marks, tables)
        for row, test in _tests(module.body, whole, path.relative_to(root).as_posix(), tables):
            rows[row].add(test)
    return dict(rows)


def written_tests(table: str) -> dict[str, set[str]]:
    """Row id -> the tests that a written docs/rows.md names."""
    rows: dict[str, set[str]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0] in ROWS | BEGUN:
            rows[cells[0]] = set(re.findall(r"`([^`]+)`", cells[2]))
    return rows


def problems(marked: Mapping[str, set[str]], table: str) -> list[str]:
    """What is wrong between the tests there are and the table: unproven rows, unknown ids, stale names."""
    found = [f"row {row} ({title}) has no test" for row, title in ROWS.items() if not marked.get(row)]
    found += [f"row {row} has no title in scripts/rows.py" for row in sorted(set(marked) - set(ROWS | BEGUN))]
    written = written_tests(table)
    for row in ROWS | BEGUN:
        now, then = marked.get(row, set()), written.get(row, set())
        found += [f"row {row}: {test} is not in docs/rows.md" for test in sorted(now - then)]
        found += [f"row {row}: {test} is in docs/rows.md but not marked" for test in sorted(then - now)]
    return found


class Recorder:
    """A pytest plugin that counts the outcomes of every marked test, over all its parameters."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[test][report.outcome] += 1


def _rows_of_table(titles: Mapping[str, str], marked: Mapping[str, set[str]], outcomes: Outcomes) -> list[str]:
    lines = ["| row | technique | tests | result |", "|---|---|---|---|"]
    for row, title in titles.items():
        tests = sorted(marked.get(row, ()))
        total = sum((Counter(outcomes.get(test, {"not run": 1})) for test in tests), Counter())
        order = ("failed", "passed", "skipped", "not run")
        result = ", ".join(f"{total[name]} {name}" for name in order if total[name]) or "no test"
        lines.append(f"| {row} | {title} | {'<br>'.join(f'`{test}`' for test in tests)} | {result} |")
    return lines


def render(marked: Mapping[str, set[str]], outcomes: Outcomes) -> str:
    """The page: one line a row."""
    begun = ["", "## Begun", "", "These tests prove a part of their row, not yet all of it.", ""]
    lines = [
        "# What is proven, row by row",
        "",
        "Written by `python scripts/rows.py`, which runs these tests; do not edit. Each row is one technique;",
        "its tests carry the mark `@pytest.mark.rows(...)`.",
        "",
        *_rows_of_table(ROWS, marked, outcomes),
        *([*begun, *_rows_of_table(BEGUN, marked, outcomes)] if BEGUN else []),
    ]
    return "\n".join(lines) + "\n"


def run_marked() -> tuple[int, dict[str, Counter[str]]]:
    """Run every marked test, slow ones too; the exit code of pytest and the outcomes."""
    import pytest

    recorder = Recorder()
    code = pytest.main(["-q", "-m", "rows and not soak", "-n", "2", str(ROOT / "tests")], plugins=[recorder])
    return int(code), recorder.outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; run and write nothing")
    check = parser.parse_args().check
    marked = marked_tests()
    code = 0
    if not check:
        code, outcomes = run_marked()
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(render(marked, outcomes), encoding="utf-8")
    found = problems(marked, TABLE.read_text(encoding="utf-8") if TABLE.exists() else "")
    for problem in found:
        print(problem, file=sys.stderr)
    return code or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
