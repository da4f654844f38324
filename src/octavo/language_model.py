"""A model with its tokenizer: what ``octavo.load`` gives, for runs and model folders alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError, ConfigErrors, did_you_mean
from octavo.files import write_json
from octavo.hub import formats, sentences
from octavo.hub.folder import assemble, family_of, load_model, model_config, read_config, save_model
from octavo.hub.small_weights import Codes, read_as
from octavo.infer.constraints import Grammar, follow
from octavo.infer.embed import classify, embed, tag
from octavo.infer.generate import best, encode_prompt, encode_source, generate, pieces
from octavo.infer.sampling import SamplingConfig
from octavo.infer.text import Completion
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs
from octavo.predictors import folder as counted
from octavo.predictors.predictor import NGramPredictor
from octavo.run import find_model
from octavo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.models.decoder import Decoder

Prompt = str | Sequence[Mapping[str, Any]]


class LanguageModel:
    """A model and the tokenizer that it was made with: a decoder, or a predictor that was counted.

    A prompt is a text, which is continued, or a list of messages ``{role, content}``, which is answered.
    """

    def __init__(self, model: Decoder | NGramPredictor, tokenizer: Tokenizer):
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size:,} ids, the embedding {model.vocab_size:,} rows",
                fix="use the tokenizer that belongs to the model",
            )
        self.model, self.tokenizer = model, tokenizer
        self.sentences: sentences.Sentences | None = None  # how its makers make vectors of texts
        self.read_as = ""  # what became of the quantised weights of another program's file, in words

    @property
    def network(self) -> Decoder:
        """The model, where it has weights.

        Raises:
            ConfigError: it was counted.
        """
        if isinstance(self.model, NGramPredictor):
            raise ConfigError("the model was counted: it has no weights", fix="give a model that was trained")
        return self.model

    @property
    def max_seq_len(self) -> int:
        """The longest context in tokens."""
        return self.model.max_seq_len

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt: [bos] and the text, or the rendered conversation up to the answer."""
        if isinstance(prompt, str):
            encode = encode_source if isinstance(self.model, EncoderDecoder) else encode_prompt
            return encode(self.tokenizer, prompt)
        return self.tokenizer.render(list(prompt), add_generation_prompt=True).ids

    def complete(
        self, prompt: Prompt, config: SamplingConfig | None = None, *, best_of: int = 1, **settings: Any
    ) -> Completion:
        """Continue a text or answer messages.

        Args:
            best_of: draw so many texts, and give the one with the highest mean ln p of its tokens.
            settings: those of ``SamplingConfig``, and one of ``json_schema`` (a dict), ``regex`` and ``grammar`` (Lark,
                in llguidance's dialect), which the text then follows.
        """
        if best_of < 1:
            raise ConfigError(f"best_of = {best_of}: there would be no text", fix="give 1 or more")
        constraint = self._constraint(settings)
        prompts, n_top = [self.prompt_ids(prompt)] * best_of, 0 if best_of > 1 else None
        config = _sampling(config, settings)
        made = generate(self.model, self.tokenizer, prompts, config, n_top=n_top, constraint=constraint)
        return best(made)[0] if best_of > 1 else made[0]

    def generate(self, prompt: Prompt, config: SamplingConfig | None = None, **settings: Any) -> str:
        """The text of ``complete``: ``lm.generate("Once", max_new_tokens=50, temperature=0.8, seed=1)``."""
        return self.complete(prompt, config, **settings).text

    def stream(self, prompt: Prompt, config: SamplingConfig | None = None, **settings: Any) -> Iterator[str]:
        """The same text piece by piece, whole characters only."""
        constraint = self._constraint(settings)
        config, ids = _sampling(config, settings), self.prompt_ids(prompt)
        for piece in pieces(self.model, self.tokenizer, [ids], config, constraint=constraint):
            if piece.text:
                yield piece.text

    def _constraint(self, settings: dict[str, Any]) -> Grammar | None:
        """What ``settings`` want the text to follow, taken out of them."""
        given = {name: settings.pop(name) for name in ("json_schema", "regex", "grammar") if name in settings}
        return follow(self.tokenizer, **given)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Next-token logits for tokens (T,) or (B, T): (T, V) or (B, T, V)."""
        ids = torch.as_tensor(tokens, dtype=torch.long)
        logits = self.model(Inputs(ids.view(-1, ids.shape[-1]))).logits
        assert logits is not None
        return logits[0] if ids.ndim == 1 else logits

    @torch.no_grad()
    def hidden_states(self, tokens: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        """The embedding output, layers 1 to n-1, and the normed last: n+1 tensors (T, D) or (B, T, D)."""
        ids = torch.as_tensor(tokens, dtype=torch.long)
        states = self.model(Inputs(ids.view(-1, ids.shape[-1])), needs=("hidden_states",)).hidden_states
        assert states is not None
        return tuple(state[0] for state in states) if ids.ndim == 1 else states

    def embed(self, texts: Sequence[str], **settings: Any) -> np.ndarray:
        """One vector a text, (N, D) float32; ``settings`` are those of ``octavo.infer.embed.embed``.

        What is left out is as the model's makers say it, where its folder says so (sentence-transformers).
        """
        if self.sentences is not None:
            settings = self.sentences.settings(settings)
            if settings["max_tokens"] is not None:
                settings["max_tokens"] = min(settings["max_tokens"], self.max_seq_len)
        return embed(self.model, self.tokenizer, texts, **settings)

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None, **settings: Any) -> np.ndarray:
        """The scores of each text's classes, (N, C) float32, before softmax; ``pairs`` are the texts' second halves.

        The names are ``model.config.classes.labels``. ``settings`` are those of ``octavo.infer.embed.classify``.
        """
        return classify(self.model, self.tokenizer, texts, pairs, **settings)

    def tag(self, sentences: Sequence[Sequence[str]], **settings: Any) -> list[list[str]]:
        """The tag of each word of each sentence, by a head of classes over tokens; sentences come as words.

        ``settings`` are those of ``octavo.infer.embed.tag``.
        """
        return tag(self.model, self.tokenizer, sentences, **settings)

    def score(self, text: str) -> dict[str, float]:
        """How well the model predicts ``text``: bits_per_byte, perplexity_per_token, token_accuracy and counts."""
        from octavo.eval import metrics
        from octavo.eval.runner import Encoded

        if not text:
            raise ConfigError("there is nothing to score in an empty text", fix="give some text")
        eos = self.tokenizer.special.eos
        scorer = metrics.own_scorer(self.model) or metrics.neural_scorer(
            self.logits, self.max_seq_len, None, vocab_size=self.model.vocab_size
        )
        lengths = metrics.token_byte_lengths(self.tokenizer)
        document = Encoded([text], self.tokenizer).document(0)
        return metrics.score_documents(scorer, [document], lengths, -1 if eos is None else eos).figures()

    def log_probs(self, texts: Sequence[str], *, end: bool = False) -> list[float]:
        """ln p of each text as the beginning of a document; with ``end`` of the document's end after it too."""
        from octavo.eval import metrics
        from octavo.eval.runner import Encoded

        encoded, has_end = Encoded(texts, self.tokenizer), self.tokenizer.special.eos is not None
        scorer = metrics.own_scorer(self.model) or metrics.neural_scorer(
            self.logits, self.max_seq_len, None, vocab_size=self.model.vocab_size
        )
        documents = [encoded.document(i)[: None if end or not has_end else -1] for i in range(encoded.n_documents)]
        scored = [document for document in documents if len(document) > 1]
        values = iter(scorer(scored)[0].tolist() if scored else ())
        return [sum(next(values) for _ in document[1:]) for document in documents]

    def save(self, folder: str | Path, *, family: str = "auto") -> str:
        """Write a Hugging Face folder: weights, config, tokenizer, chat template, generation settings.

        Returns:
            The checkpoint family written; ``octavo`` where no other can say this model.
        """
        special = self.tokenizer.special
        first = [i for i in (special.eos,) if i is not None]
        ends = list(dict.fromkeys([*first, *sorted(self.tokenizer.stop_ids)]))
        ids = {"bos_token_id": special.bos, "pad_token_id": special.pad}
        ids = {name: i for name, i in ids.items() if i is not None}
        single = {"eos_token_id": ends[0]} if ends else {}

        def beside(place: str | Path) -> None:
            self.tokenizer.save(place)
            write_json(Path(place) / "generation_config.json", ids | ({"eos_token_id": ends} if ends else {}))

        if isinstance(self.model, NGramPredictor):
            if family not in ("auto", counted.NATIVE):
                raise ConfigError(f"a counted model cannot be written as {family!r}", fix="leave the family out")
            counted.save(self.model, folder, ids | single, beside)
            return counted.NATIVE
        name = save_model(self.model, folder, family=family, extra=ids | single)
        if self.sentences is not None:
            sentences.write(self.sentences, Path(folder), self.model.config.d_model)
        beside(folder)
        return name


def load(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    tokenizer: Tokenizer | None = None,
    codes: bool = True,
) -> LanguageModel:
    """A model from a run, a model folder, a pulled repository (``org/name``) or a GGUF or llama2.c file.

    Args:
        path: a run (its final model is taken, else the pretrained one), a model folder, a name or a file.
        dtype: ``auto`` keeps what was saved where this machine computes it fast, else fp32; ``saved`` keeps it;
            ``decode`` is ``auto`` that also keeps bf16 where it is the native step that reads it fast.
        tokenizer: in place of the one that comes with the model.
        codes: keep the 8- and 4-bit weights of a GGUF file that are ours exactly; False makes plain ones of all, which
            can be trained.

    Raises:
        ConfigError: no model there. CheckpointError: a model that cannot be read exactly.
    """
    place = find_model(path, files=True)
    if place.is_file():
        return from_foreign(formats.read(place, tokenizer), place, dtype, codes=codes)
    hf = read_config(place)
    if counted.is_counted(hf):
        if dtype not in ("auto", "saved", "decode"):
            raise ConfigError(f"{path} was counted: it has no weights to hold in {dtype}", fix="leave the dtype out")
        return LanguageModel(counted.load(place, hf), tokenizer or Tokenizer.load(place))
    model = _held(lambda wanted: load_model(place, wanted), dtype, hf)
    lm = LanguageModel(model, tokenizer or Tokenizer.load(place))
    lm.sentences = sentences.read(place)
    return lm


def from_foreign(
    foreign: formats.Foreign, path: Path, dtype: torch.dtype | str = "auto", *, codes: bool = True
) -> LanguageModel:
    """The model of a file of another program; see ``load``.

    Raises:
        CheckpointError: its parts do not fit together, or it comes without a tokenizer.
    """
    if foreign.tokenizer is None:
        raise CheckpointError(
            f"{path} comes without a tokenizer", fix=f"octavo convert {path} TARGET --tokenizer FOLDER"
        )
    hf, tensors = foreign.config, foreign.tensors
    try:
        if not codes:
            tensors = {name: t.plain() if isinstance(t, Codes) else t for name, t in tensors.items()}
        hf, tensors = _own_head(hf, tensors)
        config = model_config(hf)
        if dtype == "saved":  # what the file says of itself: its tensors may be of several formats
            dtype = hf.get("dtype") or hf.get("torch_dtype") or "saved"
        model = _held(lambda wanted: assemble(hf, config, tensors, path, wanted), dtype, hf)
    except CheckpointError as error:
        if str(path) in error.what:
            raise
        raise CheckpointError(f"{path}: {error.what}", fix=error.fix) from None
    lm = LanguageModel(model, foreign.tokenizer)
    lm.read_as = read_as(model, foreign.quantised)
    return lm


def _own_head(hf: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where a tied embedding has codes, the head is a product of its own that keeps them."""
    if not any(isinstance(tensor, Codes) for tensor in tensors.values()):
        return hf, tensors
    config, family = model_config(hf), family_of(hf["model_type"])
    if not config.tie_embeddings or family.head in tensors:
        return hf, tensors
    embedding = next(e.theirs for e in family.of(hf).entries(config) if e.ours[0] == "embed.weight")
    if not isinstance(tensors.get(embedding), Codes):
        return hf, tensors
    return {**hf, "tie_word_embeddings": False}, {**tensors, family.head: tensors[embedding]}


def _held(read: Callable[[torch.dtype | None], Any], dtype: torch.dtype | str, hf: Mapping[str, Any]) -> Any:
    """What ``read`` makes of the weights in the number format asked for."""
    wanted = _dtype(dtype, hf)
    model = read(wanted)
    if dtype != "decode" or wanted != torch.bfloat16:
        return model
    from octavo.infer import native
    from octavo.training.machine import best_precision

    fast = best_precision() == "bf16" or not (native.unsuitable(model) or native.library()[1])
    return model if fast else read(torch.float32)


def _dtype(dtype: torch.dtype | str, hf: Mapping[str, Any]) -> torch.dtype | None:
    """The number format asked for, None for that of the saved weights."""
    if dtype == "saved":
        return None
    if dtype in ("auto", "decode"):
        from octavo.training.machine import best_precision

        saved = hf.get("dtype") or hf.get("torch_dtype")
        keep = saved == "bfloat16" and (dtype == "decode" or best_precision() == "bf16")
        return torch.bfloat16 if keep else torch.float32
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"dtype = {dtype!r} is not a number format of torch", fix="use auto, float32 or bfloat16")
    return wanted


def _sampling(config: SamplingConfig | None, settings: dict[str, Any]) -> SamplingConfig:
    """``config`` with ``settings`` on top, checked: a setting that is ignored would be a wrong answer."""
    try:
        return SamplingConfig(**{**(config.model_dump() if config is not None else {}), **settings})
    except ValidationError as invalid:
        raise ConfigErrors(_refusal(error["loc"], error["msg"]) for error in invalid.errors()) from None


def _refusal(loc: Sequence[int | str], message: str) -> ConfigError:
    if not loc:  # of several settings together
        return ConfigError(message.removeprefix("Value error, "), fix="choose other values")
    name = str(loc[0])
    if name not in SamplingConfig.model_fields:
        fix = did_you_mean(name, SamplingConfig.model_fields, thing="setting")
        return ConfigError(f"{name} is not a setting of sampling", fix=fix)
    return ConfigError(f"{name}: {message[0].lower()}{message[1:]}", fix="choose another value")
