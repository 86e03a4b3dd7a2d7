"""Byte-level BPE, whose special tokens are the voices of the texts."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Int, UInt32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gothic_jax.errors import UserError
from gothic_jax.machine.files import MAX_TRUSTED, UNSOUND, parse_json, sha256
from gothic_jax.model.shape import MAX_VOCABULARY
from gothic_jax.text.voices import ANY, MARKER, RESERVED_VOICES, voice_token
from gothic_jax.text.works import END_OF_TEXT, Work

LONGEST_WORD = 2**18
"""Characters without white space that are encoded; the library needs 100 bytes for a token."""
KEPT_WORDS = 2**20
"""So many words, or a few more, are kept with their tokens."""
LONGEST_KEPT = 24
"""Characters of the longest word that is kept; longer ones seldom occur twice."""

# No token lies across the end of a word, since GPT-2's pattern takes white space for the beginning
# of a token or all of it. Python's \s has four control characters more than that pattern's.
_WORD = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")


class Tokenizer:
    """Text to token ids and back. Each text byte has a token, so that every text has tokens.

    The special tokens are `<|endoftext|>`, which ends a work, and one for each voice, which opens
    it; `<|any|>` opens what is in no particular voice. None of them comes from text: there, a
    marker is a word like others.
    """

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        """Of a byte-level BPE that `train` or `parse` has made."""
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self._kept: dict[str, list[int]] = {}
        self.vocab_size = bpe.get_vocab_size()
        added = bpe.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in sorted(added.items())}
        """Ids by text, in their order."""
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        self.openers = {
            MARKER.fullmatch(text)[1]: index  # type: ignore[index]
            for text, index in self.special_tokens.items()
            if text != END_OF_TEXT
        }
        """The token that opens a work, by voice; `any` is among them."""
        self.any_voice = self.openers[ANY]
        self.voices = {voice: i for voice, i in self.openers.items() if voice != ANY}
        """As `openers`, without `any`."""

    @classmethod
    def train(cls, works: Sequence[Work], vocab_size: int, min_frequency: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` tokens, special tokens and bytes included.

        Raises UserError where that is too few or too many, or a voice has a reserved name.
        """
        voices = sorted({work.voice for work in works if work.voice})
        _refuse_reserved(voices)
        specials = [END_OF_TEXT, *map(voice_token, [ANY, *voices])]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        smallest = len(specials) + len(alphabet)
        if vocab_size > MAX_VOCABULARY:
            raise UserError(f"--vocab-size must be at most {MAX_VOCABULARY:,}, not {vocab_size:,}")
        if vocab_size < smallest:
            raise UserError(
                f"--vocab-size {vocab_size} is too small: {smallest} tokens are needed for the 256"
                f" bytes and {len(specials)} special tokens"
            )
        bpe = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(map(_special, specials)),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        paragraphs = (part for work in works for part in work.text.splitlines(keepends=True))
        bpe.train_from_iterator(paragraphs, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a file; raises UserError where it is missing or not of this kind."""
        try:
            with path.open("rb") as file:
                content = file.read(MAX_TRUSTED + 1)
        except FileNotFoundError:
            raise UserError(f"{path} is not there; `gothic-tokenize` makes it") from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error}); `gothic-tokenize` makes it"
            ) from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(
        cls, content: bytes, source: str, cure: str = "`gothic-tokenize` makes one"
    ) -> "Tokenizer":
        """The tokenizer of a JSON text from `source`; raises UserError where it is another kind.

        `cure` is what that error advises.

        The library takes anything that it can parse, and some of that makes it panic, hang or ask
        for all memory. So it is given only what `gothic-tokenize` uses: byte-level BPE with
        special tokens, each part of which is checked first.
        """
        try:
            if len(content) > MAX_TRUSTED:
                raise ValueError(f"it is longer than {MAX_TRUSTED:,} bytes")
            return cls(_build(parse_json(content)))
        except UNSOUND as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{source} is not a tokenizer that can be used here"
                f" ({textwrap.shorten(reason, 200)}); {cure}"
            ) from error

    def with_voices(self, names: Sequence[str]) -> "Tokenizer":
        """This tokenizer with a special token more for each new voice, after all others.

        Raises UserError where a voice has a reserved name, or there would be too many tokens.
        """
        _refuse_reserved(names)
        if self.vocab_size + len(names) > MAX_VOCABULARY:
            raise UserError(f"with {', '.join(names)} there are over {MAX_VOCABULARY:,} tokens")
        value = parse_json(self.to_json().encode())
        for index, name in enumerate(names, start=self.vocab_size):
            token = voice_token(name)
            value["model"]["vocab"][token] = index
            value["added_tokens"].append({"id": index, "content": token, "special": True})
        return Tokenizer(_build(value))

    def encode(self, text: str) -> UInt32[np.ndarray, " n"]:
        """The token ids of a text of any length; raises UserError where that is not prose.

        The library gets each word once, as most words of a text are repetitions.
        """
        words = _WORD.findall(text)
        if max(map(len, words), default=0) > LONGEST_WORD:
            raise UserError(
                f"the text has {LONGEST_WORD:,} characters in a row without a space or a line end;"
                " give a text with words"
            )
        if len(self._kept) > KEPT_WORDS:
            self._kept.clear()
        new = [word for word in dict.fromkeys(words) if word not in self._kept]
        for first in range(0, len(new), 4096):
            batch = new[first : first + 4096]
            # "Fast": without the offsets of the tokens in the text.
            encodings = self._bpe.encode_batch_fast(batch, add_special_tokens=False)
            self._kept.update(zip(batch, [encoding.ids for encoding in encodings], strict=True))
        ids = chain.from_iterable(map(self._kept.__getitem__, words))
        result = np.fromiter(ids, np.uint32)
        for word in new:
            if len(word) > LONGEST_KEPT:
                del self._kept[word]
        return result

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of some tokens; special tokens have none."""
        return self._bpe.decode([int(index) for index in ids])

    def knows(self, character: str) -> bool:
        """Whether the text that it was made from has a character outside ASCII, more than rarely.

        Then it is part of a token; all others are read byte by byte.
        """
        return character.encode() in self._joined

    def to_json(self, *, pretty: bool = False) -> str:
        """The tokenizer in Hugging Face's JSON format, as `parse` reads it."""
        return self._bpe.to_str(pretty=pretty)

    def vocabulary(self) -> tuple[list[str], list[str]]:
        """All tokens by id, in the byte-level alphabet, and all merges as `first second`."""
        model = parse_json(self.to_json().encode())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return tokens, [" ".join(pair) for pair in model["merges"]]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its JSON, in hex."""
        return sha256(self.to_json().encode())

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for, by id; none for special tokens."""
        table = _byte_of_character()
        result = [b""] * self.vocab_size
        for token, index in self._bpe.get_vocab().items():
            if token not in self.special_tokens:
                result[index] = bytes(table[character] for character in token)
        return result

    @cached_property
    def _joined(self) -> bytes:
        """All tokens in a row, kept apart by a byte that is part of no character."""
        return b"\xff".join(self.token_bytes)

    @cached_property
    def byte_lengths(self) -> Int[np.ndarray, " token"]:
        """Bytes that each token stands for, by id."""
        return np.array([len(token) for token in self.token_bytes])


def _refuse_reserved(voices: Iterable[str]) -> None:
    if reserved := RESERVED_VOICES.intersection(voices):
        raise UserError(f"a voice cannot have the name {', '.join(reserved)}; choose another")


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _build(value: Any) -> tokenizers.Tokenizer:
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
        part = value.get(name)
        if part and part.get("type") != "ByteLevel" and not _adds_nothing(part):
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
    bpe = _byte_level(models.BPE(vocab=vocabulary, merges=_merges(model["merges"], vocabulary)))
    bpe.add_special_tokens(specials)
    return bpe


def _adds_nothing(part: Any) -> bool:
    """Whether it is a template without tokens of its own, which transformers 5 saves."""
    return part.get("type") == "TemplateProcessing" and part.get("special_tokens") == {}


def _vocabulary(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or len(vocab) > MAX_VOCABULARY:
        raise ValueError(f"its vocabulary is not a table of at most {MAX_VOCABULARY:,} tokens")
    if not all(type(index) is int for index in vocab.values()):
        raise ValueError("a token id is not a whole number")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("there are gaps in its token ids")
    return vocab


def _specials(added: Any, vocabulary: dict[str, int]) -> list[AddedToken]:
    specials = []
    for token in sorted(added, key=lambda token: int(token["id"])):
        content = token["content"]
        if not isinstance(content, str) or vocabulary.get(content) != token["id"]:
            raise ValueError(f"the vocabulary lacks its added token {content!r}")
        marker = MARKER.fullmatch(content)
        if not token["special"] or marker is None:
            raise ValueError(f"its added token {content!r} is not of the form <|name|>")
        specials.append(_special(content))
        if marker[1] in RESERVED_VOICES - {ANY, "endoftext"}:
            raise ValueError(f"a voice cannot have the name {marker[1]}")
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
