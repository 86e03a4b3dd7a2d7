"""gothic-export: a model in the forms of other programs, compared with the original."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.shipping.request import DTYPES, FORMS, TYPES, Request


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-export",
        description="Write a model for transformers, llama.cpp and Ollama.",
    )
    parser.add_argument(
        "--checkpoint",
        help="RUN/best, RUN/latest or RUN/ITERATION (default: the model that comes with a clone)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--to",
        choices=FORMS,
        help="one form only (default: all, each in a folder of its own)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the weights for transformers (default: float32)",
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="f16",
        help="of the weights for llama.cpp (default: f16)",
    )
    parser.add_argument("--name", help="of the model (default: that of the run's folder)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an export that is there already"
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not run the exported files to compare them with the original",
    )
    parser.add_argument("--text", type=Path, help="what to compare on (default: validation text)")
    return parser


@command("gothic-export")
def main(argv: Sequence[str]) -> None:
    """Exports a checkpoint."""
    arguments = _parser().parse_args(argv)

    if arguments.text is not None and arguments.no_verify:
        raise UserError("--text is what to compare on; leave it or --no-verify out")

    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.checkpoints.release import gothic_dandy
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.machine.device import out_of_memory_reported
    from gothic_jax.machine.environment import warn_of_other_versions
    from gothic_jax.shipping import verify
    from gothic_jax.shipping.export import export, place_of, text_to_compare_on

    cache_compiled_programs()
    checkpoint = locate(arguments.checkpoint) if arguments.checkpoint else gothic_dandy()
    name = arguments.name or checkpoint.run.resolve().name
    if not re.fullmatch(r"[\w.+ -]+", name):
        raise UserError(f"--name {name!r} cannot be a file's name; use letters, digits, - and _")
    warn_of_other_versions(str(checkpoint), checkpoint.meta.environment)
    forms = (arguments.to,) if arguments.to else FORMS
    request = Request(forms, arguments.dtype, arguments.type, name)
    output: Path = arguments.output
    with out_of_memory_reported("export a smaller model"):
        text = None if arguments.no_verify else text_to_compare_on(checkpoint, arguments.text)
        proofs, missing = export(
            checkpoint, output, request, overwrite=arguments.overwrite, text=text
        )
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    if proofs:
        print(verify.table(proofs))
    for line in missing:
        print(f"not compared with the original: {line}", file=sys.stderr)
    if "ollama" in forms:
        model = shlex.quote(name)
        print(
            f"in {place_of(output, 'ollama', request)}: ollama create {model} -f Modelfile;"
            f" ollama run {model} 'The door'"
        )


if __name__ == "__main__":
    sys.exit(main())
