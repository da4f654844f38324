"""THE loop: exact accumulation, update sizes, memory, clipping, one log schema, loss on answers alone."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import SEQ_LEN, VOCAB, first_batch, log_of, packed, tiny, trainer, weights_hash

from octavo.batch import Batch
from octavo.data.chat import Conversation, tokenise
from octavo.data.loader import Loader
from octavo.data.pack import WholeRows
from octavo.metrics_file import read_metrics
from octavo.nn.contracts import Inputs
from octavo.objectives.likelihood import CausalLikelihood
from octavo.tokenizer import Byte, train
from octavo.training.optimizers import OPTIMIZERS

# ---------------------------------------------------------------------------------------- accumulation


@pytest.mark.rows("G1")
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, rows, dtype, tolerance):
    def gradients(micro_batch_rows: int | None) -> tuple[float, dict[str, torch.Tensor]]:
        made = trainer(tmp_path, model=tiny(dropout=0.0), micro_batch_rows=micro_batch_rows)
        made.model.to(dtype)
        loss, _ = made.gradient(first_batch())
        return loss, {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}

    whole_loss, whole = gradients(None)
    loss, parts = gradients(rows)
    assert loss == pytest.approx(whole_loss, abs=tolerance, rel=0)
    assert len(parts) == len(whole) == len(list(tiny().parameters()))
    for name, grad in whole.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(parts[name], grad, atol=tolerance, rtol=0, msg=name)


@pytest.mark.rows("G1", "F8")
def test_the_loss_is_normalised_by_tokens_that_count_not_by_rows(tmp_path):
    model, batch = tiny(dropout=0.0).double(), first_batch()
    per_row = batch.loss_mask.sum(1)
    assert len(set(per_row.tolist())) > 2, "the rows must be uneven for this to say anything"
    logits = model(batch.inputs()).logits
    # The textbook's mean over everything that counts, written without the objective.
    flat = F.cross_entropy(logits[batch.loss_mask > 0], batch.targets[batch.loss_mask > 0])
    made = trainer(tmp_path, model=copy.deepcopy(model).float(), micro_batch_rows=1)
    made.model.double()
    loss, _ = made.gradient(batch)
    assert loss == pytest.approx(flat.item(), abs=1e-12)
    expected = torch.autograd.grad(flat, list(model.parameters()))
    for (name, parameter), grad in zip(made.model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, atol=1e-7, rtol=1e-5, msg=name)  # weights went through fp32


def test_a_step_in_which_nothing_counts_changes_nothing(tmp_path):
    made = trainer(tmp_path)
    batch = first_batch()
    empty = Batch(batch.tokens, batch.targets, batch.loss_mask * 0, batch.doc_ids, batch.positions, batch.valid)
    assert made.gradient(empty) == (0.0, 0.0)
    assert all(not group.total.any() for group in made.optimizer.groups)


# ------------------------------------------------------------------------------------------ update sizes


@pytest.mark.rows("G2")
@pytest.mark.parametrize("rows", [1, 4, None])
def test_every_row_is_seen_once_an_epoch_and_each_epoch_in_another_order(rows):
    data = packed()
    loader = Loader(data, rows, seed=3)
    steps = math.ceil(data.n_rows / loader.rows)

    def seen(first: int) -> list[bytes]:
        batches = [loader.batch(step)["tokens"] for step in range(first, first + 2 * steps)]
        return [row.tobytes() for batch in batches for row in batch]

    given = seen(0)
    epochs = given[: data.n_rows], given[data.n_rows : 2 * data.n_rows]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == data.n_rows
    assert epochs[0] != epochs[1]


@pytest.mark.rows("G2")
def test_a_full_batch_update_does_not_depend_on_the_order(tmp_path):
    """In exact arithmetic a sum has no order; in float64 two orders agree to rounding."""
    gradients = []
    for seed in (1, 2):
        loader = Loader(packed(), None, seed=seed)
        made = trainer(tmp_path, model=tiny(dropout=0.0), source=loader)
        made.model.double()
        batch = Batch.from_numpy(loader.batch(0))
        made.gradient(batch)
        gradients.append((batch.tokens, [p.grad for p in made.model.parameters()]))
    (tokens, first), (other_tokens, second) = gradients
    assert not torch.equal(tokens, other_tokens)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.rows("G2")
def test_per_sample_updates_depend_on_the_order(tmp_path):
    losses = []
    for seed in (1, 2):
        made = trainer(tmp_path / str(seed), source=Loader(packed(), 1, seed=seed), steps=3)
        made.fit()
        losses.append([r["loss"] for r in log_of(made.held.folder) if r["kind"] == "train"])
    assert losses[0] != losses[1]


# -------------------------------------------------------------------------- memory, initialisation, dropout


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of all tensors alive that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.seen:
                    self.seen.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.rows("G4")
def test_activation_checkpointing_keeps_every_gradient_and_needs_less_memory(tmp_path):
    results = {}
    for recompute in (False, True):
        made = trainer(
            tmp_path, model=tiny(dropout=0.2, n_layers=8, tie_embeddings=False), activation_checkpointing=recompute
        )
        made.model.train()
        torch.manual_seed(0)  # dropout must drop the same values again when it is computed again
        with LiveBytes() as live:
            loss, norm = made.gradient(first_batch())
        results[recompute] = (
            loss,
            norm,
            {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None},
            live.peak,
        )
    plain, again = results[False], results[True]
    assert plain[:2] == again[:2]
    for name, grad in plain[2].items():
        assert torch.equal(grad, again[2][name]), name
    assert again[3] < 0.5 * plain[3], f"{again[3]:,} of {plain[3]:,} bytes"


@pytest.mark.rows("G4")
def test_weights_begin_with_a_standard_deviation_of_two_hundredths():
    model = tiny(d_model=128, vocab_size=400, tie_embeddings=False, init={"scale_residual": False})
    tables = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert {"embed.weight", "head.weight"} <= set(tables)
    for name, weight in tables.items():
        assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(weight.mean().item()) < 1e-3, name


@pytest.mark.rows("G4", "B10")
def test_dropout_acts_in_training_only_and_zero_means_none():
    batch = first_batch()
    for dropout, differs in ((0.3, True), (0.0, False)):
        model = tiny(dropout=dropout)
        model.train()
        torch.manual_seed(0)
        one, two = (model(batch.inputs()).logits for _ in range(2))
        assert torch.equal(one, two) is not differs
        model.eval()
        one, two = (model(batch.inputs()).logits for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.rows("T7")
@pytest.mark.parametrize("tied", [False, True])
def test_only_used_rows_of_an_untied_embedding_without_decay_are_updated(tmp_path, tied):
    """E22: true only for a table that is not the head too and that does not decay."""
    model = tiny(tie_embeddings=tied)
    before = model.embed.weight.detach().clone()
    made = trainer(tmp_path, model=model, optimizer={"kind": "adamw", "lr": 1e-2, "weight_decay": 0.0})
    batch = first_batch(1)
    made.gradient(batch)
    made.optimizer.step(1e-2)
    used = torch.zeros(VOCAB, dtype=torch.bool)
    used[batch.tokens[batch.valid & (batch.doc_ids >= 0)]] = True
    assert 0 < int(used.sum()) < VOCAB
    moved = (model.embed.weight.detach() != before).any(1)
    assert moved.all() if tied else not moved[~used].any() and moved.any()


# -------------------------------------------------------------------------------------------- the step


@pytest.mark.rows("G1")
@pytest.mark.parametrize("clip_norm", [0.05, 1e9, None])
def test_the_whole_loop_equals_torchs_own_adamw_and_clipping(tmp_path, clip_norm):
    """A loop written from torch's parts alone, over the same batches, ends in the same weights."""
    decay = {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.3}
    made = trainer(tmp_path, model=tiny(dropout=0.0), clip_norm=clip_norm, optimizer=decay, micro_batch_rows=2)
    twin = tiny(dropout=0.0)
    products = [p for n, p in twin.named_parameters() if p.ndim == 2 and not n.startswith("embed")]
    rest = [p for n, p in twin.named_parameters() if p.ndim != 2 or n.startswith("embed")]
    groups = [{"params": products, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    loader = Loader(packed(), 4, seed=3)
    norms = []
    for step in range(12):
        batch = Batch.from_numpy(loader.batch(step))
        logits = twin(batch.inputs()).logits
        loss = F.cross_entropy(logits[batch.loss_mask > 0], batch.targets[batch.loss_mask > 0])
        reference.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm or math.inf)))
        progress = (step - 2) / 10
        factor = (step + 1) / 3 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in reference.param_groups:
            group["lr"] = 1e-2 * factor
        reference.step()
    made.fit()
    for (name, ours), theirs in zip(made.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0, msg=name)
    logged = [float.fromhex(r["grad_norm"]) for r in log_of(tmp_path) if r["kind"] == "train"]
    assert logged == pytest.approx(norms, rel=1e-3)


def test_clipping_shortens_long_gradients_and_leaves_short_ones(tmp_path):
    moved = {}
    for clip in (0.01, 1e9):
        made = trainer(
            tmp_path / str(clip),
            model=tiny(dropout=0.0),
            steps=1,
            clip_norm=clip,
            schedule="constant",
            optimizer={"kind": "sgd", "lr": 0.5},
        )
        before = torch.cat([p.detach().flatten() for p in made.model.parameters()])
        norm = made.fit()["grad_norm"]
        after = torch.cat([p.detach().flatten() for p in made.model.parameters()])
        moved[clip] = float((after - before).norm()) / 0.5, norm
    assert moved[0.01][0] == pytest.approx(0.01, rel=1e-3) and moved[0.01][1] > 0.1  # logged before clipping
    assert moved[1e9][0] == pytest.approx(moved[1e9][1], rel=1e-4)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(tmp_path, kind):
    made = trainer(tmp_path, model=tiny(dropout=0.0), steps=30, optimizer={"kind": kind}, source=Loader(packed(), None))
    made.fit()
    losses = [float.fromhex(r["loss"]) for r in log_of(tmp_path) if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1


def test_bf16_runs_and_ends_near_fp32(tmp_path):
    ends = {}
    for precision in ("fp32", "bf16"):
        made = trainer(
            tmp_path / precision, model=tiny(dropout=0.0), steps=30, precision=precision, source=Loader(packed(), None)
        )
        assert {p.dtype for p in made.model.parameters()} == {made.dtype}
        assert {g.master.dtype for g in made.optimizer.groups} == {torch.float32}
        made.fit()
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        ends[precision] = [float.fromhex(r["loss"]) for r in log_of(tmp_path / precision) if r["kind"] == "train"]
    assert ends["fp32"][-1] < ends["fp32"][0] - 0.1 and ends["bf16"] != ends["fp32"]
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.01)


def test_a_released_model_is_on_its_own(tmp_path):
    made = trainer(tmp_path, steps=3, precision="bf16")
    made.fit()
    masters = dict(made.optimizer.tensors())
    for name, parameter in made.model.named_parameters():
        master = masters[f"model/{name}"]
        assert torch.equal(parameter, master) and parameter.data_ptr() != master.data_ptr()
        assert parameter.grad is None and parameter.untyped_storage().nbytes() == parameter.numel() * 4
    assert not made.model.training


# --------------------------------------------------------------------------------------------- the log


@pytest.mark.rows("G5")
def test_the_log_has_one_schema(tmp_path):
    def sample() -> list[dict[str, str]]:
        return [{"prompt": "a", "text": "é\n"}, {"prompt": "b", "text": ""}]

    made = trainer(tmp_path, steps=7, log_every=2, valid_every=3, sample_every=5, sample=sample)
    made.held.train_flops_per_token = 1000
    made.fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    found = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid", "sample")}
    assert sum(map(len, found.values())) == len(records)
    assert [r["step"] for r in found["train"]] == [2, 4, 6, 7]
    assert [r["step"] for r in found["valid"]] == [3, 6, 7]
    assert [(r["step"], r["prompt"], r["text"]) for r in found["sample"]] == [
        (5, "a", "é\n"), (5, "b", ""), (7, "a", "é\n"), (7, "b", ""),
    ]  # fmt: skip
    figures = {"loss", "lr", "grad_norm", "spike", "tokens_per_second", "mfu", "seconds"}
    assert all(set(r) == {"kind", "step", "tokens_seen", *figures} for r in found["train"])
    assert all(set(r) == {"kind", "step", "tokens_seen", "loss", "bits_per_byte"} for r in found["valid"])
    loader = Loader(packed(), 4, seed=3)
    seen = np.cumsum([int(loader.batch(step)["valid"].sum()) for step in range(7)]).tolist()
    assert all(r["tokens_seen"] == seen[r["step"] - 1] for r in found["train"] + found["valid"])
    assert all(r["bits_per_byte"] == r["loss"] * 0.5 for r in found["valid"])
    assert [r["lr"] for r in found["train"]] == pytest.approx(
        [1e-2 * made.schedule.factor(r["step"] - 1, 7) for r in found["train"]]
    )


@pytest.mark.rows("G5")
def test_validation_is_the_mean_over_tokens_without_dropout(tmp_path):
    made = trainer(tmp_path, model=tiny(dropout=0.5), micro_batch_rows=1)
    made.model.train()
    total = weight = 0.0
    with torch.no_grad():
        made.model.eval()
        for batch in made.held.valid:
            logits = made.model(batch.inputs()).logits
            here = batch.loss_mask > 0
            total += float(F.cross_entropy(logits[here], batch.targets[here], reduction="sum"))
            weight += int(here.sum())
        made.model.train()
    assert made.validate() == pytest.approx({"loss": total / weight, "bits_per_byte": total / weight * 0.5})
    assert made.model.training


def test_samples_and_validation_do_not_change_the_training(tmp_path):
    logs = []
    for name, every in (("often", 1), ("never", 10**6)):
        made = trainer(
            tmp_path / name, valid_every=every, sample_every=every, save_every=every,
            sample=lambda: [{"prompt": "", "text": str(torch.rand(1))}],
        )  # fmt: skip
        made.fit()
        logs.append(([r for r in log_of(tmp_path / name) if r["kind"] == "train"], weights_hash(made.model)))
    assert logs[0] == logs[1]


# ----------------------------------------------------------------------------------- instruction tuning


@pytest.mark.rows("L1")
def test_only_the_assistants_words_and_the_stop_token_are_learnt():
    tokenizer = train(Byte(), [])
    special = tokenizer.special
    turns = [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes é."), ("user", "ok"), ("assistant", "no")]
    conversation = Conversation([{"role": role, "content": text} for role, text in turns])
    (sample,) = tokenise([conversation], tokenizer, 1000)
    ids, mask = [special.bos], [0]
    for role, text in turns:  # the ChatML form, written out
        head = [special.turn_start, *tokenizer.encode(f"{role}\n")]
        body = [*tokenizer.encode(text), special.turn_end]
        tail = tokenizer.encode("\n")
        ids += [*head, *body, *tail]
        mask += [0] * len(head) + [int(role == "assistant")] * len(body) + [0] * len(tail)
    trained = [i for i, m in zip(sample.ids, sample.loss_mask, strict=True) if m]
    assert list(sample.ids) == ids[: len(sample.ids)] and list(sample.loss_mask) == mask[: len(sample.ids)]
    assert trained == [*tokenizer.encode("Yes é."), special.turn_end, *tokenizer.encode("no"), special.turn_end]
    # Shifted once, in the packing: the loss stands where the token before the learnt one is read.
    rows = WholeRows([(sample.ids, sample.loss_mask)], 128).rows(0, np.arange(1))
    assert rows["targets"][rows["loss_mask"]].tolist() == trained


@pytest.mark.rows("L1")
def test_packed_conversations_are_the_sum_of_separate_ones():
    samples = []
    rng = np.random.default_rng(5)
    for length in (5, 9, 4, 7, 12, 3):
        mask = (rng.random(length) < 0.5).astype(int)
        mask[-1] = 1
        samples.append((rng.integers(0, VOCAB, length).tolist(), mask.tolist()))
    model = tiny(dropout=0.0).double()
    objective = CausalLikelihood()

    def loss_and_gradient(batch: Batch) -> tuple[float, float, list[torch.Tensor]]:
        loss = objective.loss_sum(model(batch.inputs()), batch)
        return (
            float(loss.detach()),
            float(objective.weight(batch)),
            list(torch.autograd.grad(loss, list(model.parameters()))),
        )

    together = WholeRows(samples, SEQ_LEN)
    assert together.n_rows < len(samples)
    whole = loss_and_gradient(Batch.from_numpy(together.rows(0, np.arange(together.n_rows))))
    alone, reference = [], 0.0
    for ids, mask in samples:
        alone.append(loss_and_gradient(Batch.from_numpy(WholeRows([(ids, mask)], len(ids) - 1).rows(0, np.arange(1)))))
        # Written without batch, packing or objective: the conversation as a reader sees it.
        table = model(Inputs(torch.tensor([ids[:-1]]))).logits[0].log_softmax(-1)
        reference -= sum(table[t, ids[t + 1]].item() for t in range(len(ids) - 1) if mask[t + 1])
    assert whole[0] == pytest.approx(sum(a[0] for a in alone), abs=1e-10)
    assert whole[0] == pytest.approx(reference, abs=1e-10)
    assert whole[1] == sum(a[1] for a in alone) == sum(sum(mask[1:]) for _, mask in samples)
    for i, grad in enumerate(whole[2]):
        torch.testing.assert_close(grad, torch.stack([a[2][i] for a in alone]).sum(0), atol=1e-10, rtol=0)
