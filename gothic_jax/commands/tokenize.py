"""gothic-tokenize: trains a byte-level BPE tokenizer on text files."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.text.works import PROCESSED, find_text, read_text, works_of


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-tokenize", description="Train a byte-level BPE tokenizer on text files."
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=["mixed_train.txt"],
        help=f"training texts; a bare name is looked up in {PROCESSED}",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of tokens")
    parser.add_argument("--output", default="data/tokenizer.json", help="where to write it")
    parser.add_argument(
        "--min-frequency", type=int, default=2, help="a pair seen less often is not merged"
    )
    return parser


@command("gothic-tokenize")
def main(argv: Sequence[str]) -> None:
    """Trains a tokenizer on text files."""
    arguments = _parser().parse_args(argv)
    if arguments.min_frequency < 1:
        raise UserError(f"--min-frequency must be at least 1, not {arguments.min_frequency}")
    paths = [find_text(name, PROCESSED) for name in arguments.files]
    works = [work for path in paths for work in works_of(path, read_text(path))]

    from gothic_jax.machine.files import write_atomically
    from gothic_jax.text.tokenizer import Tokenizer
    from gothic_jax.text.tokens import load_tokens

    tokenizer = Tokenizer.train(works, arguments.vocab_size, arguments.min_frequency)
    output = Path(arguments.output)
    write_atomically(output, tokenizer.to_json(pretty=True).encode())
    # Kept beside the text, where training finds them.
    n_tokens = sum(load_tokens(path, tokenizer).tokens.size for path in paths) - len(works)
    n_bytes = sum(len(work.text.encode()) for work in works)
    longest = sorted(tokenizer.token_bytes, key=len, reverse=True)[:8]
    print(f"{output}: {tokenizer.vocab_size:,} tokens")
    print(f"{n_bytes:,} bytes are {n_tokens:,} tokens: {n_bytes / n_tokens:.3f} bytes a token")
    print(f"longest tokens: {', '.join(repr(t.decode('utf-8', 'replace')) for t in longest)}")
    print(f"special tokens: {' '.join(tokenizer.special_tokens)}")
    if tokenizer.vocab_size < arguments.vocab_size:
        print(
            f"The texts have no more pairs seen {arguments.min_frequency} times. Train with"
            f" --config.model.vocab_size={tokenizer.vocab_size}"
        )


if __name__ == "__main__":
    sys.exit(main())
