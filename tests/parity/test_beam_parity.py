"""Greedy and beam search against transformers' generate: encoder-decoders and decoders, every way to stop early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from proof import agree
from test_encoder_decoder_parity import stored, texts

from octavo.hub.folder import load_model
from octavo.infer.beam import BeamConfig, beam_search
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig

V, LONGEST = 61, 12


class Bare:
    """What generation asks of a tokenizer; texts are ids."""

    vocab_size = V
    stop_ids = frozenset({1})

    class special:
        bos = eos = None

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def stream(self) -> Bare:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def cut(ids: list[int], begun: int) -> list[int]:
    """What was produced, up to the first end."""
    new = ids[begun:]
    return new[: new.index(1) + 1] if 1 in new else new


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: stored(name, tmp_path_factory.mktemp(name.replace(" ", "_"))) for name in ("t5", "t5 gated", "bart")}


@pytest.mark.rows("A4", "I1")
@pytest.mark.parametrize("name", ["t5", "t5 gated", "bart"])
@torch.no_grad()
def test_greedy_targets_are_those_of_transformers(name, pairs):
    theirs, ours = pairs[name]
    source, valid, _ = texts(5)
    wanted = theirs.generate(
        input_ids=source, attention_mask=valid.long(), do_sample=False, num_beams=1, max_new_tokens=LONGEST,
        eos_token_id=1, pad_token_id=0, repetition_penalty=3.0,  # or random weights repeat one token
    ).tolist()  # fmt: skip
    sources = [row[ok].tolist() for row, ok in zip(source, valid, strict=True)]
    mine = generate(
        ours, Bare(), sources, SamplingConfig(temperature=0, max_new_tokens=LONGEST, repetition_penalty=3.0)
    )
    assert [list(completion.ids) for completion in mine] == [cut(row, 1) for row in wanted]
    assert len({completion.ids for completion in mine}) > 1


CASES = [
    {"num_beams": 3, "length_penalty": 1.0, "early_stopping": False},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": False},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True},
]


@pytest.mark.rows("I2")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
@torch.no_grad()
def test_beams_are_those_of_transformers(name, case, pairs, tmp_path):
    source, valid, _ = texts(5)
    if name == "llama":
        torch.manual_seed(3)
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=V,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        ).eval()
        theirs.save_pretrained(tmp_path)
        ours = load_model(tmp_path)
        source, valid = source.flip(1), valid.flip(1)  # padded before the text, as generation there wants it
    else:
        theirs, ours = pairs[name]
    n = case["num_beams"]
    if name == "bart":  # an end that is likely enough to be met on the way
        theirs.final_logits_bias[0, 1], ours.decoder.head_bias[1] = 2.0, 2.0
    found = theirs.generate(
        input_ids=source, attention_mask=valid.long(), do_sample=False, max_new_tokens=LONGEST, eos_token_id=1,
        pad_token_id=0, num_return_sequences=n, return_dict_in_generate=True, output_scores=True, **case,
    )  # fmt: skip
    begun = source.shape[1] if name == "llama" else 1
    prompts = [row[ok].tolist() for row, ok in zip(source, valid, strict=True)]
    config = BeamConfig(
        n_beams=n, length_penalty=case["length_penalty"], early_stopping=case["early_stopping"], max_new_tokens=LONGEST
    )
    mine = [beam for of_prompt in beam_search(ours, Bare(), prompts, config) for beam in of_prompt]
    assert [list(beam.ids) for beam in mine] == [cut(row, begun) for row in found.sequences.tolist()]
    scores = torch.tensor([beam.score for beam in mine])
    agree("cross_attention", f"transformers generate of {type(theirs).__name__}", scores, found.sequences_scores,
          case=f"beam scores, {case}")  # fmt: skip
    if name == "bart":
        assert {beam.finish_reason for beam in mine} == {"stop", "length"}
