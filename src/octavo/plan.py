"""What a recipe's training will take on this machine, before it is started: memory, speed, time, and what to change.

The speed is measured (some seconds of the real step, see ``training.rehearse``), the memory is computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.config import Pretrained, Recipe
from octavo.errors import ConfigError, OctavoError, ResourceError, UnsupportedError
from octavo.feed import rows_of_step, seq_len_of, settings
from octavo.models.cost import cost
from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.training.machine import DTYPES, compile_works, cores, matmul_peak
from octavo.training.memory import Memory, available_bytes, training_bytes
from octavo.training.rehearse import Rehearsal
from octavo.training.settings import TrainConfig

COMPILE_SECONDS = 25.0
COMPILE_SECONDS_PER_LAYER = 3.0
# Compilation leaves matrix products as they are and more than halves the rest of a step.
COMPILED_REST = 0.5
# What compilation saves, as a share of the time of the matrix products: a careful figure for models of 10 to 50 M.
SAVED_OF_PRODUCTS = 0.2


@dataclass(frozen=True)
class Plan:
    """The forecast of one training stage.

    seconds: of all steps, validation and compilation included. fixes: changes that would make a run fit that
    does not, the cheapest first, each with the bytes it would then need.
    """

    stage: str
    parameters: int
    step_tokens: int
    steps: int
    micro_batch_rows: int
    seq_len: int
    memory: Memory
    available: int
    precision: str
    threads: int
    compile: str
    tokens_per_second: float
    seconds: float
    peaks: dict[str, float] = field(default_factory=dict)
    fixes: tuple[tuple[str, int, str], ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    def choices(self) -> dict[str, Any]:
        """What is frozen in the recipe."""
        return {"precision": self.precision, "threads": self.threads, "compile": self.compile}


def plan(recipe: Recipe, stage: str = "pretrain", *, budget: float = 12.0) -> Plan:
    """Forecast a stage of ``recipe``.

    Args:
        budget: seconds of measuring.

    Raises:
        ConfigError: there is no such stage.
        ResourceError: the measuring process died.
    """
    train = settings(recipe, stage)
    model = model_of(recipe)
    if isinstance(model, EncoderDecoder.Config):
        raise UnsupportedError(
            "encoder-decoders are not forecast", fix="start the run: it says after a few steps how long it will take"
        )
    seq_len = seq_len_of(train, model.max_seq_len)
    rows = rows_of_step(train, seq_len)
    if rows is None:
        raise ConfigError("a step of all rows has no size before the data are there", fix="plan with mini_batch")
    micro = min(train.micro_batch_rows or rows, rows)
    room = available_bytes()
    guess = "fp32" if train.precision == "auto" else train.precision
    memory = training_bytes(model, train, guess)
    net = build(model, device="meta")
    made = Plan(
        stage, sum(p.numel() for p in net.parameters()), rows * seq_len, train.steps, micro, seq_len, memory, room,
        guess, train.threads or cores(), "off" if train.compile == "auto" else train.compile, 0.0, 0.0,
    )  # fmt: skip
    if not made.fits:
        return replace(made, fixes=tuple(fixes(model, train, guess, room, rows)))
    found = measure(model, train, micro, seq_len, budget)
    flops = micro * cost(net, seq_len).train_flops
    eager = found.at(found.gradient, model.n_layers)
    products = min(flops / found.peaks[f"{found.precision} x {found.threads}"], eager)
    compiled = products + COMPILED_REST * (eager - products)
    parts = -(-rows // micro)
    update = found.at(found.update, model.n_layers)
    looks = -(-train.steps // train.valid_every) * train.valid_batches
    seconds = {}
    for name, gradient in (("off", eager), ("step", compiled)):
        once = 0.0 if name == "off" else COMPILE_SECONDS + COMPILE_SECONDS_PER_LAYER * model.n_layers
        steps = train.steps * (parts * gradient * (rows / (parts * micro)) + update)
        seconds[name] = steps + once + looks * 32 / micro * eager / 3
    choice = train.compile
    if choice == "auto":
        choice = "step" if seconds["step"] < seconds["off"] and not compile_works() else "off"
    gradient = compiled if choice == "step" else eager
    step = parts * gradient * (rows / (parts * micro)) + update
    return replace(
        made,
        memory=training_bytes(model, train, found.precision),
        precision=found.precision,
        threads=found.threads,
        compile=choice,
        tokens_per_second=rows * seq_len / step,
        seconds=seconds[choice],
        peaks=found.peaks,
    )


def compiling_pays(recipe: Recipe, stage: str) -> bool:
    """Whether a stage is long enough to earn back what compilation costs, judged by its matrix products alone."""
    train = settings(recipe, stage)
    try:
        model = model_of(recipe)
    except OctavoError:
        return True
    if train.device != "cpu" or train.update != "mini_batch":
        return True
    seq_len = seq_len_of(train, model.max_seq_len)
    flops = cost(build(model, device="meta"), seq_len).train_flops / seq_len * train.step_tokens * train.steps
    seconds = flops / matmul_peak(DTYPES["fp32" if train.precision == "auto" else train.precision], 0.1)
    return SAVED_OF_PRODUCTS * seconds > COMPILE_SECONDS + COMPILE_SECONDS_PER_LAYER * model.n_layers


def model_of(recipe: Recipe) -> Decoder.Config:
    """The model a recipe trains, its vocabulary filled in from the tokenizer's settings."""
    if isinstance(recipe.model, Pretrained.Config):
        from octavo.hub.folder import model_config, read_config
        from octavo.run import find_model

        refuse_counted(recipe.model.path)
        return model_config(read_config(find_model(recipe.model.path)))
    model = recipe.model
    if model.vocab_size is None:
        size = getattr(recipe.tokenizer, "vocab_size", None)
        if size is None:
            raise ConfigError("the vocabulary's size is not known before the tokenizer is", fix="set model.vocab_size")
        model = model.model_copy(update={"vocab_size": size})
    return model


def refuse_counted(path: str) -> None:
    """Refuse a model that was counted where one to train is asked for; whatever else is wrong is found later.

    Raises:
        UnsupportedError: it has no weights to train.
    """
    from octavo.hub.folder import read_config
    from octavo.predictors.folder import is_counted
    from octavo.run import find_model

    try:
        hf = read_config(find_model(path))
    except OctavoError:
        return
    if is_counted(hf):
        raise UnsupportedError(
            f"{path} is a model of kind {hf['model']['kind']}: it was counted and has no weights to train",
            fix="tune a decoder; count again with other text to change this one",
        )


def measure(model: Decoder.Config, train: TrainConfig, rows: int, seq_len: int, budget: float) -> Rehearsal:
    """The rehearsal in a process of its own, whose memory and settings are its own."""
    asked = {
        "model": model.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "rows": rows,
        "seq_len": seq_len,
        "threads": train.threads or cores(),
        "budget": budget,
    }
    done = subprocess.run(
        [sys.executable, "-m", "octavo.training.rehearse"], input=json.dumps(asked), capture_output=True, text=True
    )
    if done.returncode:
        why = "it was killed, likely out of memory" if done.returncode == -9 else done.stderr.strip().splitlines()[-1:]
        raise ResourceError(
            f"the rehearsal of a training step ended with {done.returncode}: {why}", fix="a smaller step"
        )
    found = json.loads(done.stdout)
    for name in ("gradient", "update", "flops"):
        found[name] = {int(key): value for key, value in found[name].items()}
    return Rehearsal(**found)


def fixes(
    model: Decoder.Config, train: TrainConfig, precision: str, room: int, rows: int
) -> list[tuple[str, int, str]]:
    """Changes that would fit, the cheapest first: (setting, bytes then needed, what it costs)."""
    smaller = []
    n = min(train.micro_batch_rows or rows, rows)
    while n > 1:
        n //= 2
        smaller.append(({"micro_batch_rows": n}, f"train.micro_batch_rows={n}", "nothing: the gradient is the same"))
    one = {"micro_batch_rows": 1}
    chunk = {"objective": train.objective.model_copy(update={"chunk_tokens": 512})}
    tried: list[tuple[dict[str, Any], str, str]] = [
        *smaller,
        (one | chunk, "train.micro_batch_rows=1 train.objective.chunk_tokens=512", "nothing: the loss is the same"),
        (
            one | chunk | {"activation_checkpointing": True},
            "train.micro_batch_rows=1 train.objective.chunk_tokens=512 train.activation_checkpointing=true",
            "a third more time",
        ),
    ]
    if train.optimizer.kind == "adamw":
        from octavo.training.adamw_8bit import AdamW8bit

        light = AdamW8bit.Config(**train.optimizer.model_dump(exclude={"kind"}))
        tried.append(
            (
                one | chunk | {"activation_checkpointing": True, "optimizer": light},
                "train.micro_batch_rows=1 train.objective.chunk_tokens=512 train.activation_checkpointing=true "
                "train.optimizer.kind=adamw_8bit",
                "a third more time, moments rounded to 8 bits",
            )
        )
    found = []
    for changes, words, price in tried:
        needed = training_bytes(model, train.model_copy(update=changes), precision).total
        if needed <= room:
            found.append((words, needed, price))
            break
    return found
