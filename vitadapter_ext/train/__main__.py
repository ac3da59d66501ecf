"""Which flags does `python -m vitadapter_ext.train` take? Those of `Config` and of every method, from their fields."""

import argparse
import dataclasses
import functools
import operator
import shutil
import sys
import textwrap

from ..cli import Parser, add_flag, run
from ..data.catalog import SUITES
from ..methods import METHODS
from .config import Config, configure, field_hints, on_top, read_settings
from .recipes import RECIPES

_PICTURE = "attached.png"
_DESCRIPTION = """\
Fine-tunes a Vision Transformer with few trained parameters, and says how well.

Without arguments: the small ViT that ships in this package is adapted to
scikit-learn's handwritten digits. With --data it is adapted to a folder of
images; with --model any timm ViT is. Defaults stand in brackets; the recipe,
"embedded" where there is no --model, goes before them, the file of --config
before the recipe, and flags before all."""


def main(argv: list[str]) -> None:
    """Trains as the arguments say, one run or a suite, or with --show draws what would be trained."""
    given = vars(_parser().parse_args(argv))
    del given["traceback"]
    picture = given.pop("show", None)
    if file := given.pop("config", None):
        given = on_top(read_settings(file), given)
    suite = given.pop("suite", None)
    if suite is not None:
        if picture is not None:
            raise ValueError("--show draws one run: name a task with --dataset in place of --suite")
        from .suite import run_suite

        run_suite(suite, **given)
        return
    config = configure(**given)
    from .pipeline import fit, show  # here, so that --help and refused flags need not wait for timm

    if picture is None:
        fit(config)
    else:
        show(config, picture)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m vitadapter_ext.train",
        description=_DESCRIPTION,
        epilog=f"{_datasets()}\n\n{_methods()}\n\n{_recipes()}",
    )
    names = ("data", "backbone", "method", "augmentation", "training", "protocol", "run")
    groups = {name: parser.add_argument_group(name) for name in names}
    hints = field_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name == "method":
            add_flag(groups["method"], "method", str, ", ".join(METHODS) + " [adapter]", metavar="NAME")
            _add_method_flags(groups["method"])
            continue
        text = field.metadata["help"]
        if field.default is not None and not isinstance(field.default, bool) and "[" not in text:
            text += f" [{field.default}]"
        add_flag(groups[field.metadata["group"]], field.name, hints[field.name], text, field.metadata["metavar"])
    add_flag(groups["data"], "suite", str, "all tasks of one: " + ", ".join(SUITES), metavar="NAME")
    add_flag(groups["run"], "config", str, "settings in YAML, such as a run's config.yaml", metavar="FILE")
    groups["run"].add_argument(
        "--show",
        nargs="?",
        const=_PICTURE,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"train nothing: a table of what each block would train, and a .png, .svg or .pdf of it [{_PICTURE}]",
    )
    return parser


def _add_method_flags(group) -> None:
    """A flag for each field of any method: its metadata's `help`, and the default in every method that has it."""
    fields: dict[str, dict[str, dataclasses.Field]] = {}
    for name, kind in METHODS.items():
        for field in dataclasses.fields(kind):
            if field.init:
                fields.setdefault(field.name, {})[name] = field
    for option, owners in fields.items():
        first = next(iter(owners))
        defaults = [f"{name}: {_shown(field.default)}" for name, field in owners.items()]
        defaults = ", ".join(defaults) if len(owners) > 1 else _shown(owners[first].default)
        text = " ".join(part for part in (owners[first].metadata.get("help"), defaults and f"[{defaults}]") if part)
        hint = functools.reduce(operator.or_, (field_hints(METHODS[name])[option] for name in owners))
        add_flag(group, option, hint, text)


def _shown(default: object) -> str:
    if default is None:
        return ""  # the words say what is done then
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _datasets() -> str:
    names = ["digits", "cifar10", "cifar100"]
    names += [f"{suite}/{task}" for suite in SUITES for task in SUITES[suite].groups]
    lines = ["data sets for --dataset (all but digits and minitab lie under --data):"]
    lines += textwrap.wrap(
        " ".join(names), _width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    lines.append("  vtab1k, minitab: also --retrain --select last --augmentation none --squash")
    lines.append("  and what timm reads: torch/NAME hfds/NAME hfids/NAME tfds/NAME wds/NAME")
    return "\n".join(lines)


def _methods() -> str:
    return "\n".join(["methods:", *(f"  {name:<14} {kind.description}" for name, kind in METHODS.items())])


def _recipes() -> str:
    lines = ["recipes:"]
    for name, recipe in RECIPES.items():
        parts = [recipe.description, f"from: {recipe.source}"]
        if recipe.checkpoint:
            parts.append(f"--model {recipe.checkpoint} --pretrained")
        settings = {"method": recipe.method, **recipe.options, **recipe.settings}
        parts.append(" ".join(_flag(key, setting) for key, setting in settings.items()))
        lines.append(f"  {name}")
        for part in parts:
            lines += textwrap.wrap(
                part, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
    return "\n".join(lines)


def _width() -> int:
    return shutil.get_terminal_size().columns - 2


def _flag(name: str, setting: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(setting, bool):
        return f"--{flag}" if setting else f"--no-{flag}"
    return f"--{flag} {_shown(setting)}"


if __name__ == "__main__":
    sys.exit(run(main))
