"""gothic-tokenize: byte-level BPE, whose special tokens are the voices of the texts."""

import hashlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gothic_jax.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.files import MAX_TRUSTED, UNSOUND, parse_json, write_atomically
from gothic_jax.texts import (
    ANY,
    END_OF_TEXT,
    MARKER,
    RESERVED_VOICES,
    Work,
    find_text,
    read_text,
    split_works,
    voice_token,
)

MAX_TOKENS = 2**16
PIECE = 2**18
"""Characters that are encoded at a time."""


def train_tokenizer(works: Sequence[Work], vocab_size: int, min_frequency: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, specials and bytes included."""
    voices = sorted({work.voice for work in works if work.voice})
    if reserved := RESERVED_VOICES.intersection(voices):
        raise UserError(f"no voice can be called {', '.join(reserved)}; name it otherwise")
    specials = [END_OF_TEXT, *map(voice_token, [ANY, *voices])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(specials) + len(alphabet)
    if vocab_size > MAX_TOKENS:
        raise UserError(f"--vocab-size must be at most {MAX_TOKENS:,}, not {vocab_size:,}")
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
        with path.open("rb") as file:
            content = file.read(MAX_TRUSTED + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `gothic-tokenize` makes it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); `gothic-tokenize` makes it") from error
    return parse_tokenizer(content, str(path))


def parse_tokenizer(content: bytes, source: str) -> Tokenizer:
    """The tokenizer of a JSON text from `source`; raises UserError where it cannot serve here.

    The library takes anything that it can parse, and some of that makes it panic, hang or ask
    for all memory. So only what `gothic-tokenize` makes use of is handed on to it: byte-level
    BPE with special tokens, each part looked through before.
    """
    try:
        if len(content) > MAX_TRUSTED:
            raise ValueError(f"it is longer than {MAX_TRUSTED:,} bytes")
        return _build(parse_json(content))
    except UNSOUND as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{source} is no tokenizer that serves here ({textwrap.shorten(reason, 200)});"
            " `gothic-tokenize` makes one"
        ) from error


def _build(value: Any) -> Tokenizer:
    model = value["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its model has a {name}")
    for name in ("byte_fallback", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"its model has {name}")
    for name in ("normalizer", "post_processor"):
        if value.get(name) and value[name].get("type") != "ByteLevel":
            raise ValueError(f"it has a {name}")
    for name in ("pre_tokenizer", "decoder"):
        if value[name]["type"] != "ByteLevel":
            raise ValueError(f"its {name} is not byte-level")
    spaced, pattern = (
        value["pre_tokenizer"].get(name, True) for name in ("add_prefix_space", "use_regex")
    )
    if spaced is not False or pattern is not True:
        raise ValueError("its pre_tokenizer changes the text")
    vocabulary = _vocabulary(model["vocab"])
    specials = _specials(value["added_tokens"], vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(model["merges"], vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _vocabulary(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or len(vocab) > MAX_TOKENS:
        raise ValueError(f"its vocabulary is no table of at most {MAX_TOKENS:,} tokens")
    if not all(type(index) is int for index in vocab.values()):
        raise ValueError("a token id is no whole number")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("there are gaps in its token ids")
    return vocab


def _specials(added: Any, vocabulary: dict[str, int]) -> list[AddedToken]:
    specials = []
    for token in sorted(added, key=lambda token: int(token["id"])):
        content = token["content"]
        if not isinstance(content, str) or vocabulary.get(content) != token["id"]:
            raise ValueError(f"the vocabulary lacks its added token {content!r}")
        if not token["special"] or not MARKER.fullmatch(content):
            raise ValueError(f"its added token {content!r} is not of the form <|name|>")
        specials.append(AddedToken(content, special=True, normalized=False))
    names = {str(token) for token in specials}
    if missing := {END_OF_TEXT, voice_token(ANY)} - names:
        raise ValueError(f"it has no {min(missing)} token")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    words = vocabulary.keys() - names
    if not alphabet <= words or not alphabet.issuperset("".join(words)):
        raise ValueError("it is not byte-level")
    return specials


def _merges(merges: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"its merge {merge!r} is not of two tokens that make one")
        pairs.append(pair)
    return pairs


def encode(tokenizer: Tokenizer, text: str) -> UInt32[np.ndarray, " n"]:
    """The token ids of a text of whatever length; raises UserError where that is no prose.

    It goes to the library in pieces, since that takes a hundred bytes of memory for a token.
    """
    pieces = list(_pieces(text))
    ids: list[int] = []
    for first in range(0, len(pieces), 8):
        for encoding in tokenizer.encode_batch(pieces[first : first + 8], add_special_tokens=False):
            ids += encoding.ids
    return np.array(ids, np.uint32)


def _pieces(text: str) -> Iterator[str]:
    """The text, cut where no token can lie across: before the white space after a word.

    White space is a token's beginning or all of it (the pattern of GPT-2's pre-tokenizer).
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        while True:
            end = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            if end < 0:
                raise UserError(f"{PIECE:,} characters have no word's end between them: no prose")
            if not text[end - 1].isspace():
                break
        yield text[start:end]
        start = end
    yield text[start:]


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


def any_voice_id(tokenizer: Tokenizer) -> int:
    """The id of `<|any|>`, which opens what is of no voice in particular."""
    return special_tokens(tokenizer)[voice_token(ANY)]


def voices(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the voice tokens, by the voice's name, in the order of the ids; not `<|any|>`."""
    return {
        match[1]: index
        for token, index in sorted(special_tokens(tokenizer).items(), key=lambda item: item[1])
        if token not in (END_OF_TEXT, voice_token(ANY)) and (match := MARKER.fullmatch(token))
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
    n_tokens = sum(encode(tokenizer, work.text).size for work in works)
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
