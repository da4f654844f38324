"""Real runs under a limit of their address space: ``python tests/short_of_memory.py FOLDER``.

Forked from a process that has imported torch. Prints, for each, the exit code, what it said and what is left, as JSON.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20


def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit(room: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (held() + room, resource.RLIM_INFINITY))


def limit_in_training() -> None:
    """From the first step on: the estimate before has found nothing wrong."""
    from octavo.training.loop import Trainer

    real = Trainer.train_step

    def step(self: Any) -> dict[str, float]:
        limit(8 * MIB)
        return real(self)

    Trainer.train_step = step  # type: ignore[method-assign]


def run(words: list[str], before: Callable[[], None], log: Path) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            from octavo.cli.main import main

            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            before()
            code = main([*words, "--no-chat"] if words[0] == "run" else words)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "said": log.read_text()}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pretrain" / "checkpoints").glob("*"))


def main(work: Path) -> None:
    from recipes import tiny_recipe

    from octavo.pipeline import judging

    judging.report = lambda _: {}
    raw = tiny_recipe(work)
    raw["tune"] = raw["eval"] = None
    raw["data"]["split"] = {"held_out": 0.0}
    raw["train"] |= {"steps": 4, "save_every": 2, "step_tokens": 8192, "sample_prompts": []}
    raw["model"] |= {"d_model": 64, "n_layers": 2}

    def recipe(name: str, **train: Any) -> str:
        path = work / f"{name}.yaml"
        path.write_text(json.dumps({**raw, "train": {**raw["train"], **train}}))
        return str(path)

    def nothing() -> None:
        pass

    quiet = ["--quiet", "--workers", "1"]
    found: dict[str, Any] = {}

    # A step of 16 million tokens, in an address space with a gibibyte left.
    words = ["run", recipe("wide", step_tokens=1 << 24), "--out", str(work / "wide"), *quiet]
    found["wide"] = run(words, lambda: limit(1024 * MIB), work / "wide.log") | {"steps": steps(work / "wide")}

    # Weights that fit nowhere.
    path = Path(recipe("large"))
    large = {**raw, "model": {**raw["model"], "d_model": 1 << 15, "n_layers": 40}}
    path.write_text(json.dumps(large))
    words = ["run", str(path), "--out", str(work / "large"), *quiet]
    found["large"] = run(words, lambda: limit(4096 * MIB), work / "large.log") | {"steps": steps(work / "large")}

    # Memory that is there at first and gone in the fourth step; then the run goes on where there is some again.
    folder = work / "run"
    words = ["run", recipe("run"), "--out", str(folder), *quiet]
    assert run([*words, "train.steps=4"], nothing, work / "whole.log")["code"] == 0
    os.rename(folder, work / "whole")

    def stop_after_three() -> None:
        from octavo.stop import StopSignal
        from octavo.training.loop import Trainer

        real = Trainer.train_step

        def step(self: Any) -> dict[str, float]:
            figures = real(self)
            if self.step == 3:
                self.held.stop._signal = "SIGTERM"
            return figures

        assert StopSignal
        Trainer.train_step = step  # type: ignore[method-assign]

    stopped = run(words, stop_after_three, work / "stopped.log")
    short = run(["resume", str(folder), "--quiet"], limit_in_training, work / "short.log")
    found["short"] = short | {"stopped": stopped["code"], "steps": steps(folder)}
    found["again"] = run(["resume", str(folder), "--quiet"], nothing, work / "again.log")
    same = [(work / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    found["again"]["same"] = same[0] == same[1]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
