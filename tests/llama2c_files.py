"""llama2.c models and vocabularies as that project's export.py and tokenizer.py write them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

D, F, L, H, G, T = 24, 40, 3, 6, 3, 64
WORDS = ["once", "upon", "a", "time", "the", "cat", "sat", "on", "mat", "and", "naïve", "猫"]


def entries() -> list[tuple[bytes, float]]:
    """tokenizer.bin's entries: specials, bytes, characters, then joins with falling scores."""
    text = " " + " ".join(WORDS)
    letters = sorted(set(text))
    joins: list[str] = []
    for word in WORDS:
        for n in range(2, len(word) + 2):
            joins += [piece for piece in ((" " + word)[:n], word[-n:]) if len(piece) > 1 and piece not in joins]
    made = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    found = [(raw, 0.0) for raw in made] + [(join.encode(), -float(i)) for i, join in enumerate(joins)]
    return found + [(letter.encode(), -1e6 - i) for i, letter in enumerate(letters)]


V = len(entries())


def write_vocabulary(path: Path, vocabulary: list[tuple[bytes, float]]) -> None:
    body = b"".join(struct.pack("<fI", score, len(raw)) + raw for raw, score in vocabulary)
    path.write_bytes(struct.pack("<I", max(len(raw) for raw, _ in vocabulary)) + body)


def weights(tied: bool, heads: int = G) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(3)
    shapes = {
        "embed": (V, D), "norm_in": (L, D), "q": (L, D, D), "k": (L, D // H * heads, D), "v": (L, D // H * heads, D),
        "o": (L, D, D), "norm_mlp": (L, D), "w1": (L, F, D), "w2": (L, D, F), "w3": (L, F, D), "norm": (D,),
        "cos": (T, D // H // 2), "sin": (T, D // H // 2), "head": (V, D),
    }  # fmt: skip
    made = {name: random_.normal(size=shape).astype("<f4") * 0.3 for name, shape in shapes.items()}
    made |= {name: made[name] + 1 for name in ("norm_in", "norm_mlp", "norm")}
    return made | ({"head": made["embed"]} if tied else {})


LEGACY = ("embed", "norm_in", "q", "k", "v", "o", "norm_mlp", "w1", "w2", "w3", "norm", "cos", "sin")
VERSION_1 = ("norm_in", "norm_mlp", "norm", "embed", "q", "k", "v", "o", "w1", "w2", "w3")


def write_model(path: Path, w: dict[str, np.ndarray], *, tied: bool, version: int, heads: int = G) -> None:
    order = [*(LEGACY if version == 0 else VERSION_1), *([] if tied else ["head"])]
    numbers = struct.pack("<7i", D, F, L, H, heads, V if version or tied else -V, T)
    if version:
        numbers = (struct.pack("<Ii", 0x616B3432, version) + numbers + bytes([tied])).ljust(256, b"\0")
    path.write_bytes(numbers + b"".join(w[name].tobytes() for name in order))


def story_folder(folder: Path, *, tied: bool = True, version: int = 0, heads: int = G) -> dict[str, np.ndarray]:
    w = weights(tied, heads)
    write_model(folder / "model.bin", w, tied=tied, version=version, heads=heads)
    write_vocabulary(folder / "tokenizer.bin", entries())
    return w
