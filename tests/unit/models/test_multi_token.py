"""Multi-token prediction: what each module may see, what it is trained on, and that none is a plain model."""

import pytest
import torch
from training import log_of, tiny, trainer

from octavo import laws
from octavo.batch import Batch
from octavo.errors import UnsupportedError
from octavo.models.cost import cost, predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.objectives.likelihood import CausalLikelihood

pytestmark = pytest.mark.rows("G9")
B, T, V = 2, 9, 17


def config(n_modules: int | None = 2, **more) -> Decoder.Config:
    further = {"n_modules": n_modules} if n_modules else None
    small = {"d_model": 16, "n_layers": 2, "vocab_size": V, "max_seq_len": 16, "multi_token": further}
    return Decoder.Config.model_validate(small | more)


def batch(model_dtype=torch.float64) -> Batch:
    text = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(3))
    doc_ids = torch.tensor([[0] * T, [0] * 4 + [1] * (T - 4)])
    mask = torch.ones(B, T, dtype=model_dtype)
    mask[1, 3] = 0  # the last token of a document foretells nothing
    return Batch(text[:, :-1], text[:, 1:], mask, doc_ids, torch.arange(T).expand(B, T), mask.new_ones(B, T).bool())


def test_a_module_sees_as_far_as_its_embedding_and_no_further():
    model = build(config()).double()
    seen = []
    model.embed.register_forward_hook(lambda m, a, out: seen.append(out.detach().requires_grad_()) or seen[-1])
    further = model(Inputs(torch.randint(V, (1, T))), needs=("multi_token",)).multi_token
    for by, hidden in enumerate(further, 1):
        for t in range(T - by):
            (gradient,) = torch.autograd.grad(hidden[0, t].sum(), seen[0], retain_graph=True)
            reads = gradient[0].abs().sum(-1) > 0
            assert reads[: t + by + 1].all() and not reads[t + by + 1 :].any()


def test_the_loss_is_that_of_the_tokens_further_on_within_documents():
    objective = CausalLikelihood(CausalLikelihood.Config(multi_token_weight=0.3))
    model, rows = build(config()).double(), batch()
    outputs = model(rows.inputs(), needs=(*objective.needs, *objective.training_needs))
    wanted = torch.zeros((), dtype=torch.float64)
    for by, hidden in enumerate(outputs.multi_token, 1):
        logs = model.logits(hidden).log_softmax(-1)
        for row in range(B):
            for t in range(T - by):
                later = t + by
                if rows.doc_ids[row, t] == rows.doc_ids[row, later] and rows.loss_mask[row, later]:
                    wanted -= logs[row, t, rows.targets[row, later]]
    torch.testing.assert_close(objective.beside(outputs, rows)["loss.multi_token"], 0.3 / 2 * wanted)
    chunked = CausalLikelihood(CausalLikelihood.Config(multi_token_weight=0.3, chunk_tokens=3))
    outputs = model(rows.inputs(), needs=(*chunked.needs, *chunked.training_needs))
    torch.testing.assert_close(chunked.beside(outputs, rows)["loss.multi_token"], 0.3 / 2 * wanted)


def test_without_modules_it_is_a_plain_model():
    with_modules, plain = build(config()), build(config(None))
    plain.load_state_dict({k: v for k, v in with_modules.state_dict().items() if not k.startswith("multi_token")})
    tokens = torch.randint(V, (B, T))
    torch.testing.assert_close(with_modules(Inputs(tokens)).logits, plain(Inputs(tokens)).logits, rtol=0, atol=0)
    assert CausalLikelihood().beside(plain(Inputs(tokens)), batch()) == {}


def test_the_model_s_own_loss_reaches_the_modules_only_through_the_beside_loss():
    objective = CausalLikelihood(CausalLikelihood.Config(multi_token_weight=1.0))
    model, rows = build(config()).double(), batch()
    outputs = model(rows.inputs(), needs=(*objective.needs, *objective.training_needs))
    objective.loss_sum(outputs, rows).backward(retain_graph=True)
    assert all(p.grad is None for p in model.multi_token.parameters())
    objective.beside(outputs, rows)["loss.multi_token"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.multi_token.parameters())


def test_counts_and_laws_hold_with_modules():
    model = build(config())
    assert predicted_parameters(model) == cost(model).parameters == sum(p.numel() for p in model.parameters())
    assert cost(model).train_flops > cost(build(config(None))).train_flops
    assert cost(model).forward_flops == cost(build(config(None))).forward_flops
    wrong = [str(result) for result in laws.check(config()) if not result.ok]
    assert not wrong


def test_what_cannot_be_is_refused():
    model = build(config())
    with pytest.raises(UnsupportedError, match="whole texts"):
        model(Inputs(torch.zeros(1, 3, dtype=torch.long)), model.new_state(1), needs=("multi_token",))
    with pytest.raises(ValueError, match="needs a model with multi_token modules"):
        objective = CausalLikelihood(CausalLikelihood.Config(multi_token_weight=1.0))
        objective.beside(build(config(None))(Inputs(torch.zeros(1, 3, dtype=torch.long))), batch())
    with pytest.raises(ValueError, match=r"unknown blocks \['other'\]"):
        config(multi_token={"block": "other"})


def test_training_logs_and_lowers_the_loss_of_the_modules(tmp_path):
    made = trainer(
        tmp_path, model=tiny(multi_token={"n_modules": 1}),
        objective=CausalLikelihood(CausalLikelihood.Config(multi_token_weight=0.3)),
    )  # fmt: skip
    before = [p.clone() for p in made.model.multi_token.parameters()]
    made.fit()
    assert all(not torch.equal(old, new) for old, new in zip(before, made.model.multi_token.parameters(), strict=True))
    told = [float.fromhex(r["loss.multi_token"]) for r in log_of(tmp_path) if r["kind"] == "train"]
    assert len(told) == 12 and told[-1] < told[0]
    assert all("loss.multi_token" not in r for r in log_of(tmp_path) if r["kind"] == "valid")
