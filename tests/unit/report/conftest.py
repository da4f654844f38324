"""A run folder as a finished run leaves it, with made-up figures; small enough to draw in a moment."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

TEXT = (
    "Return a new list containing all items from the iterable in ascending order.\n"
    "This module provides access to some objects used or maintained by the interpreter.\n"
) * 30
QUESTIONS = (
    ("Which module is `fnmatchcase` in?", "fnmatch", "fnmatch"),
    ("From which module do I get `get_close_matches`?", "difflib", "difflib"),
    ("In what module is `testmod` defined?", "doctest", "unittest"),
    ("What does `os.path.basename` do?", "Returns the final component of a pathname", "It returns the final component"),
)


def _figures(bits: float) -> dict[str, Any]:
    return {"bits_per_byte": bits, "perplexity_per_token": 2 ** (2.4 * bits), "token_accuracy": 0.6 - bits / 9,
            "nats_per_token": 1.7 * bits, "documents": 91, "tokens": 30_520, "bytes": 95_310}  # fmt: skip


def metric_rows(steps: int, stage: str, seed: int = 0) -> list[dict[str, Any]]:
    """What a stage of training logs."""
    rng, rows = random.Random(seed), []
    for step in range(1, steps + 1):
        loss = 2.2 + 5.2 * math.exp(-step / 40) + 0.9 * math.exp(-step / 300) + rng.gauss(0, 0.05)
        lr = 5e-3 * min(1.0, step / 20) * min(1.0, (steps - step + 1) / (0.7 * steps))
        row = {"kind": "train", "step": step, "tokens_seen": step * 4096, "loss": loss, "lr": lr}
        row |= {"grad_norm": 0.4 + 2 * math.exp(-step / 30) + abs(rng.gauss(0, 0.05)), "seconds": 0.31}
        rows.append(row | {"tokens_per_second": 13_200 + rng.gauss(0, 250), "mfu": 0.5 if step < steps else 0.9})
        if step % (steps // 7) == 0:
            valid = {"kind": "valid", "step": step, "loss": loss + 0.1}
            rows.append(valid | ({"bits_per_byte": (loss + 0.1) / 1.48} if stage == "pretrain" else {}))
        if step % (steps // 3) == 0:
            prompt = "Return a new" if stage == "pretrain" else "Who are you?"
            rows.append(
                {"kind": "sample", "step": step, "prompt": prompt, "text": f" list of the items\nin order {step}."}
            )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]], end: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def scores() -> dict[str, Any]:
    orders = {str(k): _figures(b) for k, b in enumerate((3.61, 2.34, 1.88, 1.74, 1.70, 1.69, 1.695), 1)}
    counted = {"questions": 240, "right": 171, "exact_match": 0.7125, "interval_95": [0.652, 0.766],
               "majority_answer": "os", "majority_exact_match": 0.021, "stopped_by_itself": 0.992}  # fmt: skip
    examples = [{"question": q, "answer": a, "given": g, "right": a == g} for q, a, g in QUESTIONS]
    baseline = {"kind": "interpolated Kneser-Ney", "orders": orders, "trigram_bits_per_byte": 1.88, "best_order": 6,
                "trained_on": {"documents": 4100, "tokens": 1_480_211, "all_of_the_training_text": True}}  # fmt: skip
    kinds = {"module": counted, "purpose": {**counted, "questions": 60, "exact_match": 0.41}}
    return {"format": 1, "model": _figures(1.652), "baseline": baseline,
            "answers": {**counted, "kinds": kinds, "examples": examples}}  # fmt: skip


def data_report() -> dict[str, Any]:
    excerpt = "Deprecated alias, kept for the programs that still import it under its old name and nothing else."
    example = {"source": "python-stdlib:asyncio.compat", "line": 12, "excerpt": excerpt, "detail": "similarity 0.93"}
    removed = {"near duplicate": {"documents": 212, "bytes": 401_332, "examples": [example, example]},
               "too short": {"documents": 31, "bytes": 402, "examples": []}}  # fmt: skip
    splits = {"train": {"documents": 4100, "bytes": 4_612_009}, "valid": {"documents": 91, "bytes": 95_310}}
    return {"sources": ["python-stdlib"], "documents": 4434, "bytes": 5_109_053, "kept_documents": 4191,
            "kept_bytes": 4_707_319, "repaired": 3, "removed": removed, "by_source": [], "splits": splits}  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must not write into it."""
    from safetensors.numpy import save_file

    from octavo.tokenizer import ByteBPE, train

    run = tmp_path_factory.mktemp("runs") / "quickstart"
    run.mkdir()
    recipe = {"name": "quickstart", "seed": 1, "data": {"sources": [{"path": "python-stdlib"}]},
              "tokenizer": {"kind": "byte_bpe", "vocab_size": 400},
              "model": {"kind": "decoder", "d_model": 256, "n_layers": 4, "max_seq_len": 256, "vocab_size": None,
                        "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}}},
              "train": {"steps": 560}, "tune": {"steps": 240}, "eval": {"answers": 240}}  # fmt: skip
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write(run / "environment.json", {"octavo": "0.1.0", "torch": "2.13.0+cpu", "cpu": "Xeon", "cpus": 2, "gpus": []})
    stages: dict[str, dict[str, Any]] = {name: {"seconds": s} for name, s in
              (("data", 14.2), ("tokenizer", 6.1), ("pretrain", 173.6), ("tune", 74.4), ("eval", 48.0))}  # fmt: skip
    stages["pretrain"] |= {"epochs": 1.55, "train_flops_per_token": 23_592_960}
    write(run / "stages.json", stages)
    write(run / "scores.json", scores())
    write(run / "data/report.json", data_report())
    write(run / "data/train/manifest.json", {"n_tokens": 1_480_211, "n_bytes": 4_612_009, "n_documents": 4100})
    write(run / "data/valid/manifest.json", {"n_tokens": 30_611, "n_bytes": 95_310, "n_documents": 91})
    for stage, steps in (("pretrain", 560), ("tune", 240)):
        write_lines(run / stage / "metrics.jsonl", metric_rows(steps, stage), end='{"kind": "trai')
    train(ByteBPE(vocab_size=400), [TEXT]).save(run / "tokenizer")
    for name in ("base", "model"):
        write(run / name / "config.json", {"model_type": "llama"})
        save_file(
            {"a": np.zeros((400, 25), np.float32), "b": np.zeros(7, np.float16)}, run / name / "model.safetensors"
        )
    return run


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies of the finished run that a test may change."""
    import shutil

    def copy() -> Path:
        return Path(shutil.copytree(finished_run, tmp_path / "quickstart"))

    return copy
