"""Loading an app (control path): a path to a Python file, a module's name, a module, or a mapping of definitions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import DefinitionError
from .plan import Plan, compile_plan

__all__ = ["App", "load_app", "load_plan"]

App = str | Path | ModuleType | Mapping[str, Any]


def load_app(app: App) -> tuple[ModuleType | Mapping[str, Any], str]:
    """The definitions of an app and its name. Raises DefinitionError where a file or module cannot be loaded."""
    if isinstance(app, ModuleType):
        return app, app.__name__
    if isinstance(app, Mapping):
        return app, "app"
    text = str(app)
    if text.endswith(".py") or "/" in text:
        path = Path(text)
        if not path.is_file():
            raise DefinitionError(f"app {text}: no such file")
        return _load_file(path), path.stem
    try:
        return importlib.import_module(text), text
    except ImportError as error:
        if Path(text + ".py").is_file():
            raise DefinitionError(f"app {text}: no such module; for the file say {text}.py") from None
        raise DefinitionError(f"app {text}: {error}") from error
    except (DefinitionError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise DefinitionError(f"app {text}: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    # A name of its own, so that two apps called app.py do not meet; in sys.modules, so that annotations resolve and an
    # unchanged file that is loaded again gives the same classes.
    digest = hashlib.blake2b(str(resolved).encode() + b"\0" + resolved.read_bytes(), digest_size=8).hexdigest()
    name = f"penstock_app_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"app {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except DefinitionError:
        del sys.modules[name]
        raise
    except SyntaxError as error:
        del sys.modules[name]
        line = f", line {error.lineno}" if error.lineno else ""
        raise DefinitionError(f"app {path}{line}: {error.msg}") from None
    except KeyboardInterrupt:
        del sys.modules[name]
        raise
    except BaseException as error:
        # SystemExit too: an app that exits while it loads would end the caller, and with 0 look as if it had served.
        del sys.modules[name]
        place = _line_in(error, resolved)
        raise DefinitionError(f"app {path}{place}: {type(error).__name__}: {error}") from error
    return module


def _line_in(error: BaseException, path: Path) -> str:
    """`, line 12`: the last line of the app's own file in the traceback."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"


def load_plan(app: App) -> Plan:
    """Load an app and compile it. Raises DefinitionError with every problem found."""
    definitions, name = load_app(app)
    return compile_plan(definitions, name)
