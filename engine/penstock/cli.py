"""The `penstock` command (control path): check, serve, demo, and the offline commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import __version__
from .errors import DefinitionError, PenstockError
from .offline.command import OFFLINE

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="penstock", description="An event in, a decision out.")
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="print an app's plan as tables, or what is wrong with it")
    check.add_argument("app", help="a Python file or module with the app's definitions")
    check.add_argument("--models", metavar="DIR", help="also bind the models in this folder")
    serve = commands.add_parser("serve", help="serve an app, a folder of models, or both", add_help=False)
    serve.add_argument("rest", nargs=argparse.REMAINDER)
    demo = commands.add_parser("demo", help="run the fraud benchmark, then serve it", add_help=False)
    demo.add_argument("rest", nargs=argparse.REMAINDER)
    for name, about in OFFLINE.items():
        commands.add_parser(name, help=about, add_help=False).add_argument("rest", nargs=argparse.REMAINDER)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # serve and demo parse their own flags, so that their modules are imported only when they run.
    if argv[:1] == ["serve"]:
        from .server.command import main as serve_main

        return _guarded(lambda: serve_main(argv[1:]))
    if argv[:1] and argv[0] in OFFLINE:
        from .offline.command import main as offline_main

        return _guarded(lambda: offline_main(argv[0], argv[1:]))
    if argv[:1] == ["demo"]:
        from .demo.run import main as demo_main

        return _guarded(lambda: demo_main(argv[1:]))
    options = parser.parse_args(argv)
    return _guarded(lambda: _check(options.app, options.models))


def _guarded(run: object) -> int:
    try:
        return int(run() or 0)  # type: ignore[operator]
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        # A file or a folder that was named cannot be used; with its name, not with a traceback.
        name = f"{error.filename}: " if error.filename is not None else ""
        print(f"penstock: {name}{error.strerror or error}", file=sys.stderr)
        return 1


def _check(app: str, models: str | None) -> int:
    from .app import load_plan
    from .describe import describe_plan, warnings_of

    sys.path.insert(0, "")
    plan = load_plan(app)
    if models is not None:
        from .engine import Engine

        Engine(app, models=models)
    else:
        _check_functions(plan)
    print(describe_plan(plan))
    for warning in warnings_of(plan):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _check_functions(plan: Plan) -> None:
    """Compile the native functions: one that cannot be compiled is a wrong definition too."""
    from .functions import FunctionError, compile_function, mode_of

    problems = []
    for pipeline in plan.pipelines.values():
        for step in pipeline.functions:
            if mode_of(step.definition.mode) == "native":
                try:
                    compile_function(step.definition.function, step.argument_types, step.type, name=step.name)
                except FunctionError as error:
                    problems.append(f'pipeline "{pipeline.name}": {error}')
    if problems:
        raise DefinitionError(problems)
