"""Model folders that mean harm, and what the child of R16 does with them."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Attack = Callable[[Path], object]
MARKER = "marker-that-no-loader-may-write"


def open_folder(case: dict[str, str]) -> str:
    """What a user does with a folder from a stranger; returns what it turned out to be."""
    path = Path(case["folder"])
    os.chdir(path)  # as if the user stood in it: its Python files are then within reach of an import
    if case["kind"] == "checkpoint":
        from octavo.training import checkpoint

        found = checkpoint.newest(path / "checkpoints")
        tensors, state = checkpoint.load(found.path if found else path / "checkpoints" / "step-00000001")
        return f"checkpoint of {len(tensors)} tensors, step {state.get('step')}"
    import octavo

    model = octavo.load(str(path))
    ids = model.tokenizer.encode("The cat <|im_end|> sat.")
    return f"model of {len(ids)} tokens, {model.tokenizer.decode(ids)[:40]!r}"


# ----------------------------------------------------------------------------------------- sound folders


def write_model(folder: Path, *, sharded: bool = False) -> None:
    """A Llama of 400 weights with a byte-level tokenizer, as this library saves it."""
    from octavo.hub.folder import save_model
    from octavo.language_model import LanguageModel
    from octavo.models.decoder import Decoder, build
    from octavo.tokenizer import ByteBPE, train

    tokenizer = train(ByteBPE(vocab_size=270), ["the cat sat on the mat " * 20])
    block = {"mixer": {"n_heads": 2, "n_kv_heads": 1}, "channel": {"kind": "glu", "d_ff": 8}}
    config = {"d_model": 4, "n_layers": 2, "max_seq_len": 16, "vocab_size": tokenizer.vocab_size}
    model = build(Decoder.Config.model_validate({**config, "blocks": {"block": block}}), seed=1)
    LanguageModel(model, tokenizer).save(folder)
    if sharded:
        save_model(model, folder, shard_bytes=2000)


def write_checkpoint(folder: Path) -> None:
    """One step of training state."""
    import torch

    from octavo.training import checkpoint

    tensors = {"model/a": torch.arange(6.0).view(2, 3), "optimizer/a.m": torch.zeros(2, 3), "b": torch.ones(2)}
    state = {"step": 1, "updates": 1, "seed": 5, "source": "abc", "random": {"torch": "00" * 8}, "metrics": {"size": 3}}
    checkpoint.save(folder / "checkpoints", 1, tensors, state, run_id="r")


def remade_manifest(step: Path) -> None:
    """Write the manifest anew, so that a hostile file has the hash that it should have."""
    import hashlib

    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["sha256"]
    for path in step.iterdir():
        if path.name != "manifest.json":
            data = path.read_bytes()
            manifest["files"][path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"] = dict(sorted(manifest["files"].items()))
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (step / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode() + b"\n")


# ----------------------------------------------------------------------------------------- fixed attacks


def bomb(marker: Path) -> bytes:
    """A pickle that writes ``marker`` when it is loaded; nothing of pickle's is needed to write it down."""
    command = f"import pathlib; pathlib.Path({str(marker)!r}).write_text('ran')"
    return b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."


def header(table: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _sparse(path: Path, size: int, head: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def _json(name: str, change: Callable[[Any], Any]) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return attack


def _set(name: str, **values: Any) -> Attack:
    return _json(name, lambda value: value.update(values))


def _text(name: str, text: str | bytes) -> Attack:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def _pickled(name: str, *, alone: bool = True) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).write_bytes(bomb(folder / MARKER))
        if alone and name != "model.safetensors":
            (folder / "model.safetensors").unlink()

    return attack


def _evil_module(name: str, config: dict[str, Any]) -> Attack:
    def attack(folder: Path) -> None:
        code = f"import pathlib\npathlib.Path({str(folder / MARKER)!r}).write_text('ran')\nclass Thing: pass\n"
        (folder / f"{name}.py").write_text(code)
        _set("config.json", **config)(folder)

    return attack


def _replaced_chain(spec: dict[str, Any]) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    spec["decoder"] = {"type": "Sequence", "decoders": [double] * 40}


def _native(**model: Any) -> dict[str, Any]:
    return {"model_type": "octavo", "model": {"kind": "decoder", "vocab_size": 270, **model}}


def _state(text: str | bytes) -> Attack:
    def attack(folder: Path) -> None:
        step = folder / "checkpoints" / "step-00000001"
        (step / "state.json").write_bytes(text.encode() if isinstance(text, str) else text)
        remade_manifest(step)

    return attack


def _tensors_of_step(data: bytes) -> Attack:
    def attack(folder: Path) -> None:
        step = folder / "checkpoints" / "step-00000001"
        (step / "model.safetensors").write_bytes(data)
        remade_manifest(step)

    return attack


def _link(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def _pipe(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def _many_tensors(folder: Path) -> None:
    table = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    (folder / "model.safetensors").write_bytes(header(table))


def _as_whole_numbers(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NINES = "9" * 5000
DEEP = "[" * 3000 + "]" * 3000
SAFETENSORS: dict[str, Attack] = {
    "empty": _text("model.safetensors", b""),
    "seven bytes": _text("model.safetensors", b"\0" * 7),
    "header of 2^63 bytes": _text("model.safetensors", header({}, length=2**63)),
    "header longer than the file": _text("model.safetensors", header({}, length=4096)),
    "header of 95 MB": lambda f: _sparse(f / "model.safetensors", 99_000_000, struct.pack("<Q", 95_000_000) + b"{}"),
    "header of 95 MB of spaces": lambda f: _text("model.safetensors", header(b"{" + b" " * 95_000_000))(f),
    "header is no JSON": _text("model.safetensors", header(b"\xff\xfe{}")),
    "header is a list": _text("model.safetensors", header([1, 2])),
    "header is deep": _text("model.safetensors", header(b'{"a":' * 5000 + b"1" + b"}" * 5000)),
    "a tensor is no object": _text("model.safetensors", header({"a": 7})),
    "offsets overlap": _text("model.safetensors", header({"a": F32, "b": F32}, b"\0" * 8)),
    "offsets beyond the end": _text("model.safetensors", header({"a": {**F32, "data_offsets": [0, 2**40]}}, b"\0" * 8)),
    "offsets backwards": _text("model.safetensors", header({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8)),
    "negative offsets": _text("model.safetensors", header({"a": {**F32, "data_offsets": [-8, 0]}}, b"\0" * 8)),
    "shape that overflows": _text("model.safetensors", header({"a": {**F32, "shape": [2**33, 2**31]}}, b"\0" * 8)),
    "empty but wide": _text(
        "model.safetensors", header({"a": {**F32, "shape": [0, 2**62], "data_offsets": [0, 0]}})
    ),
    "unknown dtype": _text("model.safetensors", header({"a": {**F32, "dtype": "F4096"}}, b"\0" * 8)),
    "dtype torch has no name for": _text("model.safetensors", header({"a": {**F32, "dtype": "F6_E2M3"}}, b"\0" * 8)),
    "20,000 empty tensors": _many_tensors,
    "whole numbers for weights": lambda f: _as_whole_numbers(f / "model.safetensors"),
    "a pickle by that name": _pickled("model.safetensors"),
    "a folder by that name": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "a link to itself": _link("model.safetensors", "model.safetensors"),
    "a link to /dev/zero": _link("model.safetensors", "/dev/zero"),
    "a named pipe": _pipe("model.safetensors"),
}  # fmt: skip
PICKLES: dict[str, Attack] = {
    "pytorch_model.bin alone": _pickled("pytorch_model.bin"),
    "model.pt alone": _pickled("model.pt"),
    "training_args.bin beside": _pickled("training_args.bin", alone=False),
    "optimizer.pt beside": _pickled("optimizer.pt", alone=False),
}
CONFIG: dict[str, Attack] = {
    "not JSON": _text("config.json", "{"),
    "a list": _text("config.json", "[]"),
    "deep": _text("config.json", '{"model_type": "llama", "x": ' + DEEP + "}"),
    "5,000 digits": _text("config.json", '{"model_type": "llama", "vocab_size": ' + NINES + "}"),
    "not UTF-8": _text("config.json", b'{"model_type": "ll\xffama"}'),
    "300 MB": lambda f: _sparse(f / "config.json", 300_000_000),
    "a named pipe": _pipe("config.json"),
    "a link to /dev/zero": _link("config.json", "/dev/zero"),
    "10^9 layers": _set("config.json", num_hidden_layers=10**9),
    "10^5 layers": _set("config.json", num_hidden_layers=10**5),
    "10^9 native layers": _set("config.json", **_native(n_layers=10**9)),
    "width of 10^12": _set("config.json", hidden_size=10**12, head_dim=10**11),
    "head width of 10^11": _set("config.json", head_dim=10**11),
    "context of 10^18": _set("config.json", max_position_embeddings=10**18),
    "vocabulary of 10^15": _set("config.json", vocab_size=10**15),
    "no heads": _set("config.json", num_attention_heads=0),
    "NaN": _text("config.json", '{"model_type": "llama", "hidden_size": NaN, "rms_norm_eps": 1e999}'),
    "infinite theta": _set("config.json", rope_theta=1e308, rope_parameters={"rope_theta": 1e308}),
    "half a character as type": _set("config.json", model_type="\ud800"),
    "a type of 1 MB": _set("config.json", model_type="x" * 1_000_000),
    "line ends and colours in the type": _set("config.json", model_type="a\n\x1b[31merror[BUG]: b"),
    "code by auto_map": _evil_module("modeling_evil", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Thing"}}),
    "code by kind": _evil_module("evil_kind", {"model_type": "octavo", "model": {"kind": "evil_kind:Thing"}}),
    "code by a mixer's kind": _evil_module(
        "evil_mixer", _native(blocks={"block": {"mixer": {"kind": "evil_mixer:Thing"}}})
    ),
    "code by a norm's kind": _evil_module("evil_norm", _native(norm="evil_norm:Thing")),
    "code of the standard library": _set("config.json", **_native(norm={"kind": "antigravity:x"})),
    "dtype of another kind": _set("config.json", dtype="__class__", torch_dtype=["bfloat16"]),
}
INDEX: dict[str, Attack] = {
    "not JSON": _text("model.safetensors.index.json", "{"),
    "deep": _text("model.safetensors.index.json", DEEP),
    "a list for a map": _set("model.safetensors.index.json", weight_map=[1]),
    "unhashable shards": _set("model.safetensors.index.json", weight_map={"a": {}, "b": []}),
    "above its folder": _set("model.safetensors.index.json", weight_map={"a": "../../../etc/passwd"}),
    "an absolute path": _set("model.safetensors.index.json", weight_map={"a": "/etc/passwd"}),
    "the folder itself": _set("model.safetensors.index.json", weight_map={"a": "."}),
    "nothing": _set("model.safetensors.index.json", weight_map={}),
    "a NUL in a name": _set("model.safetensors.index.json", weight_map={"a": "a\0b"}),
    "a shard that is not there": _set("model.safetensors.index.json", weight_map={"a": "b.safetensors"}),
    "a shard that is a tokenizer": _set("model.safetensors.index.json", weight_map={"a": "tokenizer.json"}),
    "a pickle for a shard": lambda f: (
        _pickled("pytorch_model-1.bin", alone=False)(f),
        _set("model.safetensors.index.json", weight_map={"a": "pytorch_model-1.bin"})(f),
    ),
    "300 MB": lambda f: _sparse(f / "model.safetensors.index.json", 300_000_000),
}  # fmt: skip
TOKENIZER: dict[str, Attack] = {
    "not JSON": _text("tokenizer.json", "{"),
    "deep": _json("tokenizer.json", lambda s: s.update(
        decoder={"type": "Fuse", "x": json.loads("[" * 400 + "]" * 400)})),
    "300 MB": lambda f: _sparse(f / "tokenizer.json", 300_000_000),
    "one id of 16 million": _json("tokenizer.json", lambda s: s["model"]["vocab"].update(zzz=(1 << 24) - 1)),
    "an added id of 16 million": _json("tokenizer.json", lambda s: s["added_tokens"].append(
        {"id": (1 << 24) - 1, "content": "zzz"})),
    "an id of 2^63": _json("tokenizer.json", lambda s: s["model"]["vocab"].update(zzz=1 << 63)),
    "strip 10^12 times": _json("tokenizer.json", lambda s: s.update(
        decoder={"type": "Strip", "content": " ", "start": 10**12, "stop": 0})),
    "replacements that double": _json("tokenizer.json", _replaced_chain),
    "a decoder in 200 sequences": _json("tokenizer.json", lambda s: s.update(decoder=_nested(200))),
    "half characters": _json("tokenizer.json", lambda s: s["model"]["vocab"].update({"\ud800": 7})),
    "a merge of nothing": _json("tokenizer.json", lambda s: s["model"].update(merges=[["", ""], "x"])),
    "roles that are lists": _set("tokenizer_config.json", octavo={"turn_start": [], "turn_end": {}}),
    "templates without names": _json("tokenizer_config.json", lambda c: c.update(chat_template=[{"name": []}])),
    "a template that never ends": _text(
        "chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "a template of 300 MB": lambda f: _sparse(f / "chat_template.jinja", 300_000_000),
    "numbers of 5,000 digits": _text("tokenizer_config.json", '{"model_max_length": ' + NINES + "}"),
    "a config that is a list": _text("tokenizer_config.json", "[1]"),
    "endless ends": _set("generation_config.json", eos_token_id=[10**30, -1, None, "x", [1]]),
    "more ids than the embedding": _json("tokenizer.json", lambda s: s["added_tokens"].append(
        {"id": 400, "content": "<more>", "special": True})),
}  # fmt: skip
CHECKPOINT: dict[str, Attack] = {
    "state is a list": _state("[1, 2]"),
    "state is deep": _state('{"a": ' + DEEP + "}"),
    "state is no JSON": _state(b"\xff"),
    "state of 5,000 digits": _state('{"step": ' + NINES + "}"),
    "state is a pickle": _state(b"\x80\x02}q\x00."),
    "tensors are a pickle": _tensors_of_step(b"\x80\x02}q\x00."),
    "tensors of 2^62": _tensors_of_step(header({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}})),
    "tensors of another dtype": _tensors_of_step(header({"a": {**F32, "dtype": "F6_E2M3"}}, b"\0" * 8)),
    "shape of truth": _tensors_of_step(header({"a": {**F32, "shape": [True, 2]}}, b"\0" * 8)),
    "manifest is deep": lambda f: (f / "checkpoints" / "step-00000001" / "manifest.json").write_text(DEEP),
    "manifest names a file above": lambda f: _above(f / "checkpoints" / "step-00000001"),
    "a pickle in the folder": lambda f: (
        f / "checkpoints" / "step-00000001" / "x.pt").write_bytes(bomb(f / MARKER)),
}  # fmt: skip


def _nested(depth: int) -> dict[str, Any]:
    decoder: dict[str, Any] = {"type": "Fuse"}
    for _ in range(depth):
        decoder = {"type": "Sequence", "decoders": [decoder]}
    return decoder


def _above(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["../x"] = manifest["files"]["state.json"]
    (step / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------------------------------------- mutation

VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, float("inf"), float("nan"), 0.5, "", "x", "\0",
    "\ud800", "\n", "../..", "a" * 70_000, [], [[]], {}, {"type": "x"}, {"kind": "evil:Thing"}, [None] * 50,
    {"a": {"b": []}}, "antigravity:x", "<|im_end|>",
]  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def mutate_json(text: bytes, chance: random.Random) -> bytes:
    """A JSON file with one to three of its values replaced, removed, doubled or renamed."""
    value = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        paths = list(_paths(value))
        if not paths:
            break
        # Long lists (vocabularies) would drown what stands beside them.
        short = [path for path in paths if len(path) <= 2]
        *outer, key = chance.choice(short if chance.random() < 0.6 else paths)
        place = value
        for part in outer:
            place = place[part]
        action = chance.randrange(5)
        if action == 0:
            del place[key]
        elif action == 1 and isinstance(place, list):
            place.insert(key, copy.deepcopy(place[key]))
        elif action == 2 and isinstance(place, dict):
            place[chance.choice(["", "type", "kind", "\ud800", key + "x"])] = place.pop(key)
        else:
            place[key] = copy.deepcopy(chance.choice(VALUES))
    return json.dumps(value).encode()


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes changed, cut out, inserted, repeated, or its end missing."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out) + 1)
        action = chance.randrange(6)
        if action == 0 and at < len(out):
            out[at] ^= chance.randrange(1, 256)
        elif action == 1:
            del out[at : at + chance.randint(1, 16)]
        elif action == 2:
            out[at:at] = chance.randbytes(chance.randint(1, 9))
        elif action == 3:
            out[at:at] = out[at : at + chance.randint(1, 64)] * chance.randint(1, 20)
        elif action == 4:
            out[at : at + 8] = struct.pack("<q", chance.choice([0, -1, 1, 2**31, 2**62, 255]))
        else:
            del out[at:]
    return bytes(out)
