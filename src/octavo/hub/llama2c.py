"""llama2.c: a Llama in one file of float32, and its vocabulary in another.

Two layouts, both little-endian. The first has a header of seven 32-bit numbers and no mark at all: what tells it is
that the numbers give exactly the file's length. Version 1 begins with "ak42" as a number, the version, the same
seven numbers and one byte that says whether the head is tied; weights begin at byte 256. Source: llama2.c, export.py
(``legacy_export``, ``version1_export``), run.c (what the numbers mean), tokenizer.py (the vocabulary).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import CheckpointError
from octavo.hub import vocabulary
from octavo.hub.formats import Foreign
from octavo.hub.limits import MAX_LAYERS, MAX_SIZE, MAX_SIZES

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.tokenizer import Tokenizer

MAGIC = 0x616B3432
LEGACY_BYTES, HEADER_BYTES = 28, 256
UNK, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
MAX_VOCABULARY_BYTES = 64 << 20


@dataclass(frozen=True)
class Header:
    """The seven numbers, and what follows from them."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool
    legacy: bool

    def sensible(self) -> bool:
        """Whether a model can have these numbers."""
        counts = (self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads, self.vocab_size)
        return (
            all(0 < count < MAX_SIZE for count in counts)
            and 0 < self.seq_len <= MAX_SIZES["max_seq_len"]
            and self.n_layers <= MAX_LAYERS
            and self.dim % self.n_heads == 0
            and self.n_heads % self.n_kv_heads == 0
            and (self.dim // self.n_heads) % 2 == 0
        )

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every array, in the order of the file."""
        D, F, L, V = self.dim, self.hidden_dim, self.n_layers, self.vocab_size
        kv, half = D // self.n_heads * self.n_kv_heads, D // self.n_heads // 2
        matrices = {"q": (L, D, D), "k": (L, kv, D), "v": (L, kv, D), "o": (L, D, D)}
        glu = {"gate": (L, F, D), "down": (L, D, F), "up": (L, F, D)}
        if self.legacy:
            tables = {"cos": (self.seq_len, half), "sin": (self.seq_len, half)}  # run.c computes them anew
            order = {"embed": (V, D), "norm_in": (L, D), **matrices, "norm_mlp": (L, D), **glu, "norm": (D,), **tables}
        else:
            order = {"norm_in": (L, D), "norm_mlp": (L, D), "norm": (D,), "embed": (V, D), **matrices, **glu}
        return [*order.items(), *([] if self.tied else [("head", (V, D))])]

    @property
    def n_bytes(self) -> int:
        """The length a file with this header has."""
        start = LEGACY_BYTES if self.legacy else HEADER_BYTES
        return start + 4 * sum(int(np.prod(shape, dtype=object)) for _, shape in self.shapes())


def parse(head: bytes) -> Header | None:
    """The header at the start of a file, None where there is none that makes sense."""
    if len(head) < LEGACY_BYTES:
        return None
    if struct.unpack_from("<I", head)[0] == MAGIC and len(head) >= HEADER_BYTES:
        D, F, L, H, G, V, T = struct.unpack_from("<7i", head, 8)
        header = Header(D, F, L, H, G, V, T, tied=bool(head[36]), legacy=False)
    else:
        D, F, L, H, G, V, T = struct.unpack_from("<7i", head)
        header = Header(D, F, L, H, G, abs(V), T, tied=V > 0, legacy=True)
    return header if header.sensible() else None


def recognises(head: bytes, size: int, name: str) -> bool:
    """Whether a file of ``size`` bytes that begins with ``head`` is a llama2.c model, perhaps a damaged one."""
    if head[:4] == struct.pack("<I", MAGIC):
        return True
    header = parse(head)
    return header is not None and (header.n_bytes == size or name.endswith(".bin"))


def read(path: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """Read a model; its vocabulary is the fitting ``tokenizer.bin`` or ``tok*.bin`` beside it.

    Raises:
        CheckpointError: another version, damaged, or no vocabulary of its size in the folder.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if head[:4] == struct.pack("<I", MAGIC) and (version := struct.unpack_from("<i", head.ljust(8, b"\0"), 4)[0]) != 1:
        raise CheckpointError(
            f"{path} is a llama2.c file of version {version}, only float32 is read (the first layout and version 1)",
            fix="export the model again with --version 1",
        )
    header = parse(head)
    if header is None or header.n_bytes != size:
        expected = "" if header is None else f": its header says {header.n_bytes:,} bytes, it has {size:,}"
        raise CheckpointError(f"{path} is a damaged llama2.c file{expected}", fix="fetch it again")
    if tokenizer is None:
        tokenizer = find_vocabulary(path, header.vocab_size)
    return Foreign(_config(header), _tensors(path, header), tokenizer)


def _config(header: Header) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": header.vocab_size,
        "hidden_size": header.dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "intermediate_size": header.hidden_dim,
        "hidden_act": "silu",
        "max_position_embeddings": header.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": header.tied,
        "dtype": "float32",
    }


def _tensors(path: Path, header: Header) -> dict[str, Tensor]:
    import torch

    at = LEGACY_BYTES if header.legacy else HEADER_BYTES
    arrays: dict[str, Tensor] = {}
    for name, shape in header.shapes():
        count = int(np.prod(shape))
        if name not in ("cos", "sin"):
            arrays[name] = torch.from_numpy(np.fromfile(path, "<f4", count, offset=at).reshape(shape))
        at += 4 * count
    found = {"model.embed_tokens.weight": arrays["embed"], "model.norm.weight": arrays["norm"]}
    if not header.tied:
        found["lm_head.weight"] = arrays["head"]
    heads = {"q": header.n_heads, "k": header.n_kv_heads}
    for i in range(header.n_layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            weight = arrays[name][i]
            weight = half_pairs(weight, heads[name]) if name in heads else weight
            found[f"{layer}.self_attn.{name}_proj.weight"] = weight
        found |= {f"{layer}.mlp.{name}_proj.weight": arrays[name][i] for name in ("gate", "up", "down")}
        found[f"{layer}.input_layernorm.weight"] = arrays["norm_in"][i]
        found[f"{layer}.post_attention_layernorm.weight"] = arrays["norm_mlp"][i]
    return found


def half_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """The rows (H * K, ...) of a query or key product, reordered within each head from interleaved rotary pairs
    (2i, 2i + 1) to pairs (i, i + K/2), the order of Hugging Face folders."""
    rows = weight.shape[0]
    return weight.reshape(n_heads, rows // n_heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


# -------------------------------------------------------------------------------------------- vocabulary


def find_vocabulary(path: Path, vocab_size: int) -> Tokenizer:
    """The vocabulary of ``vocab_size`` entries beside a model file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    near = [other for other in sorted(path.parent.glob("tok*.bin")) if other != path]
    near.sort(key=lambda other: other.name != "tokenizer.bin")
    refusals = []
    for other in near:
        try:
            return read_vocabulary(other, vocab_size)
        except CheckpointError as error:
            refusals.append(error.what)
    what = refusals[0] if refusals else f"there is no vocabulary beside {path}"
    raise CheckpointError(what, fix=f"put the tokenizer.bin of its {vocab_size} entries beside {path.name}")


def read_vocabulary(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.bin: the longest length, then for each entry its score, its length and its UTF-8 bytes.

    Raises:
        CheckpointError: damaged, or of another number of entries.
    """
    damaged = CheckpointError(f"{path} is not a llama2.c vocabulary of {vocab_size} entries", fix="fetch it again")
    if not 8 <= path.stat().st_size <= MAX_VOCABULARY_BYTES:
        raise damaged
    raw = path.read_bytes()
    (longest,) = struct.unpack_from("<I", raw)
    at, pieces, scores = 4, [], []
    for _ in range(vocab_size):
        if at + 8 > len(raw):
            raise damaged
        score, length = struct.unpack_from("<fI", raw, at)
        at += 8
        if length > min(longest, len(raw) - at) or not abs(score) < float("inf"):
            raise damaged
        try:
            pieces.append(raw[at : at + length].decode("utf-8").replace(" ", vocabulary.SPACE))
        except UnicodeDecodeError:
            raise damaged from None
        scores.append(score)
        at += length
    if at != len(raw) or vocab_size <= EOS:
        raise damaged
    pieces[UNK : EOS + 1] = ["<unk>", "<s>", "</s>"]  # stored with line breaks around them, for printing
    kinds = [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL]
    kinds += [vocabulary.NORMAL] * (vocab_size - len(kinds))
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    # Older vocabularies hold the characters instead of their names, each a second time.
    if pieces[FIRST_BYTE : FIRST_BYTE + 256] in (names, [chr(b).replace(" ", vocabulary.SPACE) for b in range(256)]):
        pieces[FIRST_BYTE : FIRST_BYTE + 256] = names
        kinds[FIRST_BYTE : FIRST_BYTE + 256] = [vocabulary.BYTE] * 256
    roles = {"unk": UNK, "bos": BOS, "eos": EOS}
    # Stories are set apart by the beginning alone: run.c stops there too.
    return vocabulary.sentencepiece(path, pieces, scores, kinds, roles, stop_ids=[BOS])
