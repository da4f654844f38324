"""Several processes that start ``octavo run`` in one folder at once: ``python tests/racing.py RACES SEED FOLDER``.

Forked from one that has imported torch, so that they really arrive together. The owner does not train, it holds the
folder until it is killed. Prints what was seen as one JSON object.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

RACERS = 3


def start(recipe: Path, folder: Path, gate: tuple[int, int], ready: int) -> int:
    """A racer that waits for the gate to be closed; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from octavo import pipeline
        from octavo.cli.main import main

        def hold(job: Any) -> dict[str, str]:
            os.write(ready, b"%d\n" % os.getpid())
            time.sleep(600)
            return {}

        pipeline.run = hold
        log = os.open(folder.with_suffix(f".{os.getpid()}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        os.close(gate[1])
        os.read(gate[0], 1)
        code = main(["run", str(recipe), "--out", str(folder), "--no-chat", "--quiet"])
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def race(recipe: Path, folder: Path, chance: random.Random) -> list[str]:
    """What went wrong in one race, and in the start after its winner was killed."""
    wrong: list[str] = []
    reader, ready = os.pipe()

    def begin(n: int) -> list[int]:
        gate = os.pipe()
        children = [start(recipe, folder, gate, ready) for _ in range(n)]
        os.close(gate[0])
        time.sleep(0.01 * chance.random())
        os.close(gate[1])  # now all of them read an end of file
        return children

    def ended(child: int) -> int | None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    children = begin(RACERS)
    owner = int(os.read(reader, 100).split()[0])
    for child in children:
        if child == owner:
            continue
        code, said = ended(child), folder.with_suffix(f".{child}").read_text()
        if code != 2 or said.count("\n") != 1:
            wrong.append(f"a loser ended with {code}: {said}")
        for part in (f"process {owner} on {socket.gethostname()} since 20", "error[LOCKED]", str(folder)):
            if part not in said:
                wrong.append(f"a loser does not say {part!r}: {said}")
    before = contents(folder)
    if json.loads(before["lock"][1])["pid"] != owner:
        wrong.append("the lock names another than the owner")
    if b"Locked" in before.get("log", (0, b""))[1]:
        wrong.append("a loser wrote into the owner's log")
    late = begin(1)[0]
    if (code := ended(late)) != 2:
        wrong.append(f"one who came late ended with {code}")
    if contents(folder) != before:
        wrong.append("one who came late touched the owner's files")
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    heir = begin(1)[0]
    if int(os.read(reader, 100).split()[0]) != heir:
        wrong.append("after the owner was killed nobody owned the folder")
    os.kill(heir, signal.SIGKILL)
    os.waitpid(heir, 0)
    os.close(reader), os.close(ready)
    return wrong


def main(races: int, seed: int, work: Path) -> None:
    from recipes import tiny_recipe

    import octavo.cli.run
    import octavo.config
    import octavo.launch

    octavo.launch.Console("quiet")
    recipe = work / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe(work)))
    chance, failures = random.Random(seed), list[str]()
    for i in range(races):
        failures += [f"race {i + 1}: {text}" for text in race(recipe, work / f"run{i}", chance)]
    print(json.dumps({"races": races, "failures": failures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
