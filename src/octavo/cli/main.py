"""The ``octavo`` command: a table of verbs, each imported only when it is used, and one form of errors.

``octavo --help`` reads nothing but this file, so it is there at once; a verb's module (and torch, if it needs
it) is imported when the verb runs. Whatever happens, the user sees one line and the exit code says what it was:
0 done, 1 a bug of ours, 2 usage or configuration, 3 data, 4 checkpoint, 5 numeric, 6 resources, 75 stopped on
request, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import octavo
from octavo.errors import ConfigError, OctavoError, ResourceError, did_you_mean

BROKEN_PIPE = 128 + 13
INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """One verb: the module whose ``app`` it is, its group in ``--help``, its one line, and words put before its own."""

    module: str
    group: str
    help: str
    prefix: tuple[str, ...] = ()


MAKE, USE, KNOW, MOVE = "Make a model", "Use it", "Know it", "Move things"

VERBS: dict[str, Verb] = {
    "quickstart": Verb("octavo.cli.run", MAKE, "From raw text to a chat prompt in minutes.", ("quickstart",)),
    "run": Verb("octavo.cli.run", MAKE, "Run a whole recipe: data, tokenizer, training, tuning, scores, report."),
    "plan": Verb("octavo.cli.plan", MAKE, "Forecast memory, speed and time of a training on this machine."),
    "count": Verb("octavo.cli.count", KNOW, "Count what a model of any shape weighs and costs, without its weights."),
    "train": Verb("octavo.cli.train", MAKE, "Pretrain a model on text."),
    "tune": Verb("octavo.cli.tune", MAKE, "Tune a model on conversations or instruction pairs."),
    "resume": Verb("octavo.cli.resume", MAKE, "Go on with a stopped run exactly where it was."),
    "replay": Verb("octavo.cli.replay", KNOW, "Compute a step that gave no number again, and say where it began."),
    "generate": Verb("octavo.cli.generate", USE, "Continue a text with a model."),
    "chat": Verb("octavo.cli.chat", USE, "Talk to a model."),
    "classify": Verb("octavo.cli.classify", USE, "Say the classes of texts, or the tag of each word."),
    "embed": Verb("octavo.cli.embed", USE, "Turn texts into vectors."),
    "serve": Verb("octavo.cli.serve", USE, "Serve a model over HTTP (OpenAI-compatible) with a web chat."),
    "correct": Verb("octavo.cli.correct", USE, "Correct typing errors, or turn pinyin into Chinese, with n-grams."),
    "store": Verb("octavo.cli.store", USE, "Passages that a model looks up; changed without training."),
    "eval": Verb("octavo.cli.eval", KNOW, "Score a model on held-out text and questions."),
    "longcontext": Verb("octavo.cli.longcontext", KNOW, "Compare ways to read texts longer than those trained on."),
    "compare": Verb("octavo.cli.compare", KNOW, "Train many models on one text with one budget, and compare."),
    "ablate": Verb("octavo.cli.ablate", KNOW, "Train a recipe with several values of some keys, and compare."),
    "report": Verb("octavo.cli.report", KNOW, "Write the report page of a run, or of several side by side."),
    "checkpoint": Verb("octavo.cli.checkpoint", KNOW, "Read saved training state again: is every byte as it was?"),
    "certify": Verb("octavo.cli.certify", KNOW, "Compare training, engine, transformers and llama.cpp on one model."),
    "verify": Verb("octavo.cli.verify", KNOW, "Run every law on a component, and show whose numbers it agrees with."),
    "explain": Verb("octavo.cli.explain", KNOW, "What a component is: formula, shapes, cost, settings, proof."),
    "data": Verb("octavo.cli.data", MOVE, "Read, clean, check and pack text; show what a step sees."),
    "vectors": Verb("octavo.cli.vectors", MAKE, "Word vectors: train, neighbours, analogies, convert, export."),
    "tokenizer": Verb("octavo.cli.tokenizer", MOVE, "Train, apply and inspect tokenizers."),
    "ngram": Verb("octavo.cli.ngram", MAKE, "Count, smooth and score n-gram models; ARPA files."),
    "convert": Verb("octavo.cli.convert", MOVE, "Write a model of another program as a folder of safetensors."),
    "quantize": Verb("octavo.cli.quantize", MOVE, "Store a model's weights in 8 or 4 bits, rounded or calibrated."),
    "pull": Verb("octavo.cli.pull", MOVE, "Fetch a model from a hub or a mirror."),
    "schema": Verb("octavo.cli.schema", MOVE, "Print the JSON Schema of recipes, for editors."),
}


def load_verb(name: str) -> Any:
    """Import a verb's module and return its command."""
    app: typer.Typer = importlib.import_module(VERBS[name].module).app
    command = typer.main.get_command(app)
    command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """The root command: lists verbs from the table, imports only the one that is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return verb and TyperCommand(cmd_name, help=verb.help, rich_help_panel=verb.group)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, rest = args[0], args[1:]
        if name not in VERBS:
            if ctx.resilient_parsing:
                return None, None, rest
            raise ConfigError(f"there is no verb {name!r}", fix=did_you_mean(name, VERBS, thing="verb"))
        verb = VERBS[name]
        # An alias shows itself as the verb it stands for, so that its usage line is one that works.
        shown = verb.module.rpartition(".")[2] if verb.prefix else name
        return shown, load_verb(name), [*verb.prefix, *rest]


root = typer.Typer(cls=LazyGroup, rich_markup_mode="rich", subcommand_metavar="VERB ...")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"octavo {octavo.__version__}")
        raise typer.Exit


@root.callback()
def octavo_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """From raw text to a language model you can talk to, on the machine you have.

    Example: [bold]octavo quickstart[/bold]   ·   [bold]octavo VERB --help[/bold] explains a verb.
    """


class _Failures:
    """Where the full traceback of an error goes: the run's log once a run is open."""

    log: Path | None = None


def log_to(path: Path | str | None) -> None:
    """From now on append the traceback of any error to ``path`` (a run's log); ``None`` undoes it."""
    _Failures.log = None if path is None else Path(path)


def _write_traceback(error: BaseException, path: Path) -> Path:
    text = "".join(traceback.format_exception(error))
    entry = f"--- {datetime.now().astimezone().isoformat(timespec='seconds')} octavo {' '.join(sys.argv[1:])}\n{text}\n"
    for candidate in (path, Path(tempfile.gettempdir()) / "octavo-error.log"):
        try:
            with candidate.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(entry)
            return candidate
        except OSError:
            continue
    sys.stderr.write(text)
    return Path("stderr")


def _refuse(error: OctavoError, cause: BaseException, debug: bool) -> int:
    if debug:
        sys.stderr.write("".join(traceback.format_exception(cause)))
    elif _Failures.log is not None:
        _write_traceback(cause, _Failures.log)
    print(error, file=sys.stderr)
    return error.exit_code


def _usage_error(error: typer.TyperException) -> OctavoError | None:
    """A refusal of the argument parser in our form; ``None`` where the help has already been shown.

    The parser's own exception classes are not public, so what only some of them carry is asked for by name.
    """
    message = " ".join(error.format_message().split())
    if not message:
        return None
    what, _, hint = message.partition(" Did you mean ")
    what = what.partition(" (Possible options:")[0].rstrip(".")
    errors_of_value = getattr(error.__cause__, "errors", None)
    if errors_of_value is not None:
        what += f", got {errors_of_value()[0]['input']!r}"
    context = getattr(error, "ctx", None)
    fix = f"see `{context.command_path if context else 'octavo'} --help`"
    options = getattr(error, "possibilities", None)
    if hint:
        fix = f"did you mean {hint}"
    elif options:
        fix = f"did you mean `{options[0]}`? Otherwise {fix}"
    return ConfigError(what[:1].lower() + what[1:], fix=fix)


def _bug(error: Exception, debug: bool) -> int:
    path = _write_traceback(error, _Failures.log or Path("octavo-error.log"))
    if debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    what = " ".join(f"{type(error).__name__}: {error}".split())
    print(
        f"error[BUG]: {what[:300]}. Fix: this is our fault; please report it with the traceback in {path}.",
        file=sys.stderr,
    )
    return 1


def _quiet_pipe() -> int:
    """The reader of our output has gone: let nothing complain about it while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _call(args: list[str]) -> int:
    if sys.platform == "win32":
        raise ResourceError(
            "native Windows is not supported",
            fix="run octavo inside WSL (https://learn.microsoft.com/windows/wsl/install)",
        )
    result = typer.main.get_command(root)(args=args or ["--help"], prog_name="octavo", standalone_mode=False)
    sys.stdout.flush()
    if not args:
        return 2
    return result if isinstance(result, int) else 0


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        args: the words after ``octavo``; the process's own by default.

    Returns:
        The exit code (a verb's function returns ``None`` or one).
    """
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for i, word in enumerate(words) if word != "--debug" or i > end]
    log_to(None)
    try:
        return _call(words)
    except OctavoError as error:
        return _refuse(error, error, debug)
    except typer.TyperException as error:
        refusal = _usage_error(error)
        return 2 if refusal is None else _refuse(refusal, error, debug)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return _quiet_pipe()
    except SystemExit as stop:
        # Both typer and rich answer a broken pipe by leaving with 1, which here means a bug.
        if isinstance(stop.__context__, BrokenPipeError):
            return _quiet_pipe()
        raise
    except MemoryError as error:
        fix = "use a smaller micro-batch or model, or close other programs"
        return _refuse(ResourceError("not enough memory", fix=fix), error, debug)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = str(error.filename or "")
            return _refuse(ResourceError("the disk is full", fix="free some space", where=where), error, debug)
        if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            what = f"{error.filename}: {error.strerror}"
            return _refuse(ConfigError(what, fix="check the path and its rights"), error, debug)
        return _bug(error, debug)
    except Exception as error:
        return _bug(error, debug)


def entry_point() -> int:
    """``main`` as a process of its own, where a Ctrl-C may also come while the last line is written.

    Returns:
        The exit code, 130 for such a Ctrl-C; from then on another one ends the process without a traceback.
    """
    try:
        try:
            return main()
        finally:
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        return INTERRUPTED
