"""The command `python -m vitadapter_ext.merge`: an adapter file becomes an ordinary timm checkpoint."""

import sys
import types

from .cli import Parser, run

_DESCRIPTION = """\
Folds a trained method into its backbone: writes an ordinary timm checkpoint
that costs nothing more at inference. ARC merges, and what else is linear; a
bottleneck adapter, which has an activation inside, does not."""


def main(argv: list[str]) -> None:
    """Merges as the arguments say."""
    parser = Parser(prog="python -m vitadapter_ext.merge", description=_DESCRIPTION)
    parser.add_argument("--adapter", required=True, metavar="FILE", help="adapter.safetensors of a run, or of save()")
    parser.add_argument("--out", required=True, metavar="FILE", help="the new file, ending in .safetensors")
    parser.add_argument("--weights", metavar="FILE", help="the backbone's weights [where the adapter says]")
    given = vars(parser.parse_args(argv))
    del given["traceback"]
    from .checkpoint import merge_file  # here, so that --help and refused flags need not wait for timm

    done = merge_file(**given)
    backbone, data = done.metadata["backbone"], done.metadata["data"]
    arguments = {"num_classes": done.metadata["num_classes"], **backbone["arguments"]}
    arguments["checkpoint_path"] = str(done.path)
    print(f"method    {done.metadata['method']}, folded into {backbone['model']}")
    print(f"checked   logits of 4 random images differ by {done.difference:.1g} (relative) from the adapted model's")
    print(f"written   {done.path}, {done.bytes / 1e6:,.1f} MB")
    print("images    " + ", ".join(f"{key} {data.get(key)}" for key in ("input_size", "interpolation", "mean", "std")))
    print("\nIn Python:\n    import timm")
    print(f"    model = timm.create_model({backbone['model']!r}, {_as_code(arguments)}).eval()")


def _as_code(arguments: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


if __name__ == "__main__":
    sys.exit(run(main))


class _Callable(types.ModuleType):
    """`vitadapter_ext.merge` is a function, in whose place Python puts this module when somebody imports it."""

    def __call__(self, *args, **kwargs):
        from .merging import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
