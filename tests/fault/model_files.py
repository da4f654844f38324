"""Model files of other programs that mean harm, and what the child does with them."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # in the child nothing has put the helpers of all tests there

EDGES = [0, 1, 7, 0x7F, 0x80, 0xFF, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]


def open_file(case: dict[str, str]) -> str:
    """What a user does with a file from a stranger: load it, or convert it where it is a pickle."""
    import octavo
    from octavo.language_model import from_foreign

    path = Path(case["path"])
    if case["kind"] == "pickle":
        from nano_checkpoints import read_here

        from octavo.hub import pickled

        pickled._run_child = read_here
        lm = from_foreign(pickled.read(path), path)
    else:
        lm = octavo.load(path)
    return f"{sum(p.numel() for p in lm.model.parameters())} weights"


def write(kind: str, folder: Path) -> Path:
    """A sound file of each kind, the one that is to be attacked."""
    if kind.startswith("llama2.c"):
        from llama2c_files import story_folder

        story_folder(folder, version=int(kind.endswith("1")))
        return folder / ("tokenizer.bin" if "words" in kind else "model.bin")
    if kind == "gguf":
        from gguf_models import reference
        from gguf_models import write as write_gguf

        write_gguf(folder / "m.gguf", "llama tied", reference("llama tied"), matrices="Q8_0")
        return folder / "m.gguf"
    from nano_checkpoints import gpt_weights, save_gpt, save_letters

    save_gpt(folder / "ckpt.pt", gpt_weights(False))
    save_letters(folder)
    return folder / "ckpt.pt"


def mutants(whole: bytes, n: int, head: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """``n`` changed copies; most changes in the first ``head`` bytes, where sizes and types stand."""
    for _ in range(n):
        raw, kind = bytearray(whole), draw.choice(["cut", "flip", "number", "number", "swap", "insert"])
        at = draw.randrange(min(head, len(raw) - 9))
        if kind == "cut":
            at = draw.randrange(len(raw))
            del raw[at:]
        elif kind == "flip":
            raw[at] ^= 1 << draw.randrange(8)
        elif kind == "number":
            width = draw.choice("IQ")
            struct.pack_into(f"<{width}", raw, at, draw.choice(EDGES) % 2 ** (32 if width == "I" else 64))
        elif kind == "swap":
            other = draw.randrange(min(head, len(raw) - 9))
            raw[at : at + 8], raw[other : other + 8] = raw[other : other + 8], raw[at : at + 8]
        else:
            raw[at:at] = draw.randbytes(draw.choice([1, 4, 8]))
        yield f"{kind} at {at}", bytes(raw)
