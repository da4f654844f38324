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
    if kind.startswith("gguf"):
        from gguf_models import reference
        from gguf_models import write as write_gguf

        name, matrices = {"gguf": ("llama tied", "Q8_0"), "gguf int4": ("qwen2", "Q4_0")}.get(kind, ("llama", "Q5_1"))
        write_gguf(folder / "m.gguf", name, reference(name), matrices=matrices)
        if kind == "gguf written here":
            import octavo
            from octavo.hub import gguf_write
            from octavo.quantize.model import quantize

            lm = octavo.load(folder / "m.gguf")
            (folder / "m.gguf").unlink()
            gguf_write.write(quantize(lm.model, "int4"), lm.tokenizer, folder / "m.gguf")
        return folder / "m.gguf"
    from nano_checkpoints import gpt_weights, save_gpt, save_letters

    save_gpt(folder / "ckpt.pt", gpt_weights(False))
    save_letters(folder)
    return folder / "ckpt.pt"


def gguf_attacks(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Copies of a sound GGUF file that each claim one thing that cannot be."""

    def with_number(at: int, form: str, value: int) -> bytes:
        raw = bytearray(whole)
        struct.pack_into(form, raw, at, value)
        return bytes(raw)

    for count in (2**24 - 1, 2**24, 2**31, 2**60, 2**64 - 1):
        yield f"{count} tensors", with_number(8, "<Q", count)
        yield f"{count} keys", with_number(16, "<Q", count)
        yield f"a key of {count} bytes", with_number(24, "<Q", count)
    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")  # then: list, of what, how many
    for count in (2**24 - 1, 2**40, 2**62):
        yield f"{count} entries of the vocabulary", with_number(tokens + 8, "<Q", count)
    for kind in (9, 12, 13, 2**31):
        yield f"a vocabulary of the type {kind}", with_number(tokens + 4, "<I", kind)
    yield "a vocabulary that is one text", with_number(tokens, "<I", 8)
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name)  # then: dimensions, sizes, type, offset
    sizes = struct.unpack_from("<2Q", whole, at + 4)
    for n in (0, 1, 3, 5, 2**31):
        yield f"{n} dimensions", with_number(at, "<I", n)
    for size in (0, 1, 31, sizes[0] * 2, 2**31, 2**32 + 32, 2**62, 2**64 - 32):
        yield f"rows of {size}", with_number(at + 4, "<Q", size)
        yield f"{size} rows", with_number(at + 12, "<Q", size)
    for kind in (0, 1, 2, 4, 5, 8, 12, 14, 19, 24, 26, 28, 31, 38, 39, 999, 2**32 - 1):
        if kind != struct.unpack_from("<I", whole, at + 20)[0]:
            yield f"the type {kind}", with_number(at + 20, "<I", kind)
    for offset in (0, 1, 32, 2**31, 2**62, 2**64 - 32):
        yield f"the offset {offset}", with_number(at + 24, "<Q", offset)
    yield "another name", whole.replace(name, b"blk.0.ffn_xx.weight")
    yield "a layer that is not there", whole.replace(name, b"blk.9.ffn_up.weight")
    yield "a name twice", whole.replace(name, b"token_embd.weight\0\0"[: len(name)])


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
