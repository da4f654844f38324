"""What vLLM and SGLang read of a folder is there and makes sense, for each family in docs/serving-elsewhere.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from octavo.hub.folder import FAMILIES, model_config
from octavo.infer.generate import encode_prompt
from octavo.language_model import LanguageModel
from octavo.models.decoder import build
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.config import ByteBPE
from octavo.tokenizer.train import train

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving-elsewhere.md"
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \| (yes|no) \|$", re.M)
SERVED = {
    family: (name, vllm == "yes", sglang == "yes") for family, name, vllm, sglang in ROW.findall(PAGE.read_text())
}
V, LENGTH = 288, 64
WIDE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": LENGTH}  # fmt: skip
GLU = WIDE | {"intermediate_size": 48, "num_key_value_heads": 2}
MOE = GLU | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = MOE | {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
                "n_group": 1, "topk_group": 1}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3"), GLU),
    **dict.fromkeys(("gemma2", "gemma3_text"), GLU | {"head_dim": 8}),
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH},
    "phi": WIDE | {"intermediate_size": 48},
    "mixtral": GLU | {"num_local_experts": 4},
    "qwen2_moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE | {"num_experts": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"num_nextn_predict_layers": 0},
    "gpt_neox": WIDE | {"intermediate_size": 48},
    "bloom": {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH},
    "falcon": WIDE,
    "mamba": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
               "state_size": 8, "n_groups": 1},
    "bamba": GLU | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1,
                    "mamba_d_head": 16},
}  # fmt: skip
UNSAID = {"bloom", "mamba", "mamba2"}  # no length in the config of their class
# The order in which each looks for the longest context: vLLM takes the smallest there is, SGLang the first.
VLLM_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
                "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
SGLANG_LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    plain = train(ByteBPE(vocab_size=280), ["the cat sat on the mat"] * 8)
    special = plain.special_text
    more = sorted(plain.tokens.index(t) for t in plain.tokens if t and t.startswith("<|") and t != special["eos"])[:1]
    return Tokenizer(plain.to_json(), special=special, chat_template=CHAT, stop_ids=more)


@pytest.fixture(scope="module")
def folder_of(tokenizer, tmp_path_factory):
    made: dict[str, Path] = {}

    def of(family: str, **changes: Any) -> Path:
        key = family + str(changes)
        if key not in made:
            theirs = transformers.AutoConfig.for_model(family, **SHAPES[family], **changes)
            config = model_config(theirs.to_dict() | {"model_type": family})
            if family in UNSAID:
                config = config.model_copy(update={"max_seq_len": LENGTH})
            model = build(config, seed=1).to(torch.bfloat16)
            made[key] = tmp_path_factory.mktemp("export") / family
            assert LanguageModel(model, tokenizer).save(made[key], family=family) == family
        return made[key]

    return of


def said(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_the_page_names_families_by_the_class_they_are_written_as():
    assert len(SERVED) == len(SHAPES) and SERVED.keys() == SHAPES.keys()
    for family, (architecture, vllm, _) in SERVED.items():
        assert FAMILIES[family].architecture == architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        assert vllm


@pytest.mark.parametrize("family", SHAPES)
def test_config_json_says_class_shapes_length_and_number_format(family, folder_of):
    folder = folder_of(family)
    raw, config = said(folder, "config.json"), transformers.AutoConfig.from_pretrained(folder)
    assert raw["architectures"] == [SERVED[family][0]] and raw["model_type"] == family == config.model_type
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert not {"auto_map", "quantization_config", "quantization"} & raw.keys()
    text = config.get_text_config()
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers) == (V, 32, 2)
    if family not in ("mamba", "mamba2"):
        assert text.num_attention_heads == 4
    lengths = [getattr(text, key) for key in VLLM_LENGTHS if isinstance(getattr(text, key, None), int)]
    first = next((getattr(text, key) for key in SGLANG_LENGTHS if getattr(text, key, None) is not None), None)
    if family not in UNSAID:
        assert min(lengths) == LENGTH
    if SERVED[family][2]:
        assert first == LENGTH


@pytest.mark.parametrize("family", SHAPES)
def test_weights_are_safetensors_in_that_format_and_the_head_is_there_unless_it_is_tied(family, folder_of):
    folder = folder_of(family)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".py")]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        formats = {file.get_slice(name).get_dtype() for name in file.keys() if "correction_bias" not in name}  # noqa: SIM118
        heads = [name for name in file.keys() if name in ("lm_head.weight", "embed_out.weight")]  # noqa: SIM118
    assert formats == {"BF16"}
    assert bool(heads) is not bool(config.tie_word_embeddings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "deepseek_v3"])
def test_every_end_of_an_answer_and_the_template_are_said_where_each_looks(family, folder_of, tokenizer):
    folder = folder_of(family)
    ends = said(folder, "generation_config.json")["eos_token_id"]
    assert len(ends) > 1 and set(ends) == tokenizer.stop_ids
    assert said(folder, "config.json")["eos_token_id"] == ends[0] == tokenizer.special.eos
    words = said(folder, "tokenizer_config.json")
    assert words["eos_token"] == tokenizer.tokens[ends[0]]
    assert words["chat_template"] == (folder / "chat_template.jinja").read_text() == CHAT
    there = transformers.AutoTokenizer.from_pretrained(folder)
    assert there.eos_token_id == ends[0] and there("the cat")["input_ids"] == encode_prompt(tokenizer, "the cat")
    messages = [{"role": "user", "content": "the cat"}]
    assert there.apply_chat_template(messages, return_dict=False) == tokenizer.render(messages).ids
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert set(generation.eos_token_id) == tokenizer.stop_ids
    assert not {"temperature", "top_p", "top_k", "do_sample"} & said(folder, "generation_config.json").keys()


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}], ids=["plain", "scaled"])
def test_rotation_is_said_in_both_spellings(scaling, folder_of):
    rope = {"rope_type": "default", "rope_theta": 5000.0} | scaling
    folder = folder_of("llama", rope_parameters=rope)
    raw, config = said(folder, "config.json"), transformers.AutoConfig.from_pretrained(folder)
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == config.rope_parameters["rope_theta"] == 5000.0
    assert config.rope_parameters["rope_type"] == rope["rope_type"]
    if scaling:
        assert raw["rope_scaling"]["factor"] == raw["rope_parameters"]["factor"] == 2.0
    else:
        assert "rope_scaling" not in raw
