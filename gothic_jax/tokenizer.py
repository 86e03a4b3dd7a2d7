"""gothic-tokenize: byte-level BPE, whose special tokens are the voices of the texts."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gothic_jax.cli import ArgumentParser, UserError, command
from gothic_jax.files import write_atomically
from gothic_jax.texts import (
    END_OF_TEXT,
    MARKER,
    RESERVED_VOICES,
    Work,
    find_text,
    read_text,
    split_works,
    voice_token,
)


def train_tokenizer(works: Sequence[Work], vocab_size: int, min_frequency: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, specials and bytes included."""
    voices = sorted({work.voice for work in works if work.voice})
    if reserved := RESERVED_VOICES.intersection(voices):
        raise UserError(f"no voice can be called {', '.join(reserved)}; name it otherwise")
    specials = [END_OF_TEXT, *map(voice_token, voices)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(specials) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"--vocab-size {vocab_size} is too small: {smallest} tokens are needed for the 256"
            f" bytes and {len(specials)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    paragraphs = (paragraph for work in works for paragraph in work.text.splitlines(keepends=True))
    tokenizer.train_from_iterator(paragraphs, trainer)
    # Within a text, a marker is a word like others; only dataset.py and chat.py place tokens.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file; raises UserError where it is missing or cannot serve here."""
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `gothic-tokenize` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); `gothic-tokenize` makes it") from error


def parse_tokenizer(json: str, source: str) -> Tokenizer:
    """The tokenizer of a JSON text from `source`; raises UserError where it cannot serve here."""
    try:
        tokenizer = Tokenizer.from_str(json)
    # The library raises bare Exception, and a PanicException that is no Exception at all.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(
            f"{source} is no tokenizer ({error}); `gothic-tokenize` makes one"
        ) from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if END_OF_TEXT not in special_tokens(tokenizer):
        raise UserError(
            f"{source} has no {END_OF_TEXT} token; `gothic-tokenize` makes one that has"
        )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{source} has gaps in its token ids; `gothic-tokenize` makes a sound one")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    words = vocabulary.keys() - special_tokens(tokenizer).keys()
    if not alphabet <= words or not alphabet.issuperset("".join(words)):
        raise UserError(f"{source} is not byte-level; `gothic-tokenize` makes one that is")
    tokenizer.encode_special_tokens = True  # the file does not keep this
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON, in hex."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, by their text."""
    return {
        token.content: index
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of `<|endoftext|>`."""
    return special_tokens(tokenizer)[END_OF_TEXT]


def voices(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the voice tokens, by the voice's name, in the order of the ids."""
    return {
        match[1]: index
        for token, index in sorted(special_tokens(tokenizer).items(), key=lambda item: item[1])
        if token != END_OF_TEXT and (match := MARKER.fullmatch(token))
    }


def _byte_of_character() -> dict[str, int]:
    """What byte each character of the byte-level alphabet stands for.

    GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes, in
    order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + rank): byte for rank, byte in enumerate(hidden)
    }


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token stands for, by id; none for special tokens."""
    table = _byte_of_character()
    specials = set(special_tokens(tokenizer).values())
    result = [b""] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        if index not in specials:
            result[index] = bytes(table[character] for character in token)
    return result


def _statistics(tokenizer: Tokenizer, works: Sequence[Work]) -> Iterator[str]:
    encodings = tokenizer.encode_batch([work.text for work in works], add_special_tokens=False)
    n_tokens = sum(len(encoding) for encoding in encodings)
    n_bytes = sum(len(work.text.encode()) for work in works)
    yield f"{n_bytes:,} bytes are {n_tokens:,} tokens: {n_bytes / n_tokens:.3f} bytes a token"
    longest = sorted(token_bytes(tokenizer), key=len, reverse=True)[:8]
    shown = ", ".join(repr(token.decode("utf-8", "replace")) for token in longest)
    yield f"longest tokens: {shown}"
    names: Iterable[str] = special_tokens(tokenizer)
    yield f"special tokens: {' '.join(names)}"


@command("gothic-tokenize")
def main(argv: Sequence[str]) -> None:
    """Trains a tokenizer on text files."""
    parser = ArgumentParser(
        prog="gothic-tokenize", description="Train a byte-level BPE tokenizer on text files."
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=["mixed_train.txt"],
        help="training texts; a bare name is looked up in data/processed",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of tokens")
    parser.add_argument("--output", default="data/tokenizer.json", help="where to write it")
    parser.add_argument(
        "--min-frequency", type=int, default=2, help="a pair seen less often is not merged"
    )
    arguments = parser.parse_args(argv)
    if arguments.min_frequency < 1:
        raise UserError(f"--min-frequency must be at least 1, not {arguments.min_frequency}")

    paths = [find_text(name, Path("data/processed")) for name in arguments.files]
    works = [work for path in paths for work in split_works(read_text(path))]
    if not works:
        raise UserError(f"{paths[0]} holds no text between its markers; `gothic-data` makes texts")
    tokenizer = train_tokenizer(works, arguments.vocab_size, arguments.min_frequency)
    output = Path(arguments.output)
    write_atomically(output, tokenizer.to_str(pretty=True).encode())
    print(f"{output}: {tokenizer.get_vocab_size():,} tokens")
    for line in _statistics(tokenizer, works):
        print(line)
    if tokenizer.get_vocab_size() < arguments.vocab_size:
        print(
            f"The texts have no more pairs seen {arguments.min_frequency} times. Train with"
            f" --config.model.vocab_size={tokenizer.get_vocab_size()}"
        )


if __name__ == "__main__":
    sys.exit(main())
