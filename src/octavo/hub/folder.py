"""Model folders in Hugging Face layout, read and written strictly: safetensors only, every tensor accounted for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError, did_you_mean
from octavo.files import fsync_path, make_folder, write_json
from octavo.hub.bamba import Bamba
from octavo.hub.bart import Bart
from octavo.hub.bert import Bert
from octavo.hub.bloom import Bloom
from octavo.hub.deepseek import DeepSeekV2, DeepSeekV3
from octavo.hub.falcon import Falcon
from octavo.hub.family import Family
from octavo.hub.formats import INDEX, PICKLED, WEIGHTS
from octavo.hub.gemma2 import Gemma2
from octavo.hub.gemma3 import Gemma3
from octavo.hub.gpt2 import GPT2
from octavo.hub.gpt_neox import GPTNeoX
from octavo.hub.limits import check_header, check_layers, check_sizes, read_json
from octavo.hub.llama import Llama
from octavo.hub.mamba import Mamba
from octavo.hub.mamba2 import Mamba2
from octavo.hub.minimind import MiniMind
from octavo.hub.mistral import Mistral
from octavo.hub.mixtral import Mixtral
from octavo.hub.modernbert import ModernBert
from octavo.hub.mpt import Mpt
from octavo.hub.nanochat import NanoChat
from octavo.hub.olmo2 import Olmo2
from octavo.hub.phi import Phi
from octavo.hub.phi3 import Phi3
from octavo.hub.qwen import Qwen2, Qwen3
from octavo.hub.qwen_moe import Qwen2Moe, Qwen3Moe
from octavo.hub.roberta import Roberta
from octavo.hub.rwkv import Rwkv
from octavo.hub.small_weights import KEY as QUANTIZATION
from octavo.hub.small_weights import Codes, described, fill_small, make_small, place, refuse, settle, stored_tensors
from octavo.hub.t5 import T5
from octavo.models.decoder import Decoder, build
from octavo.models.tables import MODELS
from octavo.schema import component, no_imports

# The first that can say exactly what a model is gets to write it.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(Llama(), Qwen2(), Qwen3(), GPT2(), Mistral(), Gemma2(), Olmo2(), Phi3(), MiniMind(), NanoChat()),
        *(GPTNeoX(), Phi(), Bloom(), Mpt(), Falcon(), Mamba(), Mamba2(), Rwkv(), Bamba()),
        *(Mixtral(), Qwen2Moe(), Qwen3Moe(), DeepSeekV2(), DeepSeekV3()),
        *(T5(), Bart()),
        *(Gemma3(), Bert(), Roberta(), ModernBert()),
    )
}
NATIVE = "octavo"
SHARD_BYTES = 5 * 10**9


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        CheckpointError: missing, not JSON, or without model_type.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type", fix="give a folder written by transformers or octavo")
    return config


def family_of(model_type: str) -> Family:
    """The family of a config.json's ``model_type``."""
    if model_type not in FAMILIES:
        known = [*FAMILIES, NATIVE]
        raise CheckpointError(
            f"model_type {model_type!r} is not a known checkpoint family", fix=did_you_mean(model_type, known)
        )
    return FAMILIES[model_type]


def model_config(hf: Mapping[str, Any]) -> Decoder.Config:
    """Our configuration of a config.json."""
    check_layers(hf)
    if stored := hf.get("quantization_config"):
        how = stored.get("quant_method", "unknown") if isinstance(stored, Mapping) else stored
        raise CheckpointError(
            f"config.json has quantization_config: the weights are stored as {how!r} with scales of their own, "
            "which are not read here",
            fix="turn them into bfloat16 with the program that made them, or use an unquantised copy",
        )
    try:
        with no_imports():
            if hf["model_type"] == NATIVE:
                config = component(MODELS, hf["model"]["kind"]).Config.model_validate(hf["model"])
            else:
                config = family_of(hf["model_type"]).of(hf).read(hf)
        check_sizes(config.model_dump())
        return config
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]}", fix="restore the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"config.json does not make sense: {said}", fix="restore the file") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"config.json does not make sense: {first}", fix="restore the file") from None


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The model of a folder, in ``dtype`` or as saved.

    Raises:
        CheckpointError: pickled, damaged, unknown, or any tensor missing, left over or of another shape.
    """
    folder = Path(folder)
    hf = read_config(folder)
    config = model_config(hf)
    tensors = read_tensors(folder)
    if hf["model_type"] != NATIVE:
        said, hf = hf, family_of(hf["model_type"]).of(hf).borne_out(hf, tensors)
        config = config if hf is said else model_config(hf)
    return assemble(hf, config, tensors, folder, dtype)


def assemble(
    hf: Mapping[str, Any],
    config: Decoder.Config,
    tensors: Mapping[str, Tensor | Codes],
    folder: Path,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """The model of a config.json, our configuration of it, and tensors named as its family names them.

    Args:
        tensors: codes stay codes in the products that they fill.
        folder: where they come from, for errors.
        dtype: of the weights; as saved if None.

    Raises:
        CheckpointError: any tensor missing, left over or of another shape.
    """
    if config.n_layers > len(tensors):  # before as many are built
        raise CheckpointError(
            f"{folder}: config.json has {config.n_layers} layers, the weights {len(tensors)} tensors",
            fix="use a folder whose config.json and weights belong together",
        )
    model = build(config, device="meta")
    if hf["model_type"] == NATIVE and QUANTIZATION in hf:
        make_small(model, hf[QUANTIZATION])
    own, small, codes = dict(model.named_parameters()), stored_tensors(model), {}
    if hf["model_type"] == NATIVE:
        found = _check(own | small, dict(tensors), folder)
        small = {name: found.pop(name) for name in small}
    else:
        family = family_of(hf["model_type"]).of(hf)
        plain, codes = settle(model, family.entries(config), tensors, dtype or torch.float32)
        found = _from_foreign(family, config, own, plain, folder)
    if whole := next((name for name, tensor in found.items() if not tensor.is_floating_point()), None):
        raise CheckpointError(f"{folder}: {whole} holds {found[whole].dtype}, no weights", fix="restore the file")
    dtype = dtype or next(iter(found.values())).dtype
    model.to_empty(device="cpu")
    fill_small(model, small, dtype)
    with torch.no_grad():
        for name in own:
            # What is counted and not trained (a bias of the choice of experts) keeps the precision it was saved in.
            kept = dtype if own[name].requires_grad else torch.promote_types(dtype, found[name].dtype)
            parameter = found[name].to(kept)
            module, _, leaf = name.rpartition(".")
            made = torch.nn.Parameter(parameter.contiguous(), requires_grad=own[name].requires_grad)
            setattr(model.get_submodule(module), leaf, made)
    place(model, codes, dtype)
    return model.eval()


def check_shapes(hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Whether tensors of these shapes are what a config.json of another program asks for, before any is read.

    Raises:
        CheckpointError: any missing, left over or of another shape.
    """
    config, family = model_config(hf), family_of(hf["model_type"]).of(hf)
    if config.n_layers <= len(shapes):  # else ``assemble`` says so
        own = dict(build(config, device="meta").named_parameters())
        _from_foreign(family, config, own, {n: torch.empty(s, device="meta") for n, s in shapes.items()}, folder)


def _from_foreign(
    family: Family, config: Decoder.Config, own: Mapping[str, Tensor], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    entries = family.entries(config)
    prefix = family.optional_prefix
    for pattern, spelling in family.renamed.items():
        tensors = {re.sub(pattern, spelling, name): tensor for name, tensor in tensors.items()}
    if prefix and not any(name.startswith(prefix) for name in tensors):
        head = family.head.removesuffix("weight")
        tensors = {name if name.startswith(head) else prefix + name: tensor for name, tensor in tensors.items()}
    left = {n: t for n, t in tensors.items() if not any(re.fullmatch(p, n) for p in family.ignored)}
    for copy, of in family.copies.items():
        if copy in left and not torch.equal(tensor := left.pop(copy), left.setdefault(of, tensor)):
            raise CheckpointError(f"{folder}: {copy} differs from {of}, of which it is a copy", fix="restore the file")
    if config.tie_embeddings and family.head in left:
        embedding = next(entry.theirs for entry in entries if entry.ours[0] in ("embed.weight", "decoder.embed.weight"))
        head = left.pop(family.head)
        if embedding in left and not torch.equal(head, left[embedding]):
            raise CheckpointError(
                f"{folder}: {family.head} differs from {embedding}, although config.json ties them",
                fix="set tie_word_embeddings to false",
            )
    found: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    missing, wrong = [], []
    for entry in entries:
        if entry.theirs not in left:
            missing += [] if entry.repeats else [entry.theirs]
            continue
        tensor = left.pop(entry.theirs)
        shapes = [tuple(own[name].shape) for name in entry.ours]
        expected = entry.shape(shapes)
        if tuple(tensor.shape) != expected:
            wrong.append(f"{entry.theirs} has {tuple(tensor.shape)}, expected {expected}")
        elif entry.cut is not None:
            axis, index, _ = entry.cut
            pieces.setdefault(entry.ours[0], []).append((index, axis, entry.split(tensor, shapes)[0]))
        elif entry.repeats:
            if entry.ours[0] in found and not torch.equal(tensor, found[entry.ours[0]]):
                wrong.append(f"{entry.theirs} is not the copy it should be")
        else:
            found |= dict(zip(entry.ours, entry.split(tensor, shapes), strict=True))
    _refuse(folder, missing, list(left), wrong)
    for name, of_one in pieces.items():
        ordered = sorted(of_one, key=lambda piece: piece[0])
        found[name] = torch.cat([tensor for *_, tensor in ordered], ordered[0][1])
    return found


def _check(own: Mapping[str, Tensor], found: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Our own layout: every parameter there, of its shape, and nothing left over."""
    wrong = [
        f"{name} has {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in found and found[name].shape != tensor.shape
    ]
    missing = [name for name in own if name not in found]
    _refuse(folder, missing, [name for name in found if name not in own], wrong)
    return found


def _refuse(folder: Path, missing: list[str], extra: list[str], wrong: list[str]) -> None:
    """An error that lists what does not match, if anything does not."""
    lists = {"missing": missing, "not used": extra, "of another shape": wrong}
    problems = [
        f"{what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''} ({len(names)})"
        for what, names in lists.items()
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors do not match config.json; {'; '.join(problems)}",
            fix="use a folder whose config.json and weights belong together",
        )


def tensor_names(folder: Path) -> list[str]:
    """The names of a folder's tensors, from its index or the head of its one file; none where there are no weights."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX)
        return list(where.get("weight_map", ())) if isinstance(where, dict) else []
    if not (folder / WEIGHTS).is_file():
        return []
    check_header(folder / WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}", fix="restore the file") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one safetensors file or from the shards its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / INDEX).is_file():
        try:
            where = read_json(folder / INDEX)["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error}", fix="restore the file") from None
        if outside := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX} points outside its folder: {outside[0]!r}", fix="do not use it")
    elif (folder / WEIGHTS).is_file():
        where, files = None, [WEIGHTS]
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise CheckpointError(
                f"{folder / pickled[0]} is a pickle, and reading one can run code",
                fix=f"octavo convert --from-pickle {folder} TARGET",
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}", fix="give a folder that holds weights")
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            check_header(folder / name)
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise CheckpointError(f"{folder / name} is missing, {INDEX} names it", fix="restore the file") from None
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{folder / name} is damaged: {error}", fix="restore the file") from None
    if where is not None and set(where) != set(tensors):
        odd = sorted(set(where) ^ set(tensors))
        raise CheckpointError(f"{folder / INDEX} and the shards disagree on {', '.join(odd[:5])}", fix="restore them")
    return tensors


def choose_family(config: Decoder.Config, wanted: str = "auto") -> str:
    """The family a model is written as: ``auto`` takes the first that says it exactly, else our own layout.

    Raises:
        ConfigError: ``wanted`` cannot say this model.
    """
    if wanted == NATIVE:
        return NATIVE
    fitting = [
        name for name, family in FAMILIES.items() if isinstance(config, family.configures) and family.fits(config)
    ]
    if wanted == "auto":
        return next((name for name in fitting if FAMILIES[name].automatic), NATIVE)
    if wanted not in fitting:
        raise ConfigError(
            f"this model cannot be written as {wanted!r}",
            fix=f"it can be written as {', '.join([*fitting, NATIVE])}",
        )
    return wanted


def save_model(
    model: Decoder,
    folder: str | Path,
    *,
    family: str = "auto",
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> str:
    """Write config.json and weights; returns the family's name.

    Args:
        family: ``auto``, a family, or ``octavo``.
        extra: further keys of config.json (token ids).
        shard_bytes: larger checkpoints are split over several files with an index.
        dtype: of the written weights; default: the model's.

    The folder is written aside and renamed, so that a reader never sees half a model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    quantization = described(model)
    if quantization is not None and family not in ("auto", NATIVE):
        raise refuse(family)
    name = NATIVE if quantization is not None else choose_family(model.config, family)
    own = {
        n: p.detach().to("cpu", dtype if dtype and p.requires_grad else p.dtype).contiguous()
        for n, p in model.named_parameters()
    }
    own |= {n: t.detach().to("cpu").contiguous() for n, t in stored_tensors(model).items()}
    if name == NATIVE:
        tensors = own
        hf: dict[str, Any] = {"model_type": NATIVE, "architectures": ["Decoder"],
                              "model": model.config.model_dump(mode="json")}  # fmt: skip
        hf |= {QUANTIZATION: quantization} if quantization is not None else {}
    else:
        chosen = FAMILIES[name]
        tensors = {
            entry.theirs: entry.join([own[part] for part in entry.ours]) for entry in chosen.entries(model.config)
        }
        # Where the ids are not said, a class there has some of its own, perhaps beyond the vocabulary.
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        hf = {"model_type": name, "architectures": [chosen.architecture], **ids, **chosen.write(model.config)}
    dtype_name = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    hf |= {"dtype": dtype_name, "torch_dtype": dtype_name, **(extra or {})}
    make_folder(folder.parent)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    shards = _shards(tensors, shard_bytes)
    for file, names in shards.items():
        save_file({n: tensors[n] for n in names}, aside / file, metadata={"format": "pt"})
        fsync_path(aside / file)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map = {n: file for file, names in shards.items() for n in names}
        write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(aside / "config.json", hf)
    for file in shards:  # the library writes for the owner alone; a model may be read by whom the folder lets in
        (aside / file).chmod((aside / "config.json").stat().st_mode & 0o777)
    fsync_path(aside)
    for old in folder.iterdir() if folder.is_dir() else ():  # tokenizer files and the like stay
        if not (old.name in ("config.json", INDEX) or old.suffix == ".safetensors"):
            old.rename(aside / old.name)
    if folder.exists():
        old_folder = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old_folder, ignore_errors=True)
        folder.rename(old_folder)
        aside.rename(folder)
        shutil.rmtree(old_folder, ignore_errors=True)
    else:
        aside.rename(folder)
    fsync_path(folder.parent)
    return name


def _shards(tensors: Mapping[str, Tensor], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        n = tensor.numel() * tensor.element_size()
        if groups[-1] and size + n > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
