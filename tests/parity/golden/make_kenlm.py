"""Write tests/parity/golden/kenlm: a generated text, and what KenLM's lmplz and query make of it.

    python tests/parity/golden/make_kenlm.py kenlm/build/bin

KenLM 0.3.0 from its source distribution (``pip download kenlm --no-deps --no-binary kenlm``), built with cmake and
boost.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "kenlm"
WORDS = {
    "who": "I you we they nobody somebody".split(),
    "does": "saw heard took left found made".split(),
    "which": "the a this that every no".split(),
    "like": "old new small red long quiet".split(),
    "what": "house river song road letter door boat".split()
    + [
        a + b
        for b in ("to", "ran", "miel", "sk", "dor", "va")
        for a in ("ka", "bo", "lin", "mer", "ta", "so", "pe", "ul")
    ],
    "when": "today again at night in the morning | before long | once".split("|"),
}


def sentence(rng: random.Random) -> str:
    def one(kind: str) -> str:
        weights = [1 / (i + 1) for i in range(len(WORDS[kind]))]
        return rng.choices(WORDS[kind], weights)[0].strip()

    parts = [one("who"), one("does"), one("which")]
    parts += [one("like")] * (rng.random() < 0.5) + [one("what")]
    if rng.random() < 0.4:
        parts += ["and", one("which"), one("what")]
    return " ".join(parts + [one("when")] * (rng.random() < 0.4))


def main(tools: str) -> None:
    HERE.mkdir(exist_ok=True)
    rng = random.Random(5)
    lines = [sentence(rng) for _ in range(260)]
    lines[17] = ""  # an empty sentence counts
    text = HERE / "text.txt"
    text.write_text("\n".join([*lines, "naïve 中文 words, once"]) + "\n", encoding="utf-8")
    tiny = HERE / "tiny.txt"
    tiny.write_text("a b a b c\na b\n\nc c a\n", encoding="utf-8")
    new = HERE / "new.txt"
    new.write_text(
        "\n".join([*(sentence(rng) for _ in range(30)), "we saw 中文 and dragons", ""]) + "\n", encoding="utf-8"
    )
    for order in range(1, 6):
        estimate(tools, text, f"text-{order}", order)
    estimate(tools, tiny, "tiny-3", 3, "--discount_fallback")
    arpa = HERE / "query.arpa"
    arpa.write_bytes(gzip.decompress((HERE / "text-3.arpa.gz").read_bytes()))
    with new.open("rb") as file:
        command = [f"{tools}/query", "-v", "sentence", "-v", "summary", str(arpa)]
        said = subprocess.run(command, stdin=file, capture_output=True, check=True)
    arpa.unlink()
    (HERE / "query.json").write_text(json.dumps(said.stdout.decode().splitlines(), indent=1) + "\n")


def estimate(tools: str, text: Path, name: str, order: int, *more: str) -> None:
    command = [f"{tools}/lmplz", "-o", str(order), "-S", "100M", "--text", str(text), *more]
    said = subprocess.run(command, capture_output=True, check=True)
    (HERE / f"{name}.arpa.gz").write_bytes(gzip.compress(said.stdout, 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1])
