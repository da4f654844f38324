"""How good is the estimate of a training's memory? Real steps in processes of their own, peak resident memory measured.

    python benchmarks/memory.py                 all shapes; some minutes
    python benchmarks/memory.py --shapes 0 4    some of them
    python benchmarks/memory.py --json

The constants in training/memory.py were set on the shapes marked "set"; the others were measured afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def glu(d: int, layers: int, heads: int, kv: int, ff: int, vocab: int, seq_len: int) -> dict[str, Any]:
    block = {"mixer": {"n_heads": heads, "n_kv_heads": kv}, "channel": {"kind": "glu", "d_ff": ff}}
    shape = {"d_model": d, "n_layers": layers, "max_seq_len": seq_len, "vocab_size": vocab}
    return shape | {"blocks": {"block": block}}


def mlp(d: int, layers: int, heads: int, vocab: int, seq_len: int, dropout: float = 0.0) -> dict[str, Any]:
    block = {"mixer": {"n_heads": heads, "dropout": dropout}, "channel": {"kind": "mlp"}, "dropout": dropout}
    shape = {"d_model": d, "n_layers": layers, "max_seq_len": seq_len, "vocab_size": vocab}
    return shape | {"blocks": {"block": block}}


P26 = glu(512, 8, 8, 2, 1408, 6400, 512)
CHUNKED = {"objective": {"kind": "causal", "chunk_tokens": 512}}
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("set", P26, {"step_tokens": 4096}),
    ("set", P26, {"step_tokens": 4096, "micro_batch_rows": 2}),
    ("set", P26, {"step_tokens": 2048, "precision": "bf16"}),
    ("set", mlp(384, 6, 6, 65, 256, 0.2), {"step_tokens": 4096}),
    ("set", glu(256, 4, 4, 2, 704, 32000, 256), {"step_tokens": 4096}),
    ("set", glu(256, 4, 4, 2, 704, 32000, 256), {"step_tokens": 4096} | CHUNKED),
    ("set", glu(256, 16, 4, 4, 704, 2048, 512), {"step_tokens": 8192, "activation_checkpointing": True}),
    ("set", glu(1024, 12, 16, 16, 2816, 16000, 128), {"step_tokens": 256}),
    ("", mlp(256, 10, 8, 4096, 1024), {"step_tokens": 4096}),
    ("", glu(192, 4, 3, 1, 512, 2048, 256), {"step_tokens": 4096, "optimizer": {"kind": "muon"}}),
    ("", glu(640, 6, 10, 5, 1728, 12000, 256), {"step_tokens": 2048, "optimizer": {"kind": "adamw_8bit"}}),
    ("", mlp(512, 12, 8, 8000, 256), {"step_tokens": 2048, "average": {"decay": 0.99}}),
    ("", glu(384, 12, 6, 6, 1024, 6000, 512), {"step_tokens": 4096, "activation_checkpointing": True} | CHUNKED),
    ("", glu(320, 6, 5, 1, 896, 50000, 128), {"step_tokens": 1024, "precision": "bf16"}),
    ("", P26, {"step_tokens": 4096, "compile": "step"}),
    ("", mlp(384, 6, 6, 65, 256, 0.2), {"step_tokens": 4096, "compile": "step"}),
]


def configs(model: dict[str, Any], train: dict[str, Any]) -> tuple[Any, Any]:
    from octavo.models.decoder import Decoder
    from octavo.training.settings import TrainConfig

    fixed = {"steps": 3, "compile": "off", "precision": "fp32", "threads": 1, "schedule": "constant", "save_every": 3}
    return Decoder.Config.model_validate(model), TrainConfig.model_validate(fixed | train)


def measure(model: dict[str, Any], train: dict[str, Any]) -> int:
    """In a child: three steps and a save; the peak of resident memory in bytes."""
    import numpy as np

    from octavo.data.loader import Loader
    from octavo.data.pack import WholeRows
    from octavo.models.decoder import build
    from octavo.objectives.likelihood import CausalLikelihood
    from octavo.stop import StopSignal
    from octavo.training.loop import Held, Trainer
    from octavo.training.machine import tune_allocator
    from octavo.training.progress import Console

    tune_allocator()
    shape, config = configs(model, train)
    rng, seq_len = np.random.default_rng(0), shape.max_seq_len
    rows = config.step_tokens // seq_len
    ids = rng.integers(0, shape.vocab_size or 2, (2 * rows, seq_len + 1))
    data = WholeRows([(row.tolist(), [1] * (seq_len + 1)) for row in ids], seq_len)
    with tempfile.TemporaryDirectory() as folder:
        held = Held(Path(folder), "run", Console("quiet"), StopSignal())
        objective = CausalLikelihood(config.objective)
        Trainer(build(shape, seed=1), Loader(data, rows, seed=3), objective, config, held, 7).fit()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", type=int, nargs="*", help="by number; default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(measure(*SHAPES[given.child][1:]))
        return 0
    from octavo.training.memory import training_bytes

    rows = []
    for i in given.shapes or range(len(SHAPES)):
        kind, model, train = SHAPES[i]
        shape, config = configs(model, train)
        estimate = training_bytes(shape, config, config.precision).total
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = [sys.executable, __file__, "--child", str(i)]
        done = subprocess.run(child, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{i}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            continue
        measured = int(done.stdout.split()[-1])
        name = f"{model['d_model']} x {model['n_layers']}, {model['vocab_size']} words, " + ", ".join(
            f"{key} {value if not isinstance(value, dict) else next(iter(value.values()))}"
            for key, value in train.items()
        )
        rows.append({"shape": name, "set": kind == "set", "estimate": estimate, "measured": measured})
        if not given.json:
            error = estimate / measured - 1
            print(
                f"{i:2} {kind:4} {estimate / 2**20:7,.0f} {measured / 2**20:7,.0f} MiB {error:+6.1%}  {name}",
                flush=True,
            )
    for which in (True, False):
        errors = [abs(row["estimate"] / row["measured"] - 1) for row in rows if row["set"] == which]
        if errors and not given.json:
            kind = "set on" if which else "not set on"
            print(f"median error of the {len(errors)} shapes it was {kind}: {statistics.median(errors):.1%}")
    if given.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
