"""minimind's three generations against a small reference of their mathematics, and against transformers' classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from family_checks import T, V, check_greedy, close, in_parts, read_there, some_tokens
from safetensors.torch import save_file

from octavo.errors import CheckpointError
from octavo.hub.folder import load_model, read_config, save_model
from octavo.nn.contracts import Inputs

D, N, H, G = 32, 3, 4, 2
GLU = ("gate", "up", "down")
MOE = {"use_moe": False, "num_experts_per_tok": 2, "norm_topk_prob": True}
COMMON = {"model_type": "minimind", "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
          "flash_attn": True, **MOE}  # fmt: skip
NEW = {**COMMON, "hidden_size": D, "num_hidden_layers": N, "num_attention_heads": H, "num_key_value_heads": G,
       "hidden_act": "silu", "intermediate_size": 48, "max_position_embeddings": 64, "rope_theta": 1e6,
       "inference_rope_scaling": False, "rope_scaling": None}  # fmt: skip
OLD = {**COMMON, "dim": D, "n_layers": N, "n_heads": H, "n_kv_heads": G, "hidden_dim": None, "multiple_of": 16,
       "max_seq_len": 64, "norm_eps": 1e-5}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "first": OLD,
    "first, later theta": OLD | {"rope_theta": 1e6, "hidden_dim": 40, "n_kv_heads": None},
    "second": NEW | {"rms_norm_eps": 1e-5, "n_routed_experts": 4, "scoring_func": "softmax"},
    "third": NEW | {"rms_norm_eps": 1e-6, "head_dim": 12, "num_experts": 4},
    "third untied": NEW | {"rms_norm_eps": 1e-6, "head_dim": 8, "tie_word_embeddings": False, "num_experts": 4},
    "second experts": NEW | {
        "rms_norm_eps": 1e-5, "use_moe": True, "n_routed_experts": 4, "n_shared_experts": 2, "scoring_func": "softmax",
        "aux_loss_alpha": 0.1, "seq_aux": True},
    "second experts, one each": NEW | {
        "rms_norm_eps": 1e-5, "use_moe": True, "n_routed_experts": 3, "n_shared_experts": 0, "num_experts_per_tok": 1,
        "scoring_func": "softmax"},
    "third experts": NEW | {
        "rms_norm_eps": 1e-6, "head_dim": 12, "use_moe": True, "num_experts": 5, "moe_intermediate_size": 24,
        "router_aux_loss_coef": 5e-4},
}  # fmt: skip


class Reference:
    """Plain products over the tensors as they are stored; one row of tokens at a time, no cache, no mask."""

    def __init__(self, name: str):
        self.hf, self.first, self.normed = CONFIGS[name], name.startswith("first"), name.startswith("third")
        self.tied = name != "third untied"
        self.K = self.hf.get("head_dim", D // H)
        self.G = self.hf.get("n_kv_heads", self.hf.get("num_key_value_heads")) or H
        width = self.hf.get("hidden_dim", self.hf.get("intermediate_size")) or math.ceil(int(8 * D / 3) / 16) * 16
        self.eps = self.hf.get("norm_eps", self.hf.get("rms_norm_eps"))
        generator = torch.Generator().manual_seed(5)
        self.tensors: dict[str, torch.Tensor] = {}

        self.experts = self.hf.get("num_experts", self.hf.get("n_routed_experts")) if self.hf["use_moe"] else 0
        self.shared = self.hf.get("n_shared_experts", 0) if self.hf["use_moe"] else 0
        one = self.hf.get("moe_intermediate_size", width)

        def add(key: str, *shape: int) -> None:
            start = 1.0 if "norm" in key else 0.0
            spread = 0.6 if "mlp.gate.weight" in key else 0.2
            self.tensors[key] = torch.randn(*shape, generator=generator) * spread + start

        names = self.names
        add(names["embed"], V, D)
        for i in range(N):
            for part, rows, columns in [("q", H * self.K, D), ("k", self.G * self.K, D), ("v", self.G * self.K, D),
                                        ("o", D, H * self.K), ("gate", width, D), ("up", width, D),
                                        ("down", D, width)]:  # fmt: skip
                if not self.experts or len(part) == 1:
                    add(names[part].format(i), rows, columns)
            root = f"model.layers.{i}.mlp"
            if self.experts:
                add(f"{root}.gate.weight", self.experts, D)
            for mlp, wide in [
                *((f"{root}.experts.{e}", one) for e in range(self.experts)),
                *((f"{root}.shared_experts.{e}", width) for e in range(self.shared)),
            ]:
                for part, rows, columns in (("gate", wide, D), ("up", wide, D), ("down", D, wide)):
                    add(f"{mlp}.{part}_proj.weight", rows, columns)
            for part in ("norm1", "norm2"):
                add(names[part].format(i), D)
            for part in ("q_norm", "k_norm") if self.normed else ():
                add(names[part].format(i), self.K)
        add(names["norm"], D)
        if not self.tied:
            add(names["head"], V, D)

    @property
    def names(self) -> dict[str, str]:
        if self.first:
            a, f = "layers.{}.attention.w", "layers.{}.feed_forward.w"
            return {"embed": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight",
                    **{p: f"{a}{p}.weight" for p in "qkvo"}, "gate": f"{f}1.weight", "down": f"{f}2.weight",
                    "up": f"{f}3.weight", "norm1": "layers.{}.attention_norm.weight",
                    "norm2": "layers.{}.ffn_norm.weight"}  # fmt: skip
        root = "model.layers.{}."
        return {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
                **{p: f"{root}self_attn.{p}_proj.weight" for p in "qkvo"},
                **{p: f"{root}mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
                **{f"{p}_norm": f"{root}self_attn.{p}_norm.weight" for p in "qk"},
                "norm1": f"{root}input_layernorm.weight",
                "norm2": f"{root}post_attention_layernorm.weight"}  # fmt: skip

    def weight(self, part: str, layer: int = 0) -> torch.Tensor:
        return self.tensors[self.names[part].format(layer)]

    def normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * weight

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, heads, K) as complex numbers: neighbours in the first generation, halves after it."""
        theta = self.hf.get("rope_theta", 1e4)
        rate = theta ** (-torch.arange(0, self.K, 2).double() / self.K)
        angle = torch.arange(len(x)).double()[:, None, None] * rate
        wide = x.double()
        pairs = (wide[..., ::2], wide[..., 1::2]) if self.first else wide.chunk(2, -1)
        turned = torch.complex(*pairs) * torch.polar(torch.ones_like(angle), angle)
        if self.first:
            return torch.view_as_real(turned).flatten(-2).float()
        return torch.cat([turned.real, turned.imag], -1).float()

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (T, V) and the N + 1 hidden states of one row."""
        n = len(tokens)
        x = self.weight("embed")[tokens]
        states = [x]
        for i in range(N):
            h = self.normalise(x, self.weight("norm1", i))
            q, k, v = ((h @ self.weight(p, i).T).view(n, -1, self.K) for p in "qkv")
            if self.normed:
                q, k = (self.normalise(y, self.weight(p, i)) for y, p in ((q, "q_norm"), (k, "k_norm")))
            q, k = self.turn(q), self.turn(k)
            heads = []
            for head in range(H):
                group = head * self.G // H
                scores = q[:, head] @ k[:, group].T / math.sqrt(self.K)
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
                heads.append(scores.softmax(-1) @ v[:, group])
            x = x + torch.cat(heads, -1) @ self.weight("o", i).T
            h = self.normalise(x, self.weight("norm2", i))
            x = x + (self.mixture(h, i) if self.experts else self.glu(h, *(self.weight(p, i) for p in GLU)))
            states.append(x)
        states[-1] = self.normalise(x, self.weight("norm"))
        return states[-1] @ self.weight("embed" if self.tied else "head").T, states

    def glu(self, h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def mixture(self, h: torch.Tensor, layer: int) -> torch.Tensor:
        """Token by token: the k best of a softmax, weighted by their share of each other; then those for all."""
        root, k = f"model.layers.{layer}.mlp", self.hf["num_experts_per_tok"]
        mlps = {name: [self.tensors[f"{root}.{name}.{p}_proj.weight"] for p in GLU]
                for name in [*(f"experts.{e}" for e in range(self.experts)),
                             *(f"shared_experts.{e}" for e in range(self.shared))]}  # fmt: skip
        rows = []
        for token in h:
            scores = (self.tensors[f"{root}.gate.weight"] @ token).softmax(-1)
            best = scores.sort(descending=True).indices[:k].tolist()
            # The second generation leaves a single score as it is.
            total = sum(scores[e] for e in best) if self.normed or k > 1 else 1.0
            y = sum(scores[e] / total * self.glu(token, *mlps[f"experts.{e}"]) for e in best)
            rows.append(y + sum(self.glu(token, *mlps[f"shared_experts.{e}"]) for e in range(self.shared)))
        return torch.stack(rows)

    def save(self, folder: Path, **changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf | changes))
        save_file(self.tensors, folder / "model.safetensors")
        return folder


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    theirs = Reference(request.param)
    return theirs, load_model(theirs.save(tmp_path / "theirs"))


@pytest.mark.rows("A9")
@torch.no_grad()
def test_logits_and_every_hidden_state(pair):
    theirs, ours = pair
    tokens = some_tokens()
    out = ours(Inputs(tokens), needs=("logits", "hidden_states"))
    for row in range(3):
        logits, states = theirs(tokens[row])
        for got, wanted in zip((out.logits, *out.hidden_states), (logits, *states), strict=True):
            close(got[row], wanted)
    assert float(logits.std()) > 0.5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows(pair, side):
    theirs, ours = pair
    tokens = some_tokens()
    for n in (T, T - 5, 2):
        kept = slice(0, n) if side == "right" else slice(T - n, T)
        valid = torch.zeros(1, T, dtype=torch.bool)
        valid[:, kept] = True
        close(ours(Inputs(tokens[:1], valid=valid)).logits[0, kept], theirs(tokens[0, kept])[0])


@torch.no_grad()
def test_cached_decoding(pair):
    theirs, ours = pair
    tokens = some_tokens(1)
    close(in_parts(ours, tokens, [5, 1, 1, 2, 1, 2])[0], theirs(tokens[0])[0])


CLASSES = {
    "second": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "third": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "third untied": (transformers.Qwen3Config, {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_it_is_a_class_of_transformers_under_another_name(name, tmp_path):
    """The names of the tensors are the same too: the project itself publishes its models so."""
    theirs = Reference(name)
    kind, more = CLASSES[name]
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings", "rope_theta", "rms_norm_eps")  # fmt: skip
    shape = {key: theirs.hf[key] for key in keys if key in theirs.hf}
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape, **more, pad_token_id=None)).eval()
    missing, unexpected = model.load_state_dict(theirs.tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    tokens = some_tokens()
    close(load_model(theirs.save(tmp_path / "m"))(Inputs(tokens)).logits, model(tokens).logits)


@pytest.mark.rows("A9")
@torch.no_grad()
def test_saved_here_it_loads_there(pair, tmp_path):
    """The second generation as Llama, the third as Qwen3 or Qwen3-MoE. The first turns other channels, and the second
    has shared experts of its own kind: they stay in our layout."""
    theirs, ours = pair
    family = save_model(ours, tmp_path / "ours")
    tokens = some_tokens()
    close(load_model(tmp_path / "ours")(Inputs(tokens)).logits, ours(Inputs(tokens)).logits)
    if theirs.first or (theirs.experts and not theirs.normed):
        assert family == "octavo"
        return
    assert family == ("qwen3_moe" if theirs.experts else "qwen3" if theirs.normed else "llama")
    again = read_there(tmp_path / "ours")
    for row in range(3):
        close(again(tokens).logits[row], theirs(tokens[row])[0])
    check_greedy(ours, again, [tokens[0, :5]])


@pytest.mark.parametrize("name", ["second", "third", "third untied"])
@torch.no_grad()
def test_asked_for_by_name_it_is_written_as_minimind(name, tmp_path):
    theirs = Reference(name)
    ours = load_model(theirs.save(tmp_path / "theirs"))
    assert save_model(ours, tmp_path / "ours", family="minimind") == "minimind"
    written = read_config(tmp_path / "ours")
    for key in ("hidden_size", "num_key_value_heads", "rope_theta", "rms_norm_eps", "use_moe", "intermediate_size"):
        assert written[key] == theirs.hf[key]
    assert ("head_dim" in written) == theirs.normed
    assert torch.equal(load_model(tmp_path / "ours")(Inputs(some_tokens())).logits, ours(Inputs(some_tokens())).logits)


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_the_other_ways_the_same_model_is_stored(name, tmp_path):
    """The tied head repeated, the mask of an early version stored, and rotation as transformers 5 writes it."""
    theirs = Reference(name)
    wanted = load_model(theirs.save(tmp_path / "plain")).state_dict()
    theirs.tensors[theirs.names["head"]] = theirs.weight("embed").clone()
    if name == "first":
        theirs.tensors["layers.0.attention.mask"] = torch.zeros(1, 1, 4, 4)
    else:
        theirs.hf = {key: value for key, value in theirs.hf.items() if key not in ("rope_theta", "rope_scaling")}
        theirs.hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    model = load_model(theirs.save(tmp_path / "other"))
    assert model.config == load_model(tmp_path / "plain").config
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    theirs.tensors[theirs.names["head"]] += 1
    with pytest.raises(CheckpointError, match=f"{theirs.names['head']} differs from {theirs.names['embed']}"):
        load_model(theirs.save(tmp_path / "broken"))


def test_the_inner_width_where_none_is_given(tmp_path):
    theirs = Reference("second")
    theirs.hf = theirs.hf | {"intermediate_size": None}
    with pytest.raises(CheckpointError, match=r"expected \(128, 32\)"):  # 8/3 of 32 is 85, up to a multiple of 64
        load_model(theirs.save(tmp_path / "m"))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("second experts", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ("third experts", {"inference_rope_scaling": True}, "inference_rope_scaling = True"),
        ("first", {"use_moe": True}, "use_moe = True"),
        ("third", {"inference_rope_scaling": True}, "inference_rope_scaling = True"),
        ("third", {"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling"),
        ("third", {"hidden_act": "mish"}, "mish"),
    ],
    ids=str,
)
def test_what_is_not_built_here_is_refused_by_its_key(name, changes, said, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_model(Reference(name).save(tmp_path / "m", **changes))
    assert said in str(caught.value)
    assert "minimind" in str(caught.value) or "mish" in said


@pytest.mark.parametrize(("name", "other"), [("second", "third"), ("third", "second")])
def test_generations_are_not_mixed_up(name, other, tmp_path):
    """The norms of q and k are in the tensors and in the keys, or in neither."""
    theirs = Reference(name)
    if other == "third":
        theirs.hf = theirs.hf | {"head_dim": D // H}
    else:
        theirs.hf = {key: value for key, value in theirs.hf.items() if key != "head_dim"}
        theirs.tensors = {k: t[: t.shape[0] * 8 // 12] if ".q_" in k else t for k, t in theirs.tensors.items()}
    with pytest.raises(CheckpointError, match=r"q_norm\.weight"):
        load_model(theirs.save(tmp_path / "m"))
