"""`preftune VERB [RUN.yaml] [key=value ...]`: the verbs, their help, and what happens to an error.

Nothing heavy is imported here: help and refusals answer at once. A verb's own module is imported when it runs.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from preftune import __version__, processes
from preftune.cli.console import setup
from preftune.config import all_keys
from preftune.data.targets import listing
from preftune.errors import Interrupted, PreftuneError, Refusal, RunFailed, nearest
from preftune.keys import VERB_KEYS
from preftune.methods.table import by_marks
from preftune.runs.folder import to_json

# typer carries a click of its own, which has no public name there
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
    help="Preference alignment of language models: people's judgements in, an aligned model and a verdict out.\n\n"
    "Every verb takes one YAML file and/or key=value words, the same keys both ways; later words win.",
)

Words = Annotated[list[str] | None, typer.Argument(hidden=True)]  # the usage line says what they are
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, the rest on standard error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]

VERBS = {
    "check": "Say what is wrong with data, row by row, before training.",
    "train": "Train a model on preferences, rankings, ratings or demonstrations.",
    "evaluate": "Held-out accuracy of a model, or its win rate against another.",
    "score": "Log-probability of every response, one JSON line each.",
    "generate": "Sample responses to prompts.",
    "doctor": "Check on your model and rows that scores are exact, and what a run takes.",
    "chat": "Talk to a model or a run.",
    "convert": "Write data as another format, and say what that cannot hold.",
    "merge": "Fold an adapter run into a plain model.",
    "report": "Write the report of runs again, and compare several on one page.",
    "demo": "The controlled-sentiment experiment, from the packaged model to a verdict.",
}

WORDS = dict.fromkeys(VERBS, "[RUN.yaml] [key=value ...]") | {
    "check": "DATA ... [RUN.yaml] [key=value ...]",
    "convert": "IN OUT to=FORMAT [key=value ...]",
    "merge": "RUN out=DIR [key=value ...]",
    "report": "RUN ... [out=PAGE.html]",
}

LATER = ("judge", "iterate", "label", "sweep", "monitor")


class _Verb(TyperCommand):
    """A command whose usage line names the words of the verb."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [WORDS[self.name or ""], "[OPTIONS]"]


def _epilog(verb: str) -> str:
    keys = VERB_KEYS.get(verb)
    if keys is None:
        return ""
    rows = [(k, text) for k, text in all_keys(keys).items() if text]
    width = max(len(key) for key, _ in rows)
    told = "\b\nKeys:\n" + "\n".join(f"  {key:<{width}}  {text}" for key, text in rows)
    if "method" in keys.model_fields:
        told += "\n\n\b\nMethods, by the judgements that they take (docs/methods/README.md):"
        told += "".join(f"\n  {marks}: {' '.join(names)}" for marks, names in by_marks().items())
    return f"{told}\n\n{listing()}" if verb == "convert" else told


def _verb(name: str) -> Callable[..., None]:
    def call(words: Words = None, as_json: Json = False, quiet: Quiet = False) -> None:
        setup(quiet=quiet)
        if processes.asked() > 1 and name != "train":
            raise Refusal(f"{name} is one process; of several processes only train makes use", code="one_process")
        # a user's own scorer or model code may print: the document stands alone on standard output
        with _stoppable(), redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = import_module(f"preftune.cli.{name}").run(words or [], as_json)
        if as_json and not processes.number():
            print(to_json({} if result is None else result))

    return call


@contextmanager
def _stoppable() -> Generator[None]:
    """SIGTERM ends a verb as Ctrl-C does. For where nothing has to be saved: a run in training asks for signals itself."""
    came = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = signal.Signals(number)
        raise KeyboardInterrupt  # no Exception, which somebody's code might take for its own

    own = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if own else None
    try:
        yield
    except KeyboardInterrupt as stopped:  # typer would make it exit 0
        raise Interrupted(f"stopped by {came.name}", signal_number=came) from stopped
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)


for verb, text in VERBS.items():
    app.command(verb, cls=_Verb, help=text, epilog=_epilog(verb))(_verb(verb))


def _version(value: bool) -> None:
    if value:
        print(f"preftune {__version__}")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


def run(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 began and failed, 2 refused, 130 and 143 after saving."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        typer.main.get_command(app).main(arguments or ["--help"], prog_name="preftune", standalone_mode=False)
        processes.leave(0)
    except PreftuneError as error:
        _fail(error, arguments)
    except UsageError as error:
        _fail(_usage(error, arguments), arguments)
    except (KeyboardInterrupt, typer.Abort):
        _fail(Interrupted("stopped by SIGINT", signal_number=signal.SIGINT), arguments)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that was taken away
        place = str(error.filename) if error.filename is not None else None
        kind = Refusal if error.errno == errno.ENAMETOOLONG else RunFailed  # where no file can be, nothing was begun
        _fail(kind(error.strerror or str(error), code="os_error", file=place), arguments)
    except Exception as error:
        if processes.is_lost(error):
            _fail(RunFailed("another process of this run has ended: its own line says why", code="lost_process"), arguments)
        # ours to mend: the trace is shown, and a program still gets its document
        if "--json" in arguments:
            _print_error(RunFailed(f"{type(error).__name__}: {error}", code="internal"))
        raise


def _fail(error: PreftuneError, arguments: list[str]) -> None:
    # of the processes of one run each comes to the same error, and the first one says it, but for what befalls one of them
    if error.code in ("out_of_memory", "os_error", "bad_environment") or not processes.number():
        if "--json" in arguments:
            _print_error(error)
        print(f"preftune: {error}", file=sys.stderr)
    processes.leave(error.exit_code)


def _print_error(error: PreftuneError) -> None:
    print(to_json(error.document or {"error": error.as_dict()}))


def _usage(error: Any, arguments: list[str]) -> Refusal:
    """Click's complaint in our words: a flag that is meant as a key, or a verb that is not there."""
    option: Any = getattr(error, "option_name", None)
    flags = "flags: --help --json --quiet --version"
    if option in ("--json", "--quiet"):
        return Refusal(f"{option} stands after a verb: preftune VERB {option}. Verbs: {', '.join(VERBS)}", code="usage")
    if option:
        key = option.lstrip("-").replace("-", "_").split("=")[0]
        how = f": {key}=..." if len(key) > 1 else ""
        return Refusal(f"there is no flag {option}; keys are written key=value{how} ({flags})", code="unknown_flag")
    words = [a for a in arguments if not a.startswith("-")]
    if words and words[0] in LATER:
        return Refusal(f"{words[0]} is not in this version. Verbs: {', '.join(VERBS)}", code="unknown_verb")
    if words and words[0] not in VERBS:
        return Refusal(
            f"there is no verb {words[0]!r}.{nearest(words[0], VERBS)} Verbs: {', '.join(VERBS)}", code="unknown_verb"
        )
    return Refusal(" ".join(error.format_message().split()), code="usage")
