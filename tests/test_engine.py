"""Many texts in one step: each is what it would be alone, and no copied span is written."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.errors import UserError
from gothic_jax.machine.device import select_device
from gothic_jax.machine.files import sha256
from gothic_jax.measuring.novelty import Index, build, find_words, load
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import complete
from gothic_jax.text.works import read_text
from gothic_jax.writing.engine import Engine, Text, Written
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.sample import Ending, Sample
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Sampling, Settings
from gothic_jax.writing.slots import Slots
from gothic_jax.writing.writer import Writer
from tests.common import DARK, TEXT, TINY, Workplace
from tests.test_sampler import loud_params

SLOTS = 4
SHAPE = {"n_layer": 2, "vocab_size": 320}
BLENDS: Sequence[dict[str, float]] = (
    {},
    {"wilde": 1.0},
    {"wilde": 0.5, "lovecraft": 0.5},
    {"lovecraft": 1.5, "wilde": -0.2},
)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=1.3, top_k=0, top_p=1),
    Sampling(top_k=100),
)


@functools.cache
def slots_of(architecture: str, dtype: str = "float32", block_size: int = 32) -> Slots:
    shape = SHAPE | {"architecture": architecture, "block_size": block_size}
    config = ModelConfig(**vars(TINY) | shape)
    return Slots(Sampler(config, dtype=jnp.dtype(dtype)), loud_params(config), SLOTS)


def random_text(tokenizer: Tokenizer, rng: np.random.Generator, out: list[Written]) -> Text:
    prompt = rng.integers(260, tokenizer.vocab_size, rng.integers(1, 40)).astype(np.int32)
    settings = Settings(
        SAMPLINGS[rng.integers(len(SAMPLINGS))],
        int(rng.integers(1, 70)),
        BLENDS[rng.integers(len(BLENDS))],
        None,
    )
    return Text(prompt, settings, int(rng.integers(2**32)), out.append, int(rng.integers(3)))


def run(engine: Engine, texts: Sequence[Text]) -> None:
    engine.submit(*texts)
    while engine.turn():
        pass


def alone(engine: Engine, text: Text) -> list[Written]:
    out: list[Written] = []
    run(engine, [Text(text.prompt, text.settings, text.seed, out.append, text.number)])
    return out


def joined(out: Sequence[Written]) -> tuple[str, list[int], Ending | None]:
    tokens = [scored.token for written in out for scored in written.tokens]
    return "".join(written.piece.text for written in out), tokens, out[-1].piece.ending


@pytest.mark.parametrize(
    ("architecture", "dtype", "block_size", "count"),
    [
        ("gemma", "float32", 32, 12),
        # Longer texts read a second block of their caches, where shorter ones do not need it.
        ("gpt2", "bfloat16", 90, 20),
        pytest.param("gemma", "bfloat16", 32, 500, marks=pytest.mark.long),
        pytest.param("gemma", "bfloat16", 90, 500, marks=pytest.mark.long),
    ],
)
def test_a_text_is_bit_for_bit_the_same_whatever_runs_beside_it(
    tokenizer: Tokenizer, architecture: str, dtype: str, block_size: int, count: int
) -> None:
    engine = Engine(slots_of(architecture, dtype, block_size), tokenizer)
    rng = np.random.default_rng(0)
    together: list[list[Written]] = [[] for _ in range(count)]
    texts = [random_text(tokenizer, rng, out) for out in together]
    waiting = list(texts)
    while waiting or engine.waiting or engine.free < SLOTS:
        # They come at random times, so that each begins beside others at other places.
        for _ in range(min(len(waiting), int(rng.integers(3)))):
            engine.submit(waiting.pop())
        engine.turn()
    for text, out in zip(texts, together, strict=True):
        expected = alone(engine, text)
        assert joined(out) == joined(expected)
        # The log-probabilities, too, to the last bit.
        assert [w.tokens for w in out] == [w.tokens for w in expected]


@pytest.mark.parametrize(("architecture", "block_size"), [("gemma", 90), ("gpt2", 32)])
def test_in_f32_a_text_is_what_the_sampler_writes(
    tokenizer: Tokenizer, architecture: str, block_size: int
) -> None:
    slots = slots_of(architecture, block_size=block_size)
    engine, rng = Engine(slots, tokenizer), np.random.default_rng(1)
    sampler, params = Sampler(slots.config, dtype=jnp.float32), loud_params(slots.config)
    for _ in range(8):
        out: list[Written] = []
        text = random_text(tokenizer, rng, out)
        text.number = 0
        run(engine, [text])
        weights = complete(text.settings.blend, [*tokenizer.voices])
        rows = [[tokenizer.openers[voice], *text.prompt] for voice in weights]
        chunks = sampler.stream(
            params,
            np.array(rows, np.int32),
            max_tokens=text.settings.max_tokens,
            sampling=text.settings.sampling,
            seed=text.seed,
            weights=[*weights.values()],
        )
        expected = np.concatenate([*chunks], axis=1)[0].tolist()
        _, tokens, ending = joined(out)
        assert tokens == expected[: len(tokens)]
        assert ending is (Ending.LENGTH if len(tokens) == text.settings.max_tokens else Ending.END)


def test_log_probabilities_are_of_the_token_and_the_likeliest(tokenizer: Tokenizer) -> None:
    engine = Engine(slots_of("gemma"), tokenizer)
    out: list[Written] = []
    settings = Settings(Sampling(temperature=0), 20, {"wilde": 0.5, "lovecraft": 0.5}, None)
    run(engine, [Text(np.array([300], np.int32), settings, 1, out.append, likeliest=5)])
    for scored in (scored for written in out for scored in written.tokens):
        likeliest, log_probabilities = zip(*scored.likeliest, strict=True)
        assert len(likeliest) == 5
        assert scored.token == likeliest[0]
        assert scored.log_probability == log_probabilities[0]
        assert list(log_probabilities) == sorted(log_probabilities, reverse=True)
        assert np.exp(log_probabilities).sum() < 1 + 1e-5


def test_a_cancelled_text_frees_its_slots_within_a_turn_and_the_next_one_comes_in(
    tokenizer: Tokenizer,
) -> None:
    engine = Engine(slots_of("gemma"), tokenizer)
    out: list[list[Written]] = [[], [], []]
    settings = Settings(Sampling(temperature=0), 1000, BLENDS[2], None)
    texts = [Text(np.array([300], np.int32), settings, 1, one.append) for one in out]
    engine.submit(*texts)
    engine.turn()
    assert (engine.free, engine.waiting) == (0, 1)
    assert out[0]
    assert not out[2]
    texts[0].cancelled = True
    delivered = len(out[0])
    engine.turn()
    assert (engine.free, engine.waiting) == (0, 0)
    assert len(out[0]) == delivered
    assert out[2]
    for text in texts:
        text.cancelled = True
    assert not engine.turn()
    assert engine.free == SLOTS


def test_a_blend_of_more_voices_than_slots_is_refused(tokenizer: Tokenizer) -> None:
    config = slots_of("gemma").config
    engine = Engine(Slots(Sampler(config, dtype=jnp.bfloat16), loud_params(config), 2), tokenizer)
    settings = Settings(Sampling(), 5, {"wilde": 0.3, "lovecraft": 0.3}, None)
    with pytest.raises(UserError, match="2 voices"):
        engine.submit(Text(np.array([300], np.int32), settings, 1, print))


# --- the guard


WORDS = 4


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("index") / "mixed_train.txt"
    path.write_text(TEXT)
    build(path, None)
    return load(path, sha256(read_text(path).encode())).words


class Parrot:
    """Says a text's tokens in their order; where one is banned, another instead."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.wanted = tokenizer.encode(text).tolist()
        self.other = int(tokenizer.encode(" x")[0])

    def next(self, sample: Sample) -> list[int]:
        at = len(sample.tokens)
        choices = [self.wanted[at % len(self.wanted)], self.other, *range(260, 320)]
        return [next(token for token in choices if token not in sample.banned)]


def guarded(
    tokenizer: Tokenizer, index: Index, prompt: str, text: str, tokens: int = 200
) -> tuple[str, str]:
    """What a model that would say `text` writes under the guard, piece by piece, and as tokens."""
    sample = Sample(tokenizer, (), tokens, Guard(index, WORDS, prompt))
    parrot, given = Parrot(tokenizer, text), ""
    while sample.ending is None:
        given += sample.add(parrot.next(sample)).text
    return given, tokenizer.decode(sample.tokens)


def longest(index: Index, text: str) -> int:
    span = index.measure(text).longest
    return span.words if span else 0


def test_the_index_has_what_a_search_finds(index: Index) -> None:
    keys = [word[0].casefold() for word in find_words(DARK)]
    for start in range(len(keys) - WORDS):
        assert index.has(keys[start : start + WORDS])
        assert not index.has([*keys[start : start + WORDS - 1], "candour"])
    assert not index.has(["unheard", "of"])


@pytest.mark.parametrize("prompt", ["", "Then ", "There are doors", "There are doors ben"])
def test_no_copied_span_is_written(tokenizer: Tokenizer, index: Index, prompt: str) -> None:
    rest = DARK.removeprefix(prompt)
    given, written = guarded(tokenizer, index, prompt, rest)
    assert given == written
    assert len(given) > 100
    assert longest(index, given) < WORDS
    if longest(index, prompt) < WORDS - 1:
        assert longest(index, prompt + given) < WORDS
    # What is no copy stays: the words before the one that would complete it.
    assert given.split()[0] == rest.split()[0] or prompt.startswith("There")


def test_what_is_new_passes_unchanged(tokenizer: Tokenizer, index: Index) -> None:
    new = "A door that had an opinion is, my dear duchess, the tide's own affair. " * 4
    tokens = len(tokenizer.encode(new))
    assert guarded(tokenizer, index, "", new, tokens) == (new, new)


def test_a_word_before_an_apostrophe_is_read_again_when_what_followed_is_taken_back(
    tokenizer: Tokenizer, index: Index
) -> None:
    guard = Guard(index, 2, "")
    looked_up: list[list[str]] = []
    index.__dict__["has"] = lambda keys: looked_up.append([*keys]) or keys[-1] == "bells"
    try:
        assert guard.find_copy("ten o' bells ", ended=False) == 7
        guard.take_back(len("ten o'"))
        assert guard.find_copy("ten o'clock ", ended=False) is None
    finally:
        del index.__dict__["has"]
    assert looked_up[-1] == ["ten", "o'clock"]


def test_what_is_drawn_in_place_of_a_banned_token_is_any_of_the_others() -> None:
    slots = slots_of("gemma")
    sampling = Sampling(temperature=1, top_k=0, top_p=1)
    ranks: set[int] = set()
    for seed in range(12):
        slots.occupy([0], [1.0], sampling, seed=seed, sample=0)
        slots.read(0, np.array([1, 300], np.int32))
        first = slots.advance({0: 0}, {})
        slots.read(0, np.array([1, 300], np.int32))
        banned = int(first.tokens[0, 0])
        again = slots.advance({0: 0}, {0: [banned]})
        assert again.tokens[0, 0] != banned
        order = first.likeliest[0, 0].tolist()
        drawn = int(again.tokens[0, 0])
        places = [order.index(token) if token in order else len(order) for token in (drawn, banned)]
        ranks.add(places[0] - places[1])
    slots.free([0])
    # Not always the next one in rank.
    assert len(ranks) > 2


def test_a_guarded_sample_of_the_engine_copies_nothing_and_others_are_unchanged(
    trained_once: Workplace, tokenizer: Tokenizer, index: Index
) -> None:
    writer = Writer.load(locate(str(trained_once.out_dir)), select_device("cpu"))
    prompt, settings = writer.encode("Qx"), Settings(Sampling(temperature=0.3), 80, {}, None)

    def write(words: int | None) -> list[str]:
        guard = None if words is None else lambda: Guard(index, words, "Qx")
        pieces = [*writer.stream_in_slots(prompt, settings, range(6), 3, SLOTS, (), guard)]
        return ["".join(p.text for p in each) for each in zip(*pieces, strict=True)]

    plain, guarded = write(None), write(1)
    assert max(longest(index, text) for text in plain) >= 1
    assert max(longest(index, "Qx" + text) for text in guarded) < 1
    assert write(1000) == plain
    assert write(1) == guarded


def test_a_text_whose_window_slides_can_be_taken_back_across_that_place(
    tokenizer: Tokenizer, index: Index
) -> None:
    engine, out = Engine(slots_of("gemma"), tokenizer), []
    # Every word is banned at first: each is taken back once or more, also where a window slid.
    everything = Index([], np.zeros(0, np.uint32), np.zeros(0, np.int32), [])
    turns: list[int] = []

    def has(keys: Sequence[str]) -> bool:
        turns.append(1)
        return len(turns) % 2 == 1

    everything.has = has  # type: ignore[method-assign]
    settings = Settings(Sampling(temperature=1.5, top_k=0, top_p=1), 150, {"wilde": 1.0}, None)
    guard = Guard(everything, 1, "")
    run(engine, [Text(np.array([300], np.int32), settings, 9, out.append, guard=guard)])
    text, tokens, ending = joined(out)
    assert ending in (Ending.LENGTH, Ending.END)
    assert (
        b"".join(tokenizer.token_bytes[token] for token in tokens).decode(errors="ignore") == text
    )
    assert len(tokens) > TINY.block_size or ending is Ending.END
