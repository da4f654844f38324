"""Do the laws and the parity tests find mistakes? One in each of fifteen classes is planted, one at a time.

A mistake is a substitution in the text of a copy of the package; its anchor must occur exactly once. It is
caught when a test of the properties or of parity fails (not when a test cannot be collected or set up).
"""

from __future__ import annotations

import pytest
from planted import Bug, check_bug, check_control
from planting import Planter

ATTENTION_LAWS = "tests/laws/test_models.py::test_every_mixer_in_every_use[attention]"
OBJECTIVE_LAWS = "tests/laws/test_objectives.py::test_every_objective"
LOADER_LAWS = "tests/laws/test_training.py::test_every_law_on_a_loader"
MICRO_BATCHES = "tests/laws/test_training.py::test_micro_batches_give_the_gradient_of_one_batch[fp32]"
RESUMED = "tests/laws/test_training.py::test_a_resumed_run_is_the_run"
SCHEDULES = "tests/parity/test_optim_parity.py::test_schedules_equal_torch_after_the_warm_up"
LLAMA = "tests/parity/test_hub_parity.py::test_logits_and_every_hidden_state[llama]"
GPT2 = "tests/parity/test_hub_parity.py::test_logits_and_every_hidden_state[gpt2]"
MULTI_HEAD = "tests/parity/test_nn_parity.py::test_multi_head_equals_torch"


BUGS = [
    Bug(
        "causality", "nn/contracts.py",
        "allowed = allowed & (key <= query)", "allowed = allowed & (key <= query + 1)",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "packing", "nn/contracts.py",
        "(key >= 0) & (keys.doc_ids[:, None, :] == self.doc_ids[:, :, None])", "(key >= 0)",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "padding", "nn/state.py",
        "keys = Keys(torch.where(valid, slots, -1), doc_ids)", "keys = Keys(slots, doc_ids)",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "cache", "nn/state.py",
        "torch.where(place_of < self.lengths[:, None], place_of, -1)",
        "torch.where(place_of <= self.lengths[:, None], place_of - 1, -1)",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "rotary offset", "models/decoder.py",
        "scheme.rotation(ctx.positions)", "scheme.rotation(ctx.positions - ctx.positions[:, :1])",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "head order", "nn/attention.py",
        "q = self.q(x).view(B, T, self.n_heads, self.head_dim)",
        "q = self.q(x).view(B, T, self.head_dim, self.n_heads).transpose(2, 3)",
        (MULTI_HEAD, LLAMA),
    ),
    Bug(
        "scale", "nn/attention.py",
        "self.config.scale,\n", "self.config.scale or 1 / self.head_dim,\n",
        (MULTI_HEAD, LLAMA),
    ),
    Bug(
        "norm order", "models/block.py",
        "h = self.norm_in(x) if self.norm_in is not None else x\n"
        "        y, aux = self.mixer(h, ctx, state.layer(name) if state is not None else None)\n",
        "y, aux = self.mixer(x, ctx, state.layer(name) if state is not None else None)\n"
        "        y = self.norm_in(y) if self.norm_in is not None else y\n",
        (LLAMA, GPT2),
    ),
    Bug(
        "tied weights", "models/decoder.py",
        "F.linear(hidden, self.embed.weight, self.head_bias)",
        "F.linear(hidden, self.embed.weight.detach(), self.head_bias)",
        (ATTENTION_LAWS,),
    ),
    Bug(
        "loss shift", "data/pack.py",
        "targets[row, here] = self._tokens[start + 1 : stop]", "targets[row, here] = self._tokens[start : stop - 1]",
        (LOADER_LAWS,),
    ),
    Bug(
        "loss mask", "objectives/likelihood.py",
        "(losses * mask).where(mask != 0, losses.new_zeros(())).sum()", "losses.sum()",
        (OBJECTIVE_LAWS,),
    ),
    Bug(
        "accumulation", "training/loop.py",
        "loss = loss / weight", "loss = loss / float(self.objective.weight(part) + 1e-9)",
        (MICRO_BATCHES,),
    ),
    Bug(
        "schedule", "training/schedule.py",
        "(step - warmup) / max(1, steps - warmup)", "step / steps",
        (SCHEDULES,),
    ),
    Bug(
        "sampler order", "data/permutation.py",
        "keys = _round_keys(key)", "keys = _round_keys(key[:-1])",
        (LOADER_LAWS,),
    ),
    Bug(
        "resume", "training/loop.py",
        'self.optimizer.restore(tensors, state["updates"])\n        self.step,',
        "self.optimizer.restore(tensors, 0)\n        self.step,",
        (RESUMED,),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def planter(tmp_path_factory):
    one = Planter(tmp_path_factory.mktemp("planted"), models=True)
    yield one
    one.close()


def test_without_a_bug_the_same_tests_pass(planter):
    check_control(planter, BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.kind for bug in BUGS])
def test_a_planted_bug_is_caught(bug, planter, record_property):
    record_property("caught", check_bug(planter, bug))


def test_there_is_a_bug_in_each_class():
    assert [bug.kind for bug in BUGS] == [
        "causality", "packing", "padding", "cache", "rotary offset", "head order", "scale", "norm order",
        "tied weights", "loss shift", "loss mask", "accumulation", "schedule", "sampler order", "resume",
    ]  # fmt: skip
