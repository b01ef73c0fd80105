"""The command `tts-kernels`, also `python -m tts_kernels.cli`. A subcommand's module is imported when it is called."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from ._version import __version__

COMMANDS = {
    "cost": "what a query costs: N candidates and their verifier, part by part, with and without sharing (a model)",
    "demo": "decode N samples over one shared KV tree, beside stock transformers",
    "doctor": "show which backends this machine has, and every reason why not the others",
    "economics": "training once against sampling for every query: where it breaks even, at equal accuracy",
    "profile": "run one query for real: wall time and bytes by part, beside their ceilings, stock, paged and ours",
    "report": "what queries cost, as one HTML page of figures and tables that needs no network",
    "tune": "search the kernels' configs on this GPU, and write what was measured to a table",
}
MODULES = {  # with `add_arguments` and `main`
    "cost": "cost.command",
    "demo": "demo",
    "doctor": "doctor",
    "economics": "cost.economics_command",
    "profile": "profile.command",
    "report": "cost.report_command",
    "tune": "measure.tune",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if all went well, 1 if the command failed or its check did, 2 for a wrong command line, 130 if it
    was interrupted."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # commands that have something finished by then show it themselves
        print("tts-kernels: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tts-kernels", description="Kernels for test-time scaling over shared KV.")
    parser.add_argument("--version", action="version", version=f"tts-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:
            try:
                module = import_module(f".{MODULES[name]}", __package__)
                module.add_arguments(command)
            except ModuleNotFoundError as error:
                if error.name not in ("transformers", "tqdm"):
                    raise
                print(f"tts-kernels {name}: {error}; pip install 'tts-kernels[transformers]'", file=sys.stderr)
                return 1
            command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"tts-kernels {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
