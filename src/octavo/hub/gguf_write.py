"""Models as GGUF files for llama.cpp: what is shaped like Llama, Qwen2, Qwen3 or Mamba, with its tokenizer.

Names, units and rearrangements are those that ``hub/gguf.py`` reads. What a file could not say is refused, and the
tokenizer is read back from the file and compared before the file gets its name.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import ConfigError
from octavo.files import fsync_path, make_folder
from octavo.hub import gguf, gguf_blocks, vocabulary
from octavo.hub.gguf_file import open_file, require
from octavo.hub.vocabulary import BYTE, CONTROL, CUTS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, WHOLE_WORDS_FIRST

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.hub.family import Entry, Family
    from octavo.hub.small_weights import Codes
    from octavo.models.decoder import Decoder
    from octavo.tokenizer import Tokenizer

WRITTEN = ("llama", "qwen2", "qwen3", "mamba")
STORED = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}  # ggml's type, llama.cpp's file type


def write(model: Any, tokenizer: Tokenizer, target: Path) -> str:
    """Write a model with its tokenizer as one file, matrices in the type of its weights; gives the architecture.

    Codes of 8 and 4 bits are written as they are, as Q8_0 and Q4_0: blocks of 32 inputs, of which those of a wider
    group have the same scale. Products with narrower groups are written as F32. The file appears whole or not at all.

    Raises:
        ConfigError: ``target`` exists, the `gguf` package is missing, or GGUF cannot say this model or tokenizer.
    """
    from octavo.models.decoder import Decoder
    from octavo.nn.quantized import quantized_modules

    package = require()
    if not isinstance(model, Decoder):
        raise _cannot("this kind of model")
    family = _family(model)
    bits = _bits(quantized_modules(model).values())
    name, hf = family.model_type, family.write(model.config)
    kind, file_type = STORED[str(model.embed.weight.dtype).removeprefix("torch.")]
    metadata = {
        "general.name": target.stem,
        "general.file_type": gguf_blocks.WRITTEN[bits][1] if bits else file_type,
        **({"general.quantization_version": package.GGML_QUANT_VERSION} if bits else {}),
        **{f"{name}.{key}": value for key, value in _settings(name, hf).items()},
        **describe(tokenizer, model.vocab_size),
    }
    make_folder(target.absolute().parent)
    aside = target.absolute().with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        writer = package.GGUFWriter(aside, name)
        for key, value in metadata.items():
            _add(writer, key, value)
        for their, array, exact in _arrays(model, family, hf):
            if not isinstance(array, np.ndarray):
                quant = package.GGMLQuantizationType[gguf_blocks.WRITTEN[array.bits][0]]
                writer.add_tensor(their, gguf_blocks.bytes_of(array), raw_dtype=quant)
                continue
            # As llama.cpp's converter: what is no product, and the convolution, stays in 32 bits.
            wide = array.ndim == 1 or "ssm_conv1d" in their or not their.endswith(".weight") or exact
            stored = "F32" if wide else kind
            quant = package.GGMLQuantizationType[stored]
            data = package.quants.quantize(array, quant)
            if stored == "F16" and not np.isfinite(data).all():
                raise _cannot(f"{their}, whose numbers float16 does not hold", fix="give --dtype bfloat16")
            writer.add_tensor(their, data, raw_dtype=quant if stored == "BF16" else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(tokenizer, gguf.read_tokenizer(open_file(aside)))
        fsync_path(aside)
        try:
            os.link(aside, target)  # refuses what exists
        except FileExistsError:
            raise ConfigError(f"{target} exists, and nothing is overwritten", fix="give another name") from None
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(target.absolute().parent)
    return name


def _cannot(what: str, fix: str = "write a folder instead: leave out --to gguf") -> ConfigError:
    return ConfigError(f"GGUF cannot say {what}", fix=fix)


# ------------------------------------------------------------------------------------------------- model


def _family(model: Decoder) -> Family:
    """The family in whose names the weights are written."""
    from octavo.hub.folder import FAMILIES

    family = next((FAMILIES[name] for name in WRITTEN if FAMILIES[name].fits(model.config)), None)
    if family is None:
        raise _cannot(f"this model, which is not shaped like one of {', '.join(WRITTEN)}")
    hf = family.write(model.config)
    plain = {"mlp_bias": False, "hidden_act": "silu", "rope_scaling": None}
    plain |= {"attention_bias": False} if family.model_type == "qwen3" else {}
    plain |= {"use_bias": False, "use_conv_bias": True, "expand": 2} if family.model_type == "mamba" else {}
    plain |= {"use_sliding_window": False}
    for key, value in plain.items():
        if hf.get(key, value) != value:
            raise _cannot(f"{key} = {hf[key]!r} of a {family.model_type} model")
    return family


def _settings(name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture, without its prefix."""
    shared = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "vocab_size": hf["vocab_size"],
    }
    if name == "mamba":
        return {
            **shared,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.layer_norm_rms_epsilon": float(hf["layer_norm_epsilon"]),
            "ssm.conv_kernel": hf["conv_kernel"],
            "ssm.inner_size": hf["intermediate_size"],
            "ssm.state_size": hf["state_size"],
            "ssm.time_step_rank": hf["time_step_rank"],
            "ssm.dt_b_c_rms": False,
        }
    return {
        **shared,
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.value_length": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.dimension_count": hf["head_dim"],
        "rope.freq_base": float(hf["rope_theta"]),
    }


def _bits(products: Iterable[Any]) -> int:
    """The bits of most codes; 0 where the weights are not quantised."""
    from octavo.nn.quantized import IntegerWeights

    counts: Counter[int] = Counter()
    for product in products:
        if not isinstance(product.storage, IntegerWeights):
            raise _cannot("weights in 8-bit floats", fix="give --dequantize, or quantize with --scheme int8")
        if product.storage.activations != "model":
            raise _cannot("that activations are rounded to 8 bits", fix="quantize with --scheme int8")
        counts[product.storage.bits] += product.d_in * product.d_out
    return max(counts, key=lambda bits: counts[bits], default=0)


def _arrays(model: Decoder, family: Family, hf: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray | Codes, bool]]:
    """The weights under llama.cpp's names, in float32 or as codes, and whether fewer bits would lose something."""
    from octavo.hub.small_weights import Codes
    from octavo.nn.quantized import quantized_modules

    small = {f"{product}.weight" for product in quantized_modules(model)}
    architecture = gguf.ARCHITECTURES[family.model_type]
    layer = {their: stem for stem, their in architecture.names.items()}
    around = {their: stem for stem, their in architecture.ends.items()}
    heads = {"attn_q": hf.get("num_attention_heads", 0), "attn_k": hf.get("num_key_value_heads", 0)}
    tied = _tied(model)
    for entry in family.entries(model.config):
        if tied is not None and entry.ours == ("head.weight",):
            continue
        found = tied if tied is not None and entry.ours == ("embed.weight",) else _weight(model, entry)
        stem, dot, part = entry.theirs.rpartition(".")
        if dot and part not in ("weight", "bias"):
            stem, dot, part = entry.theirs, "", ""
        if stem in around:
            name, short, n = around[stem], "", 0
        else:
            number, _, inner = stem.removeprefix(f"{architecture.layers}.").partition(".")
            short = layer[inner]
            name, n = f"blk.{number}.{short}", heads.get(short, 0) if architecture.interleaved else 0
        if isinstance(found, Codes):
            codes, scales = (_rearranged(rows, short, part, n) for rows in (found.codes, found.scales))
            yield f"{name}{dot}{part}", Codes(found.bits, codes, scales), True
        else:
            yield f"{name}{dot}{part}", _rearranged(found, short, part, n).numpy(), entry.ours[0] in small


def _weight(model: Decoder, entry: Entry) -> Tensor | Codes:
    """One tensor of a file, from ours."""
    from octavo.hub.small_weights import codes_of
    from octavo.nn.quantized import Quantized

    modules = [model.get_submodule(part.rpartition(".")[0]) for part in entry.ours]
    if not all(
        isinstance(m, Quantized) and part.endswith(".weight") for m, part in zip(modules, entry.ours, strict=True)
    ):
        return entry.join([model.get_parameter(part).detach() for part in entry.ours]).float()
    codes = codes_of(modules)
    return entry.join([m.dequantised() for m in modules]) if codes is None else codes  # type: ignore[operator]


def _tied(model: Decoder) -> Codes | None:
    """The codes of a head that is the embedding, number for number: a file says them once."""
    from octavo.hub.small_weights import codes_of
    from octavo.nn.quantized import Quantized

    codes = codes_of([model.head]) if isinstance(model.head, Quantized) else None
    if codes is None or model.head_bias is not None or model.embed.weight.shape != codes.shape:
        return None
    return codes if bool((codes.plain() == model.embed.weight).all()) else None


def _rearranged(tensor: Tensor, short: str, part: str, heads: int) -> Tensor:
    """One of their tensors as llama.cpp has it; the opposite of what ``gguf.read`` does."""
    if short == "ssm_a":
        return -tensor.exp()
    if short == "ssm_conv1d" and part == "weight":
        return tensor.squeeze(1).contiguous()
    if heads:  # halves of a head become neighbours
        rows = tensor.shape[0]
        return tensor.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor


def _add(writer: Any, key: str, value: Any) -> None:
    """One key of metadata in the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# --------------------------------------------------------------------------------------------- tokenizer


def describe(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer, for an embedding of ``rows`` rows.

    Raises:
        ConfigError: GGUF has no words for it.
    """
    spec = json.loads(tokenizer.to_json())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in plain):
        raise _cannot(f"a tokenizer of the kind {model['type']}, only plain BPE")
    if strange := [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]:
        raise _cannot(f"that {strange[0]!r} takes the spaces beside it")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if not merges:
        raise _cannot("a tokenizer without merges")
    pieces = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokenizer.tokens)]
    pieces += [f"[PAD{i}]" for i in range(len(pieces), rows)]
    kinds = [NORMAL if token is not None else UNUSED for token in tokenizer.tokens]
    kinds += [UNUSED] * (rows - len(kinds))
    for i, token in added.items():
        kinds[i] = CONTROL if token["special"] else USER_DEFINED
    special, template = tokenizer.special, tokenizer.chat_template
    roles = {"bos": special.bos, "eos": special.eos, "unknown": special.unk, "padding": special.pad}
    ends = sorted(tokenizer.stop_ids - {special.eos})
    if len(ends) > 2:
        raise _cannot(f"{len(ends) + 1} tokens that end an answer")
    roles |= dict(zip(("eot", "eom"), ends, strict=False))
    found: dict[str, Any] = {
        **{f"{role}_token_id": i for role, i in roles.items() if i is not None},
        "add_bos_token": special.bos is not None,
        "add_eos_token": False,
        "tokens": pieces,
    }
    cut = _cut(spec)
    if cut is not None:
        found |= {"model": "gpt2", "pre": cut, "merges": [" ".join(pair) for pair in merges]}
    else:
        found |= _sentencepiece(spec, merges, pieces, kinds)
    found["token_type"] = kinds
    said = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return {**said, "tokenizer.chat_template": template} if template else said


def _cut(spec: Mapping[str, Any]) -> str | None:
    """The name for how a byte-level tokenizer cuts text; None for one that is not byte-level."""
    steps = _steps(spec.get("pre_tokenizer"))
    if ("bytes",) not in steps:
        return None
    # llama.cpp composes no characters, its converter leaves that of Qwen's tokenizer out too.
    if (spec.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _cannot(f"the normalizer {spec['normalizer']['type']} of a tokenizer")
    for name, known in CUTS.items():
        whole = name in WHOLE_WORDS_FIRST
        if _steps({"type": "Sequence", "pretokenizers": known}) == steps and whole == bool(
            spec["model"].get("ignore_merges")
        ):
            return name
    raise _cannot("how this tokenizer cuts text into words")


def _steps(pre: Any) -> list[tuple[str, ...]]:
    """What a pre-tokenizer does, in one form."""
    found: list[tuple[str, ...]] = []
    for step in (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]) if pre else []:
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                found.append(("split", regex))
            case {"type": "Digits", "individual_digits": True}:
                found.append(("split", r"\p{N}"))
            case {"type": "ByteLevel", "add_prefix_space": False}:
                found += [("split", GPT2_WORDS)] if step.get("use_regex", True) else []
                found.append(("bytes",))
            case _:
                found.append(("other", json.dumps(step, sort_keys=True)))
    return found


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's encoder.py


def _sentencepiece(
    spec: Mapping[str, Any], merges: list[list[str]], pieces: list[str], kinds: list[int]
) -> dict[str, Any]:
    """SentencePiece's BPE: the earlier a piece is merged, the better its score; marks bytes and the unknown."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": vocabulary.SPACE}
    first = [{"type": "Prepend", "prepend": vocabulary.SPACE}]
    if spec.get("pre_tokenizer") is not None or steps not in ([spaces], [*first, spaces]):
        raise _cannot("how this tokenizer treats spaces")
    if not spec["model"].get("byte_fallback"):
        raise _cannot("a tokenizer with characters it does not know, without byte_fallback")
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores)))
    for i, piece in enumerate(pieces):
        if piece == spec["model"].get("unk_token"):
            kinds[i] = UNKNOWN
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and kinds[i] == NORMAL:
            kinds[i] = BYTE
    worst = -float(len(scores))
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(piece, worst) for piece in pieces],
        "add_space_prefix": steps != [spaces],
    }


def _compare(tokenizer: Tokenizer, again: Tokenizer) -> None:
    """Refuse a tokenizer that the file says otherwise than it is."""
    mine, theirs = (_content(one) for one in (tokenizer, again))
    for what, content in mine.items():
        if theirs[what] != content:
            raise _cannot(f"the {what} of this tokenizer")


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    spec = json.loads(tokenizer.to_json())
    model = spec["model"]
    merges: dict[str, set[tuple[str, str]]] = {}  # the order of pairs that make one piece is the scores' own affair
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        merges.setdefault(left + right, set()).add((left, right))
    return {
        "vocabulary": [token for token in tokenizer.tokens if token is not None],
        "merges": list(merges.items()),
        "order of merging": bool(model.get("ignore_merges")),
        "added tokens": [(token["id"], token["content"], token["special"]) for token in spec["added_tokens"]],
        "ends of answers": tokenizer.stop_ids,
        "beginning of texts": tokenizer.special.bos,
        "chat template": tokenizer.chat_template,
    }
