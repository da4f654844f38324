"""How much memory a training takes, before it takes it: counted on tensors without data, compared with what there is.

Weights, gradients and moments are counted exactly, from the optimizer's own buffers on torch's meta device. The
activations are those that live at the worst moment of forward and backward pass of one micro-batch, followed tensor by
tensor in the same way. What the allocator loses between blocks was measured (benchmarks/memory.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.batch import Batch
from octavo.errors import ResourceError
from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.kernels import attention
from octavo.objectives.tables import OBJECTIVES
from octavo.training.loop import recompute_blocks
from octavo.training.machine import DTYPES
from octavo.training.optimizers import OPTIMIZERS
from octavo.training.room import available_bytes, gib
from octavo.training.settings import TrainConfig

__all__ = ["Memory", "available_bytes", "require", "training_bytes"]

# Python, torch and this library before anything is trained.
BASE_BYTES = 330 << 20
# Resident memory over live bytes: freed blocks between kept ones, packed copies inside matrix products.
LOSS_BETWEEN_BLOCKS = 1.35
# In recomputed blocks each kept input lies in a hole that a wide temporary left and no longer fits into.
HOLES_OF_RECOMPUTING = 2.0
REFUSED_ABOVE = 1.15  # of what there is: the estimate itself is only good to a fifth
LAYERS_COUNTED = 3  # of each kind; the others take as much as the last of these


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run at its worst moment.

    weights: in the model and their fp32 masters, averages included. total: all of these, the process itself and
    what the allocator loses.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    total: int


def training_bytes(model: Decoder.Config, config: TrainConfig, precision: str, rows: int | None = None) -> Memory:
    """What training ``model`` takes.

    Args:
        model: with its vocabulary's size.
        config: of the training; micro_batch_rows, or the rows of a step, are what is computed at once.
        precision: fp32 or bf16.
        rows: of a step, where the data decide it (``full_batch``).
    """
    seq_len = config.seq_len or min(model.max_seq_len, config.step_tokens)
    of_step = rows or (1 if config.update == "per_sample" else max(1, config.step_tokens // seq_len))
    at_once = min(config.micro_batch_rows or of_step, of_step)
    dtype = DTYPES[precision]
    with torch.device("meta"):
        net = build(model, device="meta")
        make = OPTIMIZERS[config.optimizer.kind]
        optimizer = make(config.optimizer, net, dtype, config.average)
    masters = [group.master for group in optimizer.groups]
    weights = _size([*masters, *(group.weights for group in optimizer.groups), *optimizer.averages])
    gradients = _size([tensor for group in optimizer.groups for tensor in (group.grads, group.total)])
    moments = _size([tensor for state in optimizer.state for tensor in state.values()])
    live, holes = _activations(model, config, dtype, at_once, seq_len)
    resident = int(live * LOSS_BETWEEN_BLOCKS) + holes
    # While the buffers are made, and when the weights are given back at the end, the weights are there twice.
    total = BASE_BYTES + weights + gradients + moments + max(resident, _size(masters))
    return Memory(weights, gradients, moments, resident, total)


def _size(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _activations(
    model: Decoder.Config, config: TrainConfig, dtype: torch.dtype, rows: int, seq_len: int
) -> tuple[int, int]:
    """Bytes of live tensors at the worst moment of a micro-batch, and those of holes between them.

    A deep model is counted with a few layers and with one more of each kind: the rest is that difference.
    """
    if isinstance(model, EncoderDecoder.Config):
        return _count(model, config, dtype, rows, seq_len)
    n = len(model.pattern or model.blocks)
    few, more = n * (LAYERS_COUNTED - 1), n * LAYERS_COUNTED
    if model.n_layers <= more:
        return _count(model, config, dtype, rows, seq_len)
    low = _count(model.model_copy(update={"n_layers": few}), config, dtype, rows, seq_len)
    high = _count(model.model_copy(update={"n_layers": more}), config, dtype, rows, seq_len)
    times = (model.n_layers - more) / n
    return tuple(int(b + times * (b - a)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def _count(model: Decoder.Config, config: TrainConfig, dtype: torch.dtype, rows: int, seq_len: int) -> tuple[int, int]:
    objective = OBJECTIVES[config.objective.kind](config.objective)
    with torch.device("meta"):
        net = build(model, device="meta").to(dtype).train()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if config.activation_checkpointing:
            recompute_blocks(net)
        ids, ones = torch.zeros(rows, seq_len, dtype=torch.long), torch.ones(rows, seq_len)
        batch = Batch(ids, ids, ones, ids, ids, ones.bool(), objective.extra(net.config, rows, seq_len))
        live = _Live([*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)])
        for block in net.blocks:
            block.register_forward_pre_hook(lambda *_: live.enter(+1))
            block.register_forward_hook(lambda *_: live.enter(-1))
        with live, _fused_attention(config):
            outputs = net(batch.inputs(), needs=(*objective.needs, *objective.training_needs))
            sum(objective.beside(outputs, batch).values(), objective.loss_sum(outputs, batch)).backward()
    # One block as large as the largest lies free in pieces: the next of that size does not fit into them.
    holes = live.largest
    if config.activation_checkpointing:
        holes += int(len(net.stack()) * live.widest * HOLES_OF_RECOMPUTING)
    return live.peak, holes


class _Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive, the most at once; the largest, and the widest of a block."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.largest = self.widest = self.depth = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # views of these are no new memory
        self._seen = {id(storage) for storage in self._known}

    def enter(self, by: int) -> None:
        self.depth += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                key, size = id(storage), storage.nbytes()
                self._seen.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
                self.largest = max(self.largest, size)
                if self.depth:
                    self.widest = max(self.widest, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextlib.contextmanager
def _fused_attention(config: TrainConfig) -> Iterator[None]:
    """Inside, attention on tensors without data holds no scores, as on the CPU, where under dropout that is true of our
    own kernel only; of itself torch's meta device takes the form that holds them."""
    real, own = F.scaled_dot_product_attention, config.attention != "sdpa" and attention.available()

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, dropout_p: float = 0.0, **named: Any) -> Tensor:
        if q.device.type != "meta" or (dropout_p and not own):
            return real(q, k, v, *rest, dropout_p=dropout_p, **named)
        return _Attend.apply(q, k, v)  # type: ignore[return-value]

    F.scaled_dot_product_attention = attend  # not a TorchFunctionMode: recomputing in the backward pass has none
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


# ------------------------------------------------------------------------------------------ refusing


def require(model: Decoder.Config, config: TrainConfig, precision: str, rows: int, section: str) -> str:
    """Compare what a training takes with what there is, before it begins.

    Args:
        rows: of a step.
        section: of the recipe, for the words of the fix.

    Returns:
        A warning where it will be tight, else nothing.

    Raises:
        ResourceError: it cannot fit; the fix names the two settings to change, and what is needed then.
    """
    room = available_bytes()
    if _surely_small(model, config, rows, room):
        return ""

    def needed(**changes: Any) -> Memory:
        return training_bytes(model, config.model_copy(update=changes), precision, rows)

    memory = needed()
    if memory.total <= room:
        return ""
    what = f"{section} needs about {gib(memory.total)} of memory, and this process may have {gib(room)}"
    if memory.total <= REFUSED_ABOVE * room:
        return f"{what}: it may run out"
    if memory.total - memory.activations > room:
        light = f", and use {section}.optimizer.kind=adamw_8bit" if config.optimizer.kind == "adamw" else ""
        fix = f"lower model.d_model or model.n_layers{light}"
        raise ResourceError(what, fix=fix, kept="nothing of this stage was begun")
    at_once = min(config.micro_batch_rows or rows, rows)
    smaller = memory.total
    fitting = (room - smaller + memory.activations) * at_once // memory.activations  # rows take nearly equal shares
    while at_once > 1 and smaller > room:
        at_once //= 2
        if at_once <= max(1, fitting):
            smaller = needed(micro_batch_rows=at_once).total
    fixes = [f"{section}.micro_batch_rows={at_once} ({gib(smaller)} then)"]
    if not config.activation_checkpointing:
        recomputed = needed(activation_checkpointing=True).total
        word = "or" if recomputed <= room else "and, if that is not enough,"
        fixes.append(f"{word} {section}.activation_checkpointing=true ({gib(recomputed)} alone)")
    raise ResourceError(what, fix=" ".join(fixes), kept="nothing of this stage was begun")


def _surely_small(model: Decoder.Config, config: TrainConfig, rows: int, room: int) -> bool:
    """Whether a bound that is far too high fits: it spares a small run the counting."""
    seq_len = config.seq_len or min(model.max_seq_len, config.step_tokens)
    D, V, n = model.d_model, model.vocab_size or 1 << 18, model.n_layers
    with torch.device("meta"):
        net = build(model.model_copy(update={"vocab_size": V}), device="meta")
    parameters = sum(p.numel() for p in net.parameters())
    widths = sum(mixer.flops(1, 1) for mixer in net.mixers().values()) // (2 * D)  # of a token's products, all layers
    per_token = n * (200 * D + 8 * seq_len * D // 16) + 16 * widths + 16 * V
    return room > 1 << 30 and BASE_BYTES + 32 * parameters + 8 * per_token * rows * seq_len < room // 4
