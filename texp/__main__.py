"""The command `texp`, also `python -m texp`."""

import sys

from texp import native


def main() -> None:
    """Runs the command line. If its libraries are missing, says in one line what to install."""
    if sys.argv[1:] == ["build"]:  # without typer and rich, which container images often lack
        sys.exit(native.main())
    try:
        from texp.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f'texp: the command line needs {error.name}: install texp with the extra "demo", as in '
            'pip install ".[demo]"'
        )
    sys.exit(run())


if __name__ == "__main__":
    main()
