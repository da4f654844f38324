"""Text that every machine has, and small corpora with what usually goes wrong in them."""

import json.decoder
import textwrap
from functools import cache
from pathlib import Path

from octavo.tokenizer import BPE, Byte, ByteBPE, Character, Tokenizer, Unigram, Word, WordPiece, train

CODE = Path(json.decoder.__file__).read_text(encoding="utf-8")
PROSE = Path(textwrap.__file__).read_text(encoding="utf-8")
CHINESE = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少？\n" * 3
MIXED = "naïve café — Привет, мир! 👩‍🚀 e\u0301 \u0000 \ufffd\r\n\ttabs  and   spaces"
TEXTS = [*PROSE.split("\n\n"), *CODE.split("\n\n"), CHINESE, MIXED]

KINDS = {
    "byte_bpe": ByteBPE(vocab_size=600),
    "byte_bpe-gpt2": ByteBPE(vocab_size=500, split="gpt2"),
    "byte_bpe-llama3": ByteBPE(vocab_size=500, split="llama3", digits="run"),
    "byte_bpe-spaces": ByteBPE(vocab_size=500, split="spaces", digits="three"),
    "bpe": BPE(vocab_size=500),
    "bpe-bytes": BPE(vocab_size=800, byte_fallback=True, alphabet_size=80),
    "unigram": Unigram(vocab_size=500, seed_size=3000),
    "unigram-bytes": Unigram(vocab_size=700, byte_fallback=True, alphabet_size=80, seed_size=3000),
    "wordpiece": WordPiece(vocab_size=500),
    "word": Word(vocab_size=3000),
    "word-whitespace": Word(vocab_size=3000, split="whitespace"),
    "character": Character(),
    "byte": Byte(),
}


@cache
def trained(kind: str) -> Tokenizer:
    """One of ``KINDS``, trained once."""
    return train(KINDS[kind], TEXTS)


LOSSLESS = ("byte_bpe", "byte_bpe-gpt2", "byte_bpe-llama3", "byte_bpe-spaces", "byte")

# Templates in the style of well-known ones, written for these tests.
CHATML_PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set ns = namespace(first=true) %}{% for message in messages %}"
    "{% set text = '<|im_start|>' + message['role'] + '<|pad|>\\n\\n' + message['content'] | trim + '<|im_end|>' %}"
    "{% if ns.first %}{% set text = bos_token + text %}{% set ns.first = false %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|pad|>\\n\\n' }}{% endif %}"
)
