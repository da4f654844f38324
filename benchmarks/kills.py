"""Kill training at random moments and go on, again and again: does any logged loss or weight differ?

    python benchmarks/kills.py --kills 100          SIGKILL the loop 100 times; a table of what was seen
    python benchmarks/kills.py --quickstart 5       SIGKILL the real `octavo run quickstart` in each of its stages
    python benchmarks/kills.py --quickstart 5 --recipe shakespeare data.sources=input.txt --reference runs/unkilled

With no failure in n kills the failure rate is below 3/n (95 %). The exit code is 1 if there was any failure.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# One thread: the harness forks, and a pool of threads does not survive a fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

TIMINGS = ("seconds", "tokens_per_second", "mfu")
STAGES = ("data", "tokenizer", "pretrain", "tune")
STEPS, SAVE_EVERY = 60, 10


@dataclass
class Result:
    """What is published: how often, how many went wrong, and with which seed to do it again."""

    what: str
    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    seed: int = 0
    failures: list[str] = field(default_factory=list)
    where: dict[str, int] = field(default_factory=dict)

    def table(self) -> str:
        rows = [
            ("what", self.what),
            ("kills", str(self.kills)),
            ("killed while", ", ".join(f"{name} {n}" for name, n in self.where.items())),
            ("runs finished", str(self.runs)),
            ("failures", str(len(self.failures))),
            ("seconds", f"{self.seconds:.1f}"),
            ("seed", str(self.seed)),
        ]
        lines = [f"{name:14} {value}" for name, value in rows if value]
        return "\n".join([*lines, *(f"FAILED  {text}" for text in self.failures)])


def records(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, without timings; every float as hex, so that equal means equal in every bit."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
    return [
        {k: v.hex() if isinstance(v, float) else v for k, v in json.loads(line).items() if k not in TIMINGS}
        for line in lines
    ]


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, whole: bool) -> list[str]:
    """Where a log leaves the expected one; a log that is not ``whole`` may end early."""
    wrong = [f"line {i + 1}: {a} is not {b}" for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
    if len(found) > len(expected) or (whole and len(found) < len(expected)):
        wrong.append(f"{len(found)} lines, expected {len(expected)}")
    return wrong[:3]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------- the loop


def train(folder: Path) -> None:
    """One process of the small run: from the start, or on from the newest checkpoint, to the end."""
    import numpy as np
    import torch

    from octavo.batch import Batch
    from octavo.data.loader import Loader, sweep
    from octavo.data.pack import WholeRows
    from octavo.models.decoder import Decoder, build
    from octavo.objectives.likelihood import CausalLikelihood
    from octavo.run import RunFolder
    from octavo.stop import StopSignal
    from octavo.training.loop import Held, Trainer
    from octavo.training.progress import Console
    from octavo.training.settings import TrainConfig

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 64, n).tolist(), rng.integers(0, 2, n).tolist()) for n in rng.integers(8, 34, 90)]
    data = WholeRows(samples, 32)
    block = {"mixer": {"n_heads": 2, "dropout": 0.1}, "dropout": 0.1}
    model = build(
        Decoder.Config.model_validate(
            {"d_model": 32, "n_layers": 1, "max_seq_len": 32, "vocab_size": 64, "blocks": {"block": block}}
        ),
        seed=1,
    )
    config = TrainConfig.model_validate(
        {"steps": STEPS, "precision": "fp32", "compile": "off", "threads": 1, "log_every": 1, "save_every": SAVE_EVERY,
         "valid_every": 20, "sample_every": 30, "micro_batch_rows": 2, "schedule": {"kind": "cosine", "warmup": 10}}
    )  # fmt: skip
    run = RunFolder(folder)
    with run.lock():
        held = Held(
            folder, run.id, Console("quiet"), StopSignal(),
            valid=[Batch.from_numpy(arrays) for arrays in sweep(data, 16)][:1],
            sample=lambda: [{"prompt": "", "text": str(int(model.embed.weight.sum() * 1e6))}],
        )  # fmt: skip
        Trainer(model, Loader(data, 4, seed=3), CausalLikelihood(), config, held, seed=7).fit()
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        (folder / "weights.sha256").write_text(digest.hexdigest())


def preload() -> None:
    """Import in the parent what every child needs; nothing is computed here, so forking stays safe."""
    import torch
    import torch._dynamo  # what a custom operator imports at its first call, three seconds of every child

    import octavo.data.loader
    import octavo.models.decoder
    import octavo.run
    import octavo.training.loop
    import octavo.training.progress

    octavo.training.progress.Console("quiet")  # imports what it draws with
    torch.set_num_threads(1)


def start(folder: Path) -> int:
    """A child that trains in ``folder``; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        train(folder)
        code = 0
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(child: int, seconds: float | None) -> int | None:
    """The exit code of a child that ends by itself within ``seconds``; None when it is still running."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def doing(folder: Path) -> str:
    """What a run that was just killed was at, from what it left."""
    checkpoints = folder / "checkpoints"
    if any(checkpoints.glob("*.tmp-*")):
        return "saving"
    return "training" if (folder / "metrics.jsonl").is_file() else "starting"


def last_saved(folder: Path) -> int:
    from octavo.training import checkpoint

    found = checkpoint.newest(folder / "checkpoints")
    return found.step if found is not None else 0


def kill_the_loop(n_kills: int, seed: int, work: Path) -> Result:
    """Kill ``n_kills`` times, over as many runs as it takes, and compare each with a run that was never killed."""
    preload()
    result = Result("the loop", seed=seed)
    chance = random.Random(seed)
    began = time.monotonic()
    reference = work / "reference"
    reference.mkdir()
    if wait(start(reference), None) != 0:
        raise SystemExit(f"the run that is not killed failed:\n{(reference / 'stderr').read_text()}")
    longest = 1.1 * (time.monotonic() - began)
    expected, weights = records(reference / "metrics.jsonl"), (reference / "weights.sha256").read_text()
    moments = sha256(reference / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors")
    while result.kills < n_kills:
        folder = work / f"run-{result.runs}"
        folder.mkdir()
        failed = len(result.failures)
        while True:
            child = start(folder)
            # Soon enough that a run is killed several times, late enough that it comes to the next save.
            moment = 0.6 * longest * chance.random() if result.kills < n_kills else None
            code = wait(child, moment)
            if code is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result.kills += 1
            result.where[at] = result.where.get(at := doing(folder), 0) + 1
            so_far = records(folder / "metrics.jsonl")
            result.failures += [f"kill {result.kills}, {text}" for text in differences(so_far, expected, whole=False)]
            lost = max((record["step"] for record in so_far), default=0) - last_saved(folder)
            if lost > SAVE_EVERY:
                result.failures.append(f"kill {result.kills}: {lost} steps lost, saved every {SAVE_EVERY}")
        result.runs += 1
        if code != 0:
            result.failures.append(f"run {result.runs} ended with {code}: {(folder / 'stderr').read_text()[-400:]}")
            continue
        for text in differences(records(folder / "metrics.jsonl"), expected, whole=True):
            result.failures.append(f"run {result.runs}, {text}")
        if (folder / "weights.sha256").read_text() != weights:
            result.failures.append(f"run {result.runs}: other weights")
        if sha256(folder / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors") != moments:
            result.failures.append(f"run {result.runs}: other moments")
        if left := [path.name for path in (folder / "checkpoints").iterdir() if ".tmp-" in path.name]:
            result.failures.append(f"run {result.runs}: left {left}")
        if len(result.failures) == failed:
            shutil.rmtree(folder)
    result.seconds = time.monotonic() - began
    return result


# ------------------------------------------------------------------------------------- the real command


def launch(recipe: str, overrides: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "octavo", "run", recipe, *overrides, "--no-chat", "--quiet", "--out", str(folder)]
    with open(folder.with_suffix(".stderr"), "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )


def finished_stages(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def steps_logged(folder: Path, stage: str) -> int:
    return max((r["step"] for r in records(folder / stage / "metrics.jsonl") if r["kind"] == "train"), default=0)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that has to be equal: logs, shards, tokenizer, weights."""
    found: dict[str, Any] = {f"{s} log": records(folder / s / "metrics.jsonl") for s in ("pretrain", "tune")}
    patterns = ("tokenizer/tokenizer.json", "base/*.safetensors", "model/*.safetensors", "data/train/*", "data/valid/*")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        found[str(path.relative_to(folder))] = sha256(path)
    return found


@contextlib.contextmanager
def no_orphans(process: subprocess.Popen[bytes], result: Result) -> Iterator[None]:
    """After the main process is gone its workers must go too, by themselves."""
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    result.failures.append(f"kill {result.kills}: processes of the killed run are still there after 10 seconds")
    os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[bytes], folder: Path, stage: str, progress: float, seconds: float) -> None:
    """Return when ``stage`` has come to ``progress`` (0 to 1) of its work, or the process has ended."""
    known = [name for name in STAGES if name in seconds_of_stages]
    before = known[: known.index(stage)]
    entered: float | None = None
    while process.poll() is None:
        stages = finished_stages(folder)
        if stage in stages:
            return
        if all(name in stages for name in before):
            entered = entered or time.monotonic()
            if stage in steps_of_stages:
                if steps_logged(folder, stage) >= progress * steps_of_stages[stage]:
                    return
            elif time.monotonic() - entered >= progress * seconds:
                return
        time.sleep(0.02)


seconds_of_stages: dict[str, float] = {}
steps_of_stages: dict[str, int] = {}


def kill_the_command(n: int, seed: int, work: Path, recipe: str, overrides: list[str], reference: Path) -> Result:
    """Kill ``octavo run`` n times, in turn in each of its stages, and compare with a run that was never killed."""
    result = Result(f"octavo run {recipe} {' '.join(overrides)}".strip(), seed=seed)
    chance = random.Random(seed)
    began = time.monotonic()
    if not (reference / "stages.json").is_file():
        if launch(recipe, overrides, reference).wait() != 0:
            raise SystemExit(f"the run that is not killed failed:\n{reference.with_suffix('.stderr').read_text()}")
    stages = finished_stages(reference)
    seconds_of_stages.update({name: float(stages[name]["seconds"]) for name in STAGES if name in stages})
    names = list(seconds_of_stages)
    steps_of_stages.update({name: steps_logged(reference, name) for name in ("pretrain", "tune") if name in names})
    # In the order of the stages, later moments after earlier ones: each kill finds new work.
    plan = sorted((names.index(names[i % len(names)]), 0.9 * chance.random()) for i in range(n))
    folder = work / "killed"
    for index, progress in plan:
        stage = names[index]
        process = launch(recipe, overrides, folder)
        wait_for(process, folder, stage, progress, seconds_of_stages[stage])
        time.sleep(0.3 * chance.random())  # anywhere between two lines of the log
        if process.poll() is not None:
            result.failures.append(f"ended with {process.returncode} before it could be killed in {stage}")
            break
        process.kill()
        process.wait()
        result.kills += 1
        done = [name for name in names if name in finished_stages(folder)]
        at = next((name for name in names if name not in done), "after tuning")
        at += f" (step {steps_logged(folder, at)})" if at in steps_of_stages else ""
        result.where[at] = result.where.get(at, 0) + 1
        with no_orphans(process, result):
            print(f"kill {result.kills}: {at}", file=sys.stderr, flush=True)
    code = launch(recipe, overrides, folder).wait()
    result.runs = 1
    if code != 0:
        result.failures.append(f"the last run ended with {code}: {folder.with_suffix('.stderr').read_text()[-400:]}")
    expected, found = outcome(reference), outcome(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith(" log"):
            result.failures += [f"{name}: {t}" for t in differences(found[name], expected[name], whole=True)]
        elif expected.get(name) != found.get(name):
            result.failures.append(f"{name}: {found.get(name)}, expected {expected.get(name)}")
    result.seconds = time.monotonic() - began
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of the small loop")
    parser.add_argument("--quickstart", type=int, metavar="N", help="kill the real command N times instead")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--reference", type=Path, help="the folder of an unkilled run; made if it is not there")
    parser.add_argument("--seed", type=int, help="of the moments; default: a new one, which is printed")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for the recipe")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(2**32)
    with contextlib.ExitStack() as cleanup:
        if given.keep is not None:
            work = given.keep
            work.mkdir(parents=True, exist_ok=True)
        else:
            work = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="octavo-kills-")))
        if given.quickstart:
            reference = given.reference or work / "reference"
            result = kill_the_command(given.quickstart, seed, work, given.recipe, given.overrides, reference)
        else:
            result = kill_the_loop(given.kills, seed, work)
    print(json.dumps(asdict(result)) if given.json else result.table())
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
