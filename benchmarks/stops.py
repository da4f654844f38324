"""Ask a run to stop at random moments of each of its parts: does it save, leave with 75, and lose nothing?

    python benchmarks/stops.py --stops 20           SIGTERM and SIGINT, some of them twice; a table of what was seen
    python benchmarks/stops.py --stops 6 --compile  the same in a compiled training (compiling takes a minute each time)

The real command runs in forked children that find torch imported. Each chain of stops ends with a run to the end, whose
logs, shards, tokenizer and weights must equal those of a run that was never stopped. The exit code is 1 if any was not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import kills  # noqa: E402
from kills import Result  # noqa: E402

PLACES = ("data", "tokenizer", "shards", "warm-up", "training", "validation", "sampling", "saving", "tuning", "eval")
SAVED = ("warm-up", "training", "validation", "sampling", "saving", "tuning")
LATEST_SECONDS = 10.0


def recipe_of(folder: Path, compiled: bool) -> dict[str, Any]:
    """The tests' tiny recipe, a little longer, with a tokenizer that is trained and all that is looked at."""
    from recipes import tiny_recipe

    recipe = tiny_recipe(folder)
    recipe["tokenizer"] = {"kind": "byte_bpe", "vocab_size": 300}
    recipe["train"] |= {"steps": 12, "schedule": {"kind": "cosine", "warmup": 3}, "valid_every": 5, "sample_every": 6}
    recipe["train"] |= {"save_every": 7, "sample_tokens": 12}
    recipe["model"]["blocks"]["block"]["dropout"] = 0.1
    recipe["eval"] = {"orders": [1, 2, 3], "answers": 4}
    if compiled:
        for section in ("train", "tune"):
            recipe[section]["compile"] = "step"
    return recipe


def preload() -> None:
    """Import in the parent what every child needs; nothing is computed here, so forking stays safe."""
    kills.preload()
    import octavo.cli.run
    import octavo.launch
    import octavo.pipeline
    import octavo.report.page  # noqa: F401


def announce(tell: Callable[[str], None]) -> None:
    """Wrap the parts of a run, so that they tell when they begin and end."""
    from octavo.data import prepare
    from octavo.pipeline import judging, text, training
    from octavo.training import checkpoint
    from octavo.training.loop import Trainer

    def wrap(owner: Any, name: str, place: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            here = place(*arguments)
            if here:
                tell(f"begin {here}")
            try:
                return real(*arguments, **named)
            finally:
                if here:
                    tell(f"end {here}")

        setattr(owner, name, wrapped)

    def of_step(trainer: Any) -> str:
        if trainer.held.folder.name == "tune":
            return "tuning"
        return "warm-up" if trainer.step < 3 else "training"

    wrap(prepare, "clean_documents", lambda *_: "data")
    wrap(text, "learn", lambda *_: "tokenizer")
    wrap(text, "write_shards", lambda *_: "shards")
    wrap(Trainer, "train_step", of_step)
    wrap(Trainer, "validate", lambda *_: "validation")
    wrap(checkpoint, "save", lambda *_: "saving")
    wrap(judging, "evaluate", lambda *_: "eval")
    made = training.sampler

    def sampler(*arguments: Any) -> Callable[[], Any]:
        sample = made(*arguments)

        def announced() -> Any:
            tell("begin sampling")
            try:
                return sample()
            finally:
                tell("end sampling")

        return announced

    training.sampler = sampler


class Child:
    """A run in a process group of its own, and what it tells of where it is."""

    def __init__(self, recipe: Path, folder: Path, *, slow_tokenizer: bool = False):
        reader, writer = os.pipe()
        self.begun = time.monotonic()
        self.id = os.fork()
        if self.id == 0:
            code = 1
            try:
                os.close(reader)
                os.setsid()
                log = os.open(folder.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(log, 1), os.dup2(log, 2)
                code = self._run(recipe, folder, writer, slow_tokenizer)
            finally:
                os._exit(code)
        os.close(writer)
        self._reader = os.fdopen(reader, "rb")

    @staticmethod
    def _run(recipe: Path, folder: Path, writer: int, slow_tokenizer: bool) -> int:
        from octavo.cli.main import entry_point
        from octavo.data import vocabulary

        if slow_tokenizer:
            vocabulary.SOON_BYTES = 0  # trained in a process of its own, as on much text
        announce(lambda what: os.write(writer, f"{time.monotonic()} {what}\n".encode()) and None)
        sys.argv = ["octavo", "run", str(recipe), "--out", str(folder), "--no-chat", "--quiet", "--workers", "2"]
        return entry_point()

    def reach(self, place: str, times: int = 1) -> bool:
        """Wait until ``place`` has begun ``times`` times; False if the run ended before."""
        for line in self._reader:
            times -= line.decode().split(maxsplit=1)[1].strip() == f"begin {place}"
            if times == 0:
                return True
        return False

    def told(self) -> list[tuple[float, str]]:
        """All that is told until the end: (seconds, what)."""
        lines = [line.decode().split(maxsplit=1) for line in self._reader]
        return [(float(moment), what.strip()) for moment, what in lines]

    def wait(self, seconds: float) -> int | None:
        code = kills.wait(self.id, seconds)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.id, signal.SIGKILL)
            os.waitpid(self.id, 0)
        self._reader.close()
        return code

    def orphans(self) -> bool:
        """Whether processes of the group are there a moment after the end; they are ended."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            try:
                os.killpg(self.id, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)
        os.killpg(self.id, signal.SIGKILL)
        return True


def outcome(folder: Path) -> dict[str, Any]:
    found = kills.outcome(folder)
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    found["scores"] = scores["model"]["bits_per_byte"], scores["baseline"]["best_bits_per_byte"]
    return found


def lost(folder: Path) -> str:
    """Empty if the newest checkpoint is of the last step that was logged."""
    from octavo.training import checkpoint

    for stage in ("tune", "pretrain"):
        if (folder / stage / "metrics.jsonl").is_file():
            found = checkpoint.newest(folder / stage / "checkpoints")
            saved, logged = found.step if found else -1, kills.steps_logged(folder, stage)
            return "" if saved == logged else f"{stage} is saved at step {saved}, {logged} steps are logged"
    return "nothing was trained"


def stop_at_random(n: int, seed: int, work: Path, *, compiled: bool = False) -> Result:
    """``n`` stops, every fifth a second Ctrl-C, in chains that go through all places of a run."""
    preload()
    result = Result("stops of octavo run", seed=seed)
    chance = random.Random(seed)
    patience = 600.0 if compiled else 60.0
    recipe = work / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(work, compiled)))
    began = time.monotonic()
    reference = Child(recipe, work / "reference")
    told = reference.told()
    if (code := reference.wait(patience)) != 0:
        raise SystemExit(f"the run that is not stopped ended with {code}:\n{(work / 'reference.stderr').read_text()}")
    expected = outcome(work / "reference")
    lasts: dict[str, float] = {}
    for i, (moment, what) in enumerate(told):
        if what.startswith("begin "):
            place = what.removeprefix("begin ")
            lasts.setdefault(place, next(t for t, other in told[i:] if other == f"end {place}") - moment)
    chain = 0
    longest = {"75": 0.0, "130": 0.0}
    while result.kills < n and chain < n:
        folder = work / f"chain-{chain}"
        for place in PLACES:
            if result.kills >= n:
                break
            twice = (result.kills + chain) % 5 == 4
            number = signal.SIGINT if twice or chance.random() < 0.5 else signal.SIGTERM
            child = Child(recipe, folder, slow_tokenizer=place == "tokenizer" and chain % 2 == 0)
            if not child.reach(place):
                # On a busy machine a signal can come too late, and find the next place done: another chain makes up.
                if (code := child.wait(patience)) != 0:
                    result.failures.append(f"{place} was not reached, exit code {code}")
                break
            time.sleep(0.9 * lasts[place] * chance.random())
            os.kill(child.id, number)
            sent = time.monotonic()
            if twice:
                time.sleep(0.001 + 0.05 * chance.random())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.id, signal.SIGINT)
                    sent = time.monotonic()
            code = child.wait(patience)
            if twice and code == -signal.SIGINT:
                code = 130  # as a shell says it
            seconds = time.monotonic() - sent
            what = f"stop {result.kills + 1} ({'SIGINT twice' if twice else number.name} in {place})"
            result.kills += 1
            result.where[place] = result.where.get(place, 0) + 1
            # The second signal may find a run that has just ended by the first, or one that is about to.
            if code not in ((75, 130) if twice else (75,)):
                result.failures.append(f"{what}: exit code {code}: {folder.with_suffix('.stderr').read_text()[-300:]}")
            elif seconds > LATEST_SECONDS:
                result.failures.append(f"{what}: took {seconds:.1f} seconds")
            longest[str(code)] = max(longest.get(str(code), 0.0), seconds)
            if child.orphans():
                result.failures.append(f"{what}: left processes behind")
            if code == 75 and place in SAVED and (missing := lost(folder)):
                result.failures.append(f"{what}: {missing}")
        last = Child(recipe, folder)
        last.told()
        result.runs += 1
        chain += 1
        if (code := last.wait(patience)) != 0:
            result.failures.append(f"chain {chain}: the last run ended with {code}")
            continue
        found = outcome(folder)
        for name in sorted(expected.keys() | found.keys()):
            if name.endswith(" log"):
                result.failures += [f"{name}: {t}" for t in kills.differences(found[name], expected[name], whole=True)]
            elif expected.get(name) != found.get(name):
                result.failures.append(f"chain {chain}, {name}: {found.get(name)}, expected {expected.get(name)}")
        if left := [path.name for path in folder.rglob("*.tmp-*")]:
            result.failures.append(f"chain {chain}: left {left}")
    if result.kills < n:
        result.failures.append(f"only {result.kills} of {n} stops in {chain} chains")
    result.seconds = time.monotonic() - began
    result.what += f" (longest {longest['75']:.2f} s to exit 75, {longest['130']:.2f} s to exit 130)"
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, help="of the moments; default: a new one, which is printed")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(2**32)
    with contextlib.ExitStack() as cleanup:
        if given.keep is not None:
            given.keep.mkdir(parents=True, exist_ok=True)
        work = given.keep or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="octavo-stops-")))
        result = stop_at_random(given.stops, seed, work, compiled=given.compile)
    print(json.dumps(asdict(result)) if given.json else result.table())
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
