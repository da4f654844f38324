"""Run as a script, in a process of its own: some builds of llama.cpp end theirs on an instruction that is not there.

The question is a JSON file; the answer is one too. Nothing of octavo is imported.
"""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0  # ggml's number of the type


def main(question: str, answer: str) -> None:
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    there = llama_cpp.Llama(
        asked["gguf"], n_ctx=asked["context"], n_batch=asked["context"], n_threads=asked["threads"], verbose=False,
        logits_all=True, type_k=F32, type_v=F32,
    )  # fmt: skip
    vocab = llama_cpp.llama_model_get_vocab(there.model)
    stops = [i for i in range(there.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    said = {
        "version": llama_cpp.__version__,
        "stop_ids": stops,
        "template": there.metadata.get("tokenizer.chat_template"),
    }
    adds_bos = there.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    said["ids"] = [
        None if text is None else there.tokenize(text.encode(), add_bos=chat is False and adds_bos, special=chat)
        for text, chat in asked["texts"]
    ]
    n = asked["n_tokens"]
    said["scores"], said["greedy"] = [], []
    for row, prompt in zip(asked["rows"], asked["prompts"]):
        there.reset()
        there.eval(row)
        logits = np.array(there.scores[: len(row) - 1, :n], np.float64)
        logits -= logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        said["scores"].append(table[np.arange(len(row) - 1), row[1:]].tolist())
        there.reset()
        there.eval(prompt)
        text = []
        while len(text) < asked["n_new"]:
            text.append(int(there.scores[len(prompt) + len(text) - 1, :n].argmax()))
            if text[-1] in stops:
                break
            there.eval(text[-1:])
        said["greedy"].append(text)
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
