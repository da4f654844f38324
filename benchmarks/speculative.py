"""What guessing ahead is worth, by kind of draft: how much of it is accepted, and the speed against no draft.

    python benchmarks/speculative.py TEXT                  a text file, as long as a book
    python benchmarks/speculative.py TEXT --out FOLDER     keeps the models that it trains, and takes those it finds
    python benchmarks/speculative.py TEXT --write          puts the table into docs/decoding.md

Trains four small models on the beginning of the text: an attention model with a module of multi-token prediction, a
Mamba-2, and a small attention model to draft for both; an n-gram model is counted on the same. Then texts from its end
are continued, one after the other, with each draft and with none, through the engine as `octavo generate` has it: the
attention model decodes in the native step, but with its module in its own forward pass, as the module reads its hidden
states; the Mamba-2 always does. One thread, process CPU clock, rounds of all drafts interleaved, each beside the rounds
without a draft; at temperature 0 every text is checked to be the one without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).parent))
from train import processor

from octavo.infer.drafts import Drafter, ModelDraft, ModuleDraft, PromptLookup
from octavo.infer.engine import Engine
from octavo.infer.executors import PlainExecutor
from octavo.infer.request import EngineConfig, Failure, Request
from octavo.infer.sampling import SamplingConfig
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.predictors.kinds import PREDICTORS, count
from octavo.schema import one_of
from octavo.tokenizer import ByteBPE, Tokenizer, train

PAGE = Path(__file__).parents[1] / "docs" / "decoding.md"
BEGIN, END = "<!-- drafts: begin -->", "<!-- drafts: end -->"
VOCABULARY, LENGTH = 512, 128
ATTENTION = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # a model, and the steps of its training
    "attention": ({"d_model": 192, "n_layers": 4, "blocks": {"block": {"mixer": ATTENTION}},
                   "multi_token": {"n_modules": 1}}, 100),
    "mamba2": ({"d_model": 192, "n_layers": 3, "positions": {"kind": "none"},
                "blocks": {"block": {"mixer": {"kind": "mamba2", "n_heads": 6}}}}, 100),
    "small": ({"d_model": 64, "n_layers": 2, "blocks": {"block": {"mixer": ATTENTION}}}, 250),
}  # fmt: skip


def trained(name: str, ids: torch.Tensor, folder: Path, times: int = 1) -> Decoder:
    """The model of that name, from ``folder`` if it is there."""
    values, steps = SHAPES[name]
    steps *= times
    config = Decoder.Config.model_validate(values | {"vocab_size": VOCABULARY, "max_seq_len": 512})
    model, path = build(config), folder / f"{name}-{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    draw, begun = torch.Generator().manual_seed(1), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    needs = ("logits", "multi_token") if len(model.multi_token) else ("logits",)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH - 2, (16,), generator=draw)
        rows = ids[starts[:, None] + torch.arange(LENGTH + 2)]
        out = model(Inputs(rows[:, :LENGTH]), needs=needs)
        loss = F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1 : LENGTH + 1].flatten())
        said = float(loss.detach())
        for further in out.multi_token or ():  # the last token has no embedding after it to read
            logits = model.logits(further[:, :-1]).flatten(0, 1)
            loss = loss + 0.3 * F.cross_entropy(logits, rows[:, 2 : LENGTH + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 25 == 24:
            spent = time.process_time() - begun
            print(f"{name}: step {step + 1} of {steps}, loss {said:.2f}, {spent:.0f} s", file=sys.stderr, flush=True)
    torch.save(model.state_dict(), path)
    return model.eval()


@dataclass
class Side:
    """An engine with a draft, or without, and what it took."""

    engine: Engine
    seconds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    n_steps: int = 0

    @property
    def n_tokens(self) -> int:
        """Of every round; without the first of each text, which comes with its prompt."""
        return sum(len(text) - 1 for text in self.texts)

    def go_on(self, prompts: list[list[int]], config: SamplingConfig) -> None:
        """Continue each prompt; the prompts themselves are not timed."""
        self.texts, self.n_steps, spent = [], 0, 0.0
        self.engine.reset()
        for number, prompt in enumerate(prompts):
            self.engine.add(Request(prompt, config, first_stream=number))
            events = self.engine.step()
            while not events:
                events = self.engine.step()
            text: list[int] = []
            while True:
                for _, event in events:
                    assert not isinstance(event, Failure), event
                    text.append(event.id)
                if not self.engine.busy:
                    break
                begun = time.process_time()
                events = self.engine.step()
                spent += time.process_time() - begun
                self.n_steps += 1
            self.texts.append(text)
        self.seconds.append(spent)


def compare(
    name: str, make: dict[str, Callable[[], Side]], prompts: list[list[int]], args: argparse.Namespace
) -> list[str]:
    """A line of the table for each draft and temperature."""
    lines = []
    for temperature in (0.0, 1.0):
        config = SamplingConfig(max_new_tokens=args.tokens, temperature=temperature, seed=3)
        sides = {draft: made() for draft, made in make.items()}
        for turn in range(args.rounds + 1):
            for side in sides.values() if turn % 2 else reversed(sides.values()):
                side.go_on(prompts, config)
        base = sides["none"]
        paces = {draft: [seconds / side.n_tokens for seconds in side.seconds[1:]] for draft, side in sides.items()}
        for draft, side in sides.items():
            alike = {"its module": "none, plain executor"}.get(draft, "none")  # by the same executor
            assert temperature or "none" in draft or side.texts == sides[alike].texts, f"{draft} leads to another text"
            figures, n_tokens = side.engine.figures(), side.n_tokens
            drafted, rate = figures["tokens_drafted"], 1 / statistics.median(paces[draft])
            share = f"{figures['tokens_accepted'] / drafted:.0%} of {drafted / n_tokens:.1f}" if drafted else "-"
            ratios = [a / b for a, b in zip(paces["none"], paces[draft], strict=True)]  # the first round warms up
            gain = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if side is not base else "1"
            )
            cells = (name, f"{temperature:g}", draft, share, f"{n_tokens / side.n_steps:.2f}", f"{rate:,.0f}", gain)
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def sides_of(
    model: Decoder, small: Decoder, counted: Any, tokenizer: Tokenizer, n: int
) -> dict[str, Callable[[], Side]]:
    def side(drafter: Drafter | None = None, plain: bool = False) -> Side:
        settings = EngineConfig(max_sequences=1, max_tokens=512, share_prefixes=False)
        return Side(Engine(model, tokenizer, settings, PlainExecutor if plain else None, drafter=drafter))

    made: dict[str, Callable[[], Side]] = {
        "none": side,
        "lookup": lambda: side(PromptLookup()),
        "smaller model": lambda: side(ModelDraft(small, n, n_slots=1)),
        "n-gram": lambda: side(ModelDraft(counted, n, n_slots=1)),
        "the model itself": lambda: side(ModelDraft(model, n, n_slots=1)),
    }
    if len(model.multi_token):
        made["none, plain executor"] = lambda: side(plain=True)
        made["its module"] = lambda: side(ModuleDraft(model, n_slots=1))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, help="where models are kept; default: nowhere")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--longer", type=int, default=1, help="train so many times as long")
    parser.add_argument("--drafted", type=int, default=4, help="tokens that a model drafts at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", nargs="*", choices=["attention", "mamba2"], default=["attention", "mamba2"])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        text = args.text.read_text("utf-8")
        cut = len(text) * 19 // 20
        tokenizer = train(ByteBPE(vocab_size=VOCABULARY), [text[:cut]])
        ids, rest = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
        models = {name: trained(name, torch.tensor(ids), folder, args.longer) for name in (*args.targets, "small")}
    settings = {"kind": "ngram", "order": 5, "smoothing": "modified_kneser_ney", "vocab_size": VOCABULARY}
    counted = count(TypeAdapter(one_of(PREDICTORS)).validate_python(settings), [np.array(ids, np.int32)])
    step = len(rest) // args.prompts
    prompts = [rest[i * step :][:64] for i in range(args.prompts)]
    size = {name: f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M" for name, model in models.items()}
    lines = [
        f"{processor()}, one thread, process CPU clock, fp32, {args.prompts} texts of {args.tokens} tokens, "
        f"{args.rounds} rounds; {', '.join(f'{name} {n}' for name, n in size.items())}; "
        f"a model drafts up to {args.drafted} tokens:\n",
        "| model | temperature | draft | accepted, of drafted a token | tokens a step | tokens/s | speed to none |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in args.targets:
        lines += compare(name, sides_of(models[name], models["small"], counted, tokenizer, args.drafted), prompts, args)
    table = "\n".join(lines)
    print(table)
    if args.write:
        before, after = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
