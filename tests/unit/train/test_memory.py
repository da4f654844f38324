"""What a training takes: buffers to the byte, activations as the real step has them, limits of every kind."""

import errno
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import SEQ_LEN, VOCAB, first_batch, settings, tiny, trainer

from octavo.errors import ResourceError
from octavo.models.decoder import Decoder
from octavo.nn.tables import TOKEN_MIXERS
from octavo.objectives.likelihood import CausalLikelihood
from octavo.training import memory, room
from octavo.training.memory import require, training_bytes
from octavo.training.room import ran_out, told_when_it_runs_out

OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "muon": {"kind": "muon"},
    "sgd": {"kind": "sgd", "momentum": 0.9},
    "adamw_8bit": {"kind": "adamw_8bit"},
}


def counted(model: Decoder, rows: int = 8, **changes: Any) -> memory.Memory:
    config = settings(step_tokens=rows * SEQ_LEN, **changes)
    return training_bytes(model.config, config, config.precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_gradients_and_moments_are_those_of_the_real_buffers(tmp_path, kind, precision):
    changes: dict[str, Any] = {"optimizer": OPTIMIZERS[kind], "precision": precision, "average": {"decay": 0.9}}
    made = trainer(tmp_path, model=tiny(tie_embeddings=False), **changes)
    found = counted(tiny(tie_embeddings=False), **changes)

    def size(tensors: list[torch.Tensor]) -> int:
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())

    groups = made.optimizer.groups
    weights = [t for g in groups for t in (g.master, g.weights)] + made.optimizer.averages
    assert found.weights == size(weights) > 0
    assert found.gradients == size([t for g in groups for t in (g.grads, g.total)]) > 0
    assert found.moments == size([t for state in made.optimizer.state for t in state.values()]) > 0
    assert found.total > found.weights + found.gradients + found.moments + found.activations


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of all tensors alive that were made inside a real step."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held = [t.untyped_storage() for t in known]
        self.seen = {id(storage) for storage in self.held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_rows": 2}, {"activation_checkpointing": True}, {"precision": "bf16"},
     {"objective": {"kind": "causal", "chunk_tokens": 16}}],
    ids=lambda changes: "-".join(changes) or "plain",
)  # fmt: skip
@pytest.mark.parametrize(("n_layers", "dropout"), [(2, 0.0), (7, 0.0), (3, 0.2)])
def test_activations_are_those_alive_in_the_real_step(tmp_path, changes, n_layers, dropout):
    def model() -> Decoder:
        return tiny(dropout=dropout, n_layers=n_layers, d_model=64, tie_embeddings=False)

    config = settings(step_tokens=8 * SEQ_LEN, **changes)
    made = trainer(tmp_path, model=model(), **{k: v for k, v in changes.items() if k != "objective"})
    made.objective = CausalLikelihood(config.objective)
    made.model.train()
    known = [t for g in made.optimizer.groups for t in (g.master, g.weights, g.grads, g.total)]
    batch = first_batch(8)
    parts = list(batch.split(made.config.micro_batch_rows or batch.rows))
    with LiveBytes(known) as live:
        for part in parts[:1]:
            made.forward(part)[0].backward()
    found, _ = memory._activations(model().config, config, made.dtype, config.micro_batch_rows or 8, SEQ_LEN)
    # Rows of the test are packed and padded, which takes a mask; those counted are full.
    assert live.peak * 0.8 < found < live.peak * 1.2


def test_experts_are_counted_with_what_they_hold(tmp_path):
    channel = {"kind": "moe", "n_experts": 16, "d_ff": 64, "selection_bias": True}

    def model(experts: int = 16) -> Decoder:
        block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {**channel, "n_experts": experts}}
        return tiny(blocks={"block": block}, d_model=64)

    config, made = settings(step_tokens=8 * SEQ_LEN), trainer(tmp_path, model=model())
    made.model.train()
    known = [t for g in made.optimizer.groups for t in (g.master, g.weights, g.grads, g.total)]
    with LiveBytes(known) as live:
        made.forward(first_batch(8))[0].backward()
    found, _ = memory._activations(model().config, config, made.dtype, 8, SEQ_LEN)
    assert live.peak * 0.8 < found < live.peak * 1.2
    wide = 2 * sum(p.numel() for p in model(4096).parameters() if p.requires_grad) * 4
    assert not memory._surely_small(model(4096).config, config, 8, 8 * wide)
    assert memory._surely_small(model().config, config, 8, 8 << 30)


@pytest.mark.parametrize("kind", sorted(set(TOKEN_MIXERS) - {"side_by_side"}))
def test_every_mixer_can_be_counted(kind):
    """Without a tensor's memory: what is counted on the meta device has the shapes of the real step."""
    blocks = {"block": {"mixer": {"kind": kind}}}
    assert counted(tiny(blocks=blocks, d_model=32, causal=False)).activations > 0


def test_more_rows_layers_and_words_take_more():
    small = counted(tiny()).activations
    assert counted(tiny(), rows=32).activations > 2 * small
    assert counted(tiny(n_layers=12)).activations > 2 * small
    assert counted(tiny(vocab_size=20 * VOCAB)).activations > 2 * small
    deep = tiny(n_layers=16)
    assert counted(deep, activation_checkpointing=True).activations < counted(deep).activations
    assert counted(deep, micro_batch_rows=1).activations < 0.5 * counted(deep).activations
    assert counted(tiny(), micro_batch_rows=64).activations == small  # no more than there are


def test_a_deep_model_is_counted_from_a_few_layers(monkeypatch):
    found = counted(tiny(n_layers=9)).activations
    monkeypatch.setattr(memory, "LAYERS_COUNTED", 100)
    assert found == pytest.approx(counted(tiny(n_layers=9)).activations, rel=0.02)


# -------------------------------------------------------------------------------------------- limits


def group(folder: Path, limit: str, usage: int, names: tuple[str, str], cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    prefix = "total_" if names[0] == "memory.limit_in_bytes" else ""
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache}\n")


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def test_the_tightest_control_group_counts(tmp_path):
    groups = tmp_path / "groups"
    groups.write_text("9:name=systemd:/\n4:memory:/outer/inner\n")
    group(tmp_path / "memory", "9223372036854771712", 50, V1)
    group(tmp_path / "memory" / "outer", "1000", 700, V1, cache=100)
    group(tmp_path / "memory" / "outer" / "inner", "800", 300, V1)
    assert room._control_group_room(str(groups), str(tmp_path)) == 400
    (tmp_path / "memory" / "outer" / "inner" / V1[1]).write_text("790\n")
    assert room._control_group_room(str(groups), str(tmp_path)) == 10
    (tmp_path / "memory" / "outer" / "inner" / V1[1]).write_text("900\n")
    assert room._control_group_room(str(groups), str(tmp_path)) == 0


def test_the_unified_hierarchy_and_a_container_whose_group_is_mounted_at_the_root(tmp_path):
    groups = tmp_path / "groups"
    groups.write_text("0::/docker/abc\n")
    group(tmp_path, "2000", 500, V2, cache=30)
    assert room._control_group_room(str(groups), str(tmp_path)) == 1530
    group(tmp_path, "max", 500, V2)
    assert room._control_group_room(str(groups), str(tmp_path)) is None
    assert room._control_group_room(str(tmp_path / "none"), str(tmp_path)) is None


def test_what_this_process_may_hold_is_more_than_it_holds():
    assert 50 << 20 < room.held_bytes() < room.available_bytes() < 1 << 50


def test_the_least_room_decides(monkeypatch):
    monkeypatch.setattr(room, "held_bytes", lambda: 7)
    for name, free in (("_free_memory", 300), ("_control_group_room", 200), ("_address_room", None)):
        monkeypatch.setattr(room, name, lambda free=free: free)
    assert room.available_bytes() == 207
    monkeypatch.setattr(room, "_address_room", lambda: 100)
    assert room.available_bytes() == 107


# ------------------------------------------------------------------------------------------ refusing


def asked(monkeypatch, available: int, **changes: Any) -> str:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    config = settings(step_tokens=4096 * SEQ_LEN, **changes)
    return require(tiny().config, config, "fp32", 4096, "train")


def test_what_fits_is_not_spoken_of_and_what_is_tight_is_a_warning(monkeypatch):
    needed = training_bytes(tiny().config, settings(step_tokens=4096 * SEQ_LEN), "fp32").total
    assert asked(monkeypatch, needed + 1) == ""
    tight = asked(monkeypatch, int(needed / 1.1))
    assert tight.startswith("train needs about") and tight.endswith("may run out")


def test_what_cannot_fit_is_refused_with_two_settings_that_make_it_fit(monkeypatch):
    available = 500 << 20
    with pytest.raises(ResourceError) as caught:
        asked(monkeypatch, available)
    assert caught.value.exit_code == 6
    first, second = caught.value.fix.split(" train.activation_checkpointing=true ")
    rows = int(first.split("train.micro_batch_rows=")[1].split()[0])
    config = settings(step_tokens=4096 * SEQ_LEN, micro_batch_rows=rows)
    assert 1 < rows < 4096 and training_bytes(tiny().config, config, "fp32").total <= available and second
    assert asked(monkeypatch, available, micro_batch_rows=rows) == ""


def test_where_the_weights_alone_do_not_fit_a_smaller_model_is_the_fix(monkeypatch):
    with pytest.raises(ResourceError, match="this process may have 10 MiB") as caught:
        asked(monkeypatch, 10 << 20)
    assert "model.d_model" in caught.value.fix and "adamw_8bit" in caught.value.fix


def test_a_small_run_is_not_counted(monkeypatch):
    def count(*_: Any) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(memory, "training_bytes", count)
    monkeypatch.setattr(memory, "available_bytes", lambda: 16 << 30)
    assert require(tiny().config, settings(), "fp32", 8, "train") == ""


# ---------------------------------------------------------------------------------------- running out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_way_of_saying_it_is_understood(error):
    assert ran_out(error)
    told = told_when_it_runs_out("in training", "less", lambda: "step 4")
    with (
        pytest.raises(ResourceError, match=r"memory ran out in training: this process held .* at most") as caught,
        told,
    ):
        raise error
    assert caught.value.exit_code == 6 and caught.value.kept == "step 4" and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space"), ValueError("x")])
def test_other_errors_are_left_as_they_are(error):
    assert not ran_out(error)
    with pytest.raises(type(error)) as caught, told_when_it_runs_out("in training", "less"):
        raise error
    assert caught.value is error


def test_torchs_own_words_are_among_them():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out(caught.value), str(caught.value)


def test_running_out_in_a_step_is_one_line_and_saves_nothing(tmp_path):
    made = trainer(tmp_path, save_every=2)
    real = made.gradient

    def gradient(batch: Any) -> tuple[float, float]:
        if made.step == 5:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(batch)

    made.gradient = gradient  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="memory ran out in training") as caught:
        made.fit()
    assert caught.value.kept == "step-00000004 is the last that was saved"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
