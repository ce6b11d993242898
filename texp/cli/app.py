"""The program `texp`: its commands, and how their errors are shown."""

import sys

import typer

from texp import native
from texp.cli import audit, bench, build, demo, info, schedule
from texp.cli.common import EXTRA, UsageError
from texp.invariance.equations import AuditError
from texp.native.build import SettingError

app = typer.Typer(
    name="texp",
    help="SGD in the exponential-learning-rate form of Li & Arora (ICLR 2020).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo.demo, schedule.schedule, audit.audit, bench.bench, build.build, info.info):
    app.command()(command)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2, with one line on stderr, for bad arguments."""
    try:
        return app(arguments, prog_name="texp", standalone_mode=False) or 0
    except UsageError as error:
        return _fail(2, error.format_message() or "no command given, see texp --help")
    except ModuleNotFoundError as error:
        library = EXTRA.get((error.name or "").split(".")[0])
        if library is None:
            raise
        remedy = 'install texp with the extra "demo", as in pip install ".[demo]"'
        return _fail(1, f"this command needs {library}: {remedy}")
    except (OSError, AuditError, SettingError, native.MissingError) as error:
        return _fail(1, str(error))
    except (typer.Abort, KeyboardInterrupt):
        return _fail(130, "interrupted")


def _fail(code: int, message: str) -> int:
    print(f"texp: {' '.join(message.split())}", file=sys.stderr)
    return code
