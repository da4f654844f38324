"""R19, instruction tuning: whatever the rows are, what is trained is counted, finite and equal to a reference.

The reference knows nothing of packing, padding or batches: it writes each conversation's tokens down itself, gives
them alone to the model in float64, and sums the negative log-probabilities of the answers' tokens.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxed import SCALE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.batch import Batch
from octavo.data import chat
from octavo.data.loader import Loader, sweep
from octavo.data.pack import WholeRows
from octavo.errors import DataError
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.objectives.likelihood import CausalLikelihood
from octavo.tokenizer import Byte, Tokenizer, train

FILES, MASKS = 150 * SCALE, 150 * SCALE
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
PAD, BOS, EOS, START, END = range(5)
TOKENIZER: Tokenizer = train(Byte(), [])
assert (TOKENIZER.special.pad, TOKENIZER.special.bos, TOKENIZER.special.turn_end) == (PAD, BOS, END)


def model(vocab_size: int = TOKENIZER.vocab_size) -> Decoder:
    block = {"mixer": {"n_heads": 2}, "channel": {"kind": "glu", "d_ff": 16}}
    config = {"d_model": 16, "n_layers": 2, "max_seq_len": 64, "vocab_size": vocab_size, "blocks": {"block": block}}
    return build(Decoder.Config.model_validate(config), seed=3)


def reference(samples: list[tuple[list[int], list[int]]], vocab_size: int) -> tuple[float, int, np.ndarray]:
    """Summed loss, trained tokens and the gradient of the mean, in float64, one sample at a time."""
    exact = model(vocab_size).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in samples:
        if len(ids) < 2:
            continue
        logits = exact(Inputs(torch.tensor([ids[:-1]]))).logits[0]
        for place in range(len(ids) - 1):
            if mask[place + 1]:
                row = logits[place]
                top = row.max()
                total = total + (top + (row - top).exp().sum().log()) - row[ids[place + 1]]
                count += 1
    if count:
        (total / count).backward()
    gradient = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in exact.parameters()]
    return float(total.detach()), count, torch.cat(gradient).numpy()


def trained(packed: WholeRows, rows: int, vocab_size: int) -> tuple[float, int, np.ndarray]:
    """The same of a whole pass through the packing, the loader, the batches and the objective, in float32."""
    one, objective = model(vocab_size), CausalLikelihood()
    total, weight = 0.0, 0.0
    batches = [Batch.from_numpy(arrays) for arrays in sweep(packed, rows)]
    first = Loader(packed, min(rows, packed.n_rows), shuffle=False).batch(0)
    assert all(np.array_equal(first[name], next(sweep(packed, rows))[name]) for name in first)
    whole = sum(float(objective.weight(batch)) for batch in batches)
    for batch in batches:
        loss = objective.loss_sum(one(batch.inputs()), batch)
        assert math.isfinite(float(loss.detach()))
        (loss / whole).backward()
        total, weight = total + float(loss.detach()), weight + float(objective.weight(batch))
    return total, int(weight), torch.cat([p.grad.flatten() for p in one.parameters()]).numpy()


def differences(found: tuple[float, int, np.ndarray], expected: tuple[float, int, np.ndarray]) -> str:
    if found[1] != expected[1]:
        return f"{found[1]} tokens are trained, {expected[1]} should be"
    if not math.isclose(found[0], expected[0], rel_tol=1e-5):
        return f"the loss is {found[0]}, {expected[0]} by the reference"
    distance = float(np.linalg.norm(found[2] - expected[2]) / max(np.linalg.norm(expected[2]), 1e-12))
    return f"the gradient is {distance:.1e} away" if distance > 1e-4 else ""


# ------------------------------------------------------------------------------------- whole files


def spelled(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens and mask of a conversation, by hand: what the assistant says and the end of its turn is trained."""
    ids, mask = [BOS], [0]
    for message in messages:
        opening = [START, *(5 + byte for byte in f"{message['role']}\n".encode())]
        content = [*(5 + byte for byte in message["content"].encode()), END]
        ids += [*opening, *content, 5 + 10]
        mask += [0] * len(opening) + [int(message["role"] == "assistant")] * len(content) + [0]
    return ids, mask


def useful(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The part of a conversation that is trained on; None where a row is counted as useless."""
    kept = list(messages)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    answers = [m for m in kept if m["role"] == "assistant"]
    if not answers or not all(m["content"].strip() for m in answers):
        return None
    return kept if any(m["role"] == "user" and m["content"].strip() for m in kept) else None


contents = st.sampled_from(
    ["", " ", "\n", "4", "It is 4.", "你好", "<|im_end|>", "assistant\n", "x" * 90, "a b c " * 9, "\u200b"]
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": contents})
conversations = st.one_of(
    st.lists(turns, min_size=1, max_size=5),
    st.tuples(contents, contents).map(
        lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    ),
)


def check_file(path: Path, told: list[list[dict[str, str]]], seq_len: int, rows: int) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in told), encoding="utf-8")
    expected, cut, gone = [], 0, 0
    for messages in filter(None, map(useful, told)):
        ids, mask = spelled(messages)
        cut += any(mask[seq_len + 1 :])
        if any(mask[1 : seq_len + 1]):
            expected.append((ids[: seq_len + 1], mask[: seq_len + 1]))
        else:
            gone += 1
    report = chat.ChatReport()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read = chat.read(chat.ChatConfig(paths=(str(path),)), report)
            samples = chat.tokenise(read, TOKENIZER, seq_len + 1, report)
        except DataError as error:
            assert not expected, f"{len(expected)} rows could be trained on: {error}"
            assert "no conversation" in str(error), error
            return
    useless = sum(useful(messages) is None for messages in told)
    assert report.rows == len(told) and report.kept == len(told) - useless
    assert report.truncated_answers == cut and sum(report.dropped.values()) == useless + gone, report
    said = " ".join(str(one.message) for one in caught)
    assert ("were dropped" in said) == (useless + gone > 0), said
    packed = WholeRows([(s.ids, s.loss_mask) for s in samples], seq_len, pad=PAD)
    assert packed.report().dropped == 0 and packed.report().samples == len(expected)
    assert [(s.ids.tolist(), s.loss_mask.tolist()) for s in samples] == expected, "other tokens are trained"
    assert report.trained_tokens == packed.report().targets == sum(sum(mask[1:]) for _, mask in expected)
    found = differences(trained(packed, rows, TOKENIZER.vocab_size), reference(expected, TOKENIZER.vocab_size))
    assert not found, found


def test_what_is_trained_of_a_file_is_what_the_reference_trains(tmp_path, record):
    tried, failures = 0, []

    @settings(max_examples=FILES, **QUIET)
    @given(
        st.lists(conversations, min_size=1, max_size=4).filter(lambda told: bool(told[0])),
        st.integers(2, 48),
        st.integers(1, 3),
    )
    def holds(told, seq_len, rows):
        nonlocal tried
        tried += 1
        usual = [messages for messages in told if messages]
        check_file(tmp_path / "told.jsonl", usual, seq_len, rows)

    try:
        holds()
    except AssertionError as error:
        failures = [str(error)[:500]]
    record("R19", tried, failures, seed="derandomized", method="sft", what="files")


FIXED: dict[str, list[list[dict[str, Any]]]] = {
    "only system": [[{"role": "system", "content": "Be brief."}]],
    "only user": [[{"role": "user", "content": "2+2?"}]],
    "an empty assistant": [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": ""}]],
    "an assistant of white space": [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " \n"}]],
    "an empty user": [[{"role": "user", "content": ""}, {"role": "assistant", "content": "4"}]],
    "only assistant": [[{"role": "assistant", "content": "4"}]],
    "system and assistant": [[{"role": "system", "content": "x"}, {"role": "assistant", "content": "4"}]],
    "an answer of one token": [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]],
    "two answers in turn": [[{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2]],
    "a question behind the last answer": [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ],
    "an answer that is cut": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 200}]],
    "a question that leaves no room": [[{"role": "user", "content": "a" * 200}, {"role": "assistant", "content": "b"}]],
    "an answer that spells the end": [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_end|>"}]
    ],
    "an answer that spells padding": [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|pad|>" * 3}]
    ],
}


@pytest.mark.parametrize("name", FIXED)
def test_edge_rows_alone_and_among_others(name, tmp_path, record):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    failures = []
    for told in (FIXED[name], [good, *FIXED[name]], [*FIXED[name], good, good]):
        try:
            check_file(tmp_path / "told.jsonl", told, 40, 2)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    record("R19", 3, failures, method="sft", what="edge rows")


# ------------------------------------------------------------------------------------- masks alone


def test_random_masks_are_packed_as_the_reference_counts_them(record):
    """Samples with any mask: nothing to learn, all of it, one token, only the first, longer than a row."""
    failures = []
    vocab_size = 23
    for number in range(MASKS):
        chance = random.Random(number)
        seq_len = chance.randint(1, 12)
        samples = []
        for _ in range(chance.randint(1, 9)):
            n = chance.choice([1, 1, 2, seq_len, seq_len + 1, seq_len + 2, chance.randint(1, 25)])
            ids = [chance.randrange(vocab_size) for _ in range(n)]  # padding's id among them
            kind = chance.randrange(5)
            mask = (
                [[0] * n, [1] * n, [1] + [0] * (n - 1), [0] * (n - 1) + [1]][kind]
                if kind < 4
                else chance.choices([0, 1], k=n)
            )
            samples.append((ids, mask))
        kept = [(ids[: seq_len + 1], mask[: seq_len + 1]) for ids, mask in samples if any(mask[1 : seq_len + 1])]
        try:
            packed = WholeRows(samples, seq_len)
        except DataError as error:
            if kept:
                failures.append(f"{number}: refused although {len(kept)} samples can be trained on: {error}")
            continue
        report = packed.report()
        long = sum(len(ids) > seq_len + 1 for ids, _ in samples)
        if (report.samples, report.dropped, report.truncated) != (len(samples), len(samples) - len(kept), long):
            failures.append(f"{number}: counted {report}")
        found = differences(trained(packed, chance.randint(1, 3), vocab_size), reference(kept, vocab_size))
        if found:
            failures.append(f"{number}: {found}")
    record("R19", MASKS, failures, seed="0 and on", method="sft", what="masks")


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_batch_without_a_target_costs_nothing_and_is_finite(chunk, record):
    """All padding, or all masks zero, even where the model's loss there is infinite."""
    failures = []
    for name, valid in (("masks of zero", True), ("all padding", False)):
        one, objective = model(23), CausalLikelihood(CausalLikelihood.Config(chunk_tokens=chunk))
        shape = (2, 5)
        batch = Batch(
            torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape),
            torch.full(shape, 0 if valid else -1), torch.zeros(shape, dtype=torch.long), torch.full(shape, valid),
        )  # fmt: skip
        with torch.no_grad():
            one.embed.weight[0, 0] = 1e30
        loss = objective.loss_sum(one(batch.inputs(), needs=objective.needs), batch)
        if float(objective.weight(batch)) != 0 or float(loss) != 0:
            failures.append(f"{name}: weight {float(objective.weight(batch))}, loss {float(loss)}")
    record("R19", 2, failures, method="sft", what="empty batches")


def test_padding_that_is_a_stop_token_still_teaches_to_stop(record):
    """The mask comes from lengths, not from ids: a tokenizer whose pad is its eos trains eos like any token."""
    samples = [([1, 7, 8, EOS], [0, 0, 1, 1]), ([1, 9, EOS], [0, 1, 1])]
    found = differences(trained(WholeRows(samples, 6, pad=EOS), 2, 23), reference(samples, 23))
    record("R19", 1, [found] if found else 0, method="sft", what="pad is eos")
