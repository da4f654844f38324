"""A recipe that runs in seconds: sentences of a few words, a byte tokenizer, a decoder of 16 channels."""

import json
import random
from pathlib import Path
from typing import Any

SUBJECTS = "the cat|a dog|my friend|our teacher|the old clock|a small bird|the red train|some river".split("|")
VERBS = "sees|likes|follows|forgets|carries|paints|hears|finds|counts|hides".split("|")
OBJECTS = "the moon|a letter|three stones|the garden|an apple|the quiet road|a song|bread".split("|")


def write_texts(path: Path, n: int = 60, seed: int = 0) -> Path:
    """``n`` documents of a dozen sentences each, as JSONL."""
    chance = random.Random(seed)

    def sentence() -> str:
        return f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(OBJECTS)} {chance.randrange(1000)}."

    rows = [{"text": " ".join(sentence() for _ in range(12))} for _ in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(path: Path, n: int = 40) -> Path:
    """``n`` Alpaca rows."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Data, pretraining and tuning in 8 + 6 steps; ``sections`` replace whole sections or, as mappings, keys."""
    training = {"step_tokens": 128, "compile": "off", "precision": "fp32", "threads": 1, "log_every": 1}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 5,
        "data": {"sources": [str(write_texts(folder / "texts.jsonl"))], "split": {"held_out": 0.1}},
        "tokenizer": {"kind": "byte"},
        "model": {"d_model": 16, "n_layers": 1, "max_seq_len": 64, "blocks": {"block": {"mixer": {"n_heads": 2}}}},
        "train": {**training, "steps": 8, "valid_every": 4, "save_every": 3, "sample_prompts": ["the "],
                  "sample_every": 4, "sample_tokens": 4},
        "tune": {**training, "steps": 6, "valid_every": 3, "save_every": 2,
                 "data": {"kind": "chat", "paths": [str(write_pairs(folder / "pairs.jsonl"))]}},
    }  # fmt: skip
    for name, value in sections.items():
        recipe[name] = {**recipe[name], **value} if isinstance(value, dict) and name in recipe else value
    return recipe
