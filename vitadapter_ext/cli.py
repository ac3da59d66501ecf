"""What do all commands share? One sentence instead of a traceback, exit codes, and flags made from a dataclass.

Exit codes: 0 done, 2 something the user gave is refused or could not be read or written, 130 stopped by Ctrl-C.
"""

import argparse
import ast
import contextlib
import difflib
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `ValueError` where argparse prints its usage, and suggests the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(usage="%(prog)s [option ...]", allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.add_argument("--traceback", action="store_true", help="with an error, also show where it comes from")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown argument {flag!r}: {hint}--help lists what there is")
        return parsed


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags in a column wide enough that their help begins on the same line; a switch and its opposite as one."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, max_help_position=26, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Calls `command` with the arguments (default: the process's own), prints its error, returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command(argv)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def sentence(error: Exception) -> str:
    """What an exception says, on one line and without an errno."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process" in text:  # its last line is the error itself
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def add_flag(group: argparse._ArgumentGroup, name: str, hint: Any, text: str, metavar: str | None = None) -> None:
    """Adds `--name` for a field of type `hint`; where it is not given, the parsed namespace does not have it.

    All but booleans stay strings: `value` makes values of them once it is known which dataclass asks.
    """
    flag = "--" + name.replace("_", "-")
    if bool in _kinds(hint):
        nargs = 0 if hint is bool else "?"  # a switch that may also have a value of another kind
        group.add_argument(flag, dest=name, action=_Switch, nargs=nargs, default=argparse.SUPPRESS, help=text)
    else:
        metavar = metavar or _metavar(hint)
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, metavar=metavar)


class _Switch(argparse.Action):
    """`--name` and `--no-name`."""

    def __init__(self, option_strings, dest, **kwargs):
        negative = ["--no-" + option[2:] for option in option_strings]
        super().__init__(option_strings + negative, dest, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        on = not option_string.startswith("--no-")
        if values and not on:
            raise ValueError(f"{option_string} takes no value, got {values!r}")
        setattr(namespace, self.dest, values or on)


def value(name: str, text: Any, hint: Any) -> Any:
    """The value of type `hint` (such as `float | str`) that the text of a flag means, else `ValueError`."""
    kinds = _kinds(hint)
    found = os.fspath(text) if isinstance(text, os.PathLike) else text
    if isinstance(found, list) and tuple in kinds:
        found = tuple(found)  # YAML has no tuples
    if isinstance(found, str) and set(kinds) - {str, types.NoneType}:
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(found)
    if isinstance(found, str) and tuple in kinds:
        found = tuple(word.strip() for word in found.split(","))
    if type(found) not in kinds:
        if type(found) is int and float in kinds:
            found = float(found)
        elif type(found) is int and tuple in kinds:
            found = (found,)
        elif str in kinds and isinstance(text, str):
            found = text
        else:
            wanted = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds if kind is not types.NoneType)
            raise ValueError(f"--{name.replace('_', '-')} takes {wanted}, got {text!r}")
    return found


_WORDS = {int: "a whole number", float: "a number", str: "a word", tuple: "numbers such as 2,4", bool: "True or False"}


def _kinds(hint: Any) -> tuple[type, ...]:
    """The plain types that a type hint admits."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(part) for part in typing.get_args(hint)})
    return (typing.get_origin(hint) or hint,)


def _metavar(hint: Any) -> str:
    kinds = _kinds(hint)
    return "LIST" if tuple in kinds else "WORD" if str in kinds else "X" if float in kinds else "N"
