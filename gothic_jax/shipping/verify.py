"""Whether a model that was exported is the same in the program that it was exported for.

Each check runs the exported files themselves, as a stranger would, and compares with this program:
token ids, logits of every next token, bits per byte, and the text of likeliest tokens.
"""

import importlib.metadata
import json
import math
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gothic_jax.model.gpt import Params, graph
from gothic_jax.model.shape import ModelConfig
from gothic_jax.shipping.llama import load_package
from gothic_jax.text.tokenizer import Tokenizer

PROMPT = "In the shadow of the house"
GREEDY_TOKENS = 24
POSITIONS = 48
"""Places in a window at which llama.cpp, which tells one distribution a request, is asked."""
LEAST = -12.0
"""Log-probability, in nats, of tokens whose logits matter to nobody."""
FUZZED_TEXTS = 100
FUZZED_TOKENS = 30
ODD_TEXTS = (
    "",
    " ",
    "\n\n\n",
    "  two blanks,\ttab, \r\n line end",
    "caf\u00e9 \u2014 na\u00efve \u00c6sthetic \u201cquotes\u201d \U0001f3a9",
    "\u4e16\u754c \u043c\u0438\u0440 \u0645\u0631\u062d\u0628\u0627",
    "It's they'll WE'RE 1,234.5 x=y; a_b <b>&amp;</b>",
    "<|wilde|> in a text is a word, <|endoftext|> too",
    "\x00\x1f\u200b\ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
"""Texts that tokenizers differ over."""


class Limits(NamedTuple):
    """How far an export may be from this program."""

    logit: float
    bits_per_byte: float


LIMITS = {
    "hf float32": Limits(1e-5, 1e-5),
    "hf bfloat16": Limits(0.3, 2e-3),
    "gguf f32": Limits(0.01, 1e-4),
    "gguf f16": Limits(0.01, 1e-4),
    "gguf bf16": Limits(0.3, 2e-3),
    "gguf q8_0": Limits(0.5, 1e-3),
}
"""What rounding alone may make of a model.

transformers computes in float64, as this program does here: what is left of the difference is the
weights' own rounding, and that of the few operations which each program keeps in float32. llama.cpp
cannot: it rounds the inputs of products to the type of the weights, and looks GELU up in a table of
f16, which is why its f32 is no nearer than its f16. A norm less 1, a swapped gate or another
pre-tokenizer is far beyond all of these.
"""


class Proof(NamedTuple):
    """What a comparison found."""

    form: str
    """`hf float32`, `gguf f16`, ..."""
    program: str
    """Which one, and its version."""
    texts: int
    texts_differing: int
    """Texts whose token ids were not the same."""
    logit: float
    """The largest difference, in nats, of any next token's at any place."""
    bits_per_byte: float
    """That of the exported model on the text compared."""
    own_bits_per_byte: float
    same_greedy: bool

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit."""
        limits = LIMITS[self.form]
        found = []
        if self.texts_differing:
            found.append(f"{self.texts_differing} of {self.texts} texts have other tokens")
        if not self.logit <= limits.logit:  # NaN fails
            found.append(f"logits differ by {self.logit:.2g}")
        if not abs(self.bits_per_byte - self.own_bits_per_byte) <= limits.bits_per_byte:
            found.append(
                f"bits per byte are {self.bits_per_byte:.5f}, here {self.own_bits_per_byte:.5f}"
            )
        # With a coarser type, two tokens that are nearly as likely may change places.
        if not self.same_greedy and self.form in ("hf float32", "gguf f32"):
            found.append("the likeliest text is another")
        return found


class Reference(NamedTuple):
    """This program's own answers."""

    tokenizer: Tokenizer
    texts: Sequence[str]
    ids: Sequence[list[int]]
    windows: Int[np.ndarray, "window block"]
    """Tokens, each window after its opener."""
    log_probabilities: Float[np.ndarray, "window block vocab"]
    """Of the token after each one."""
    greedy: list[int]
    """After `opened`."""
    opened: list[int]


def reference(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, text: str, windows: int
) -> Reference:
    """The answers for some windows of a text, in float64, of parameters on a CPU.

    In float32, rounding alone makes two programs differ by more than a small mistake does.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        graphdef = graph(config, jnp.dtype("float64"))

    @jax.jit
    def logits(params: Params, tokens: Array) -> Array:
        return nnx.merge(graphdef, params)(tokens)

    def logits_of(tokens: Int[np.ndarray, "row time"]) -> Float[np.ndarray, "row time vocab"]:
        with jax.enable_x64(True):
            return np.asarray(logits(wide, tokens))

    body = tokenizer.encode(text).astype(np.int32)
    opener = next(iter(tokenizer.voices.values()), tokenizer.any_voice)
    size = min(config.block_size - 1, len(body) // windows)
    rows = body[: windows * size].reshape(windows, size)
    tokens = np.concatenate([np.full((windows, 1), opener, np.int32), rows], axis=1)
    opened = [opener, *tokenizer.encode(PROMPT).tolist()]
    greedy: list[int] = []
    longest = min(len(opened) + GREEDY_TOKENS, config.block_size)
    for place in range(len(opened), longest):
        # Of one length, so that one program serves; no token sees those after it.
        so_far = np.zeros((1, longest), np.int32)
        so_far[0, :place] = [*opened, *greedy]
        greedy.append(int(np.argmax(logits_of(so_far)[0, place - 1])))
        if greedy[-1] == tokenizer.end_of_text:
            break
    texts = [*ODD_TEXTS, *_fuzzed(tokenizer), text]
    return Reference(
        tokenizer,
        texts,
        [tokenizer.encode(each).tolist() for each in texts],
        tokens,
        _log_softmax(logits_of(tokens)),
        greedy,
        opened,
    )


def _fuzzed(tokenizer: Tokenizer) -> list[str]:
    """Texts of the tokenizer's own tokens in any order, as no prose has them."""
    drawn = np.random.default_rng(0)
    ids = drawn.integers(tokenizer.vocab_size, size=(FUZZED_TEXTS, FUZZED_TOKENS))
    texts = [b"".join(tokenizer.token_bytes[index] for index in row.tolist()) for row in ids]
    return [text.decode(errors="ignore") for text in texts]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def huggingface(folder: Path, own: Reference, dtype: str) -> Proof:
    """Compares with transformers. Raises UserError where that is not installed."""
    transformers, torch = load_package("transformers"), load_package("torch")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.eval()
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in own.texts]
    with torch.no_grad():
        logits = model(torch.from_numpy(own.windows.astype(np.int64))).logits.numpy()
        opened = torch.tensor([own.opened])
        written = model.generate(
            opened,
            attention_mask=torch.ones_like(opened),
            max_new_tokens=len(own.greedy),
            do_sample=False,
            pad_token_id=own.tokenizer.end_of_text,
        )[0, len(own.opened) :].tolist()
    places = np.arange(own.windows.shape[1] - 1)
    return _proof(
        f"hf {dtype}",
        f"transformers {transformers.__version__}",
        own,
        ids,
        [(row, int(place)) for row in range(len(own.windows)) for place in places],
        _log_softmax(logits)[:, :-1].reshape(-1, logits.shape[-1]),
        written,
    )


def llama_cpp(file: Path, own: Reference, kind: str) -> Proof:
    """Compares with llama.cpp, as xllamacpp carries it. Raises UserError without that."""
    package = load_package("xllamacpp")
    params = package.CommonParams()
    params.model.path = str(file)
    params.verbosity = 0
    params.n_ctx = own.windows.shape[1] + 1
    params.n_gpu_layers = 0
    # Its default, f16, would hide how near the weights are.
    params.cache_type_k = params.cache_type_v = package.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = package.Server(params)
    vocabulary = own.log_probabilities.shape[-1]

    # Whatever it would write, it shall write a letter: of half a character, and of a special token,
    # the server tells no log-probabilities. Those that it tells are the ones before this choice.
    letter = int(own.tokenizer.encode("a")[0])

    def ask(tokens: list[int]) -> Float[np.ndarray, " vocab"]:
        """The log-probabilities of what follows."""
        answer = server.handle_completions(
            {
                "prompt": tokens,
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": vocabulary,
                "logit_bias": [[letter, 1e4]],
            }
        )
        (token,) = answer["choices"][0]["logprobs"]["content"]
        found = np.full(vocabulary, -np.inf)
        for candidate in token["top_logprobs"]:
            found[candidate["id"]] = candidate["logprob"]
        return found

    width = own.windows.shape[1] - 1
    wanted = np.unique(np.linspace(0, width - 1, POSITIONS).astype(int)).tolist()
    places = [(row, place) for row in range(len(own.windows)) for place in wanted]
    found = np.stack([ask(own.windows[row, : place + 1].tolist()) for row, place in places])
    written: list[int] = []
    for _ in own.greedy:
        written.append(int(np.argmax(ask([*own.opened, *written]))))
    ids = [_tokenized(server.listening_address, text) for text in own.texts]
    version = importlib.metadata.version("xllamacpp")
    return _proof(
        f"gguf {kind}", f"llama.cpp (xllamacpp {version})", own, ids, places, found, written
    )


def _tokenized(address: str, text: str) -> list[int]:
    """A text's tokens by llama.cpp's server, where no marker in it is special."""
    body = {"content": text, "add_special": False, "parse_special": False}
    request = urllib.request.Request(
        f"{address}/tokenize",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    # Whatever proxy the environment names, this server is here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        tokens: list[int] = json.loads(answer.read())["tokens"]
    return tokens


def _proof(
    form: str,
    program: str,
    own: Reference,
    ids: Sequence[list[int]],
    places: Sequence[tuple[int, int]],
    found: Float[np.ndarray, "place vocab"],
    written: list[int],
) -> Proof:
    """`found` are the log-probabilities of the token after each place, a row and a column."""
    rows, columns = np.array(places).T
    expected = own.log_probabilities[rows, columns]
    # Far below the likeliest, a log-probability is all rounding, and no text ever has the token.
    seen = np.maximum(expected, found) > LEAST
    # A softmax takes no notice of what is added to all logits of a place, and llama.cpp tells only
    # what comes after it.
    difference = expected - found
    difference -= np.mean(difference, axis=1, keepdims=True, where=seen)
    targets = own.windows[rows, columns + 1]
    n_bytes = own.tokenizer.byte_lengths[targets].sum()

    def bits_per_byte(table: np.ndarray) -> float:
        return float(-table[np.arange(len(targets)), targets].sum() / math.log(2) / n_bytes)

    return Proof(
        form,
        program,
        len(own.ids),
        sum(theirs != ours for theirs, ours in zip(ids, own.ids, strict=True)),
        float(np.max(np.abs(difference), where=seen, initial=0.0)),
        bits_per_byte(found),
        bits_per_byte(expected),
        written == own.greedy,
    )


def table(proofs: Sequence[Proof]) -> str:
    """The proofs as Markdown."""
    lines = [
        "| form | compared with | texts with the same tokens | largest difference of a logit"
        " | bits per byte, here | same likeliest text |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {proof.form} | {proof.program} | {proof.texts - proof.texts_differing} of {proof.texts}"
        f" | {proof.logit:.2g} | {proof.bits_per_byte:.5f},"
        f" {proof.own_bits_per_byte:.5f} | {'yes' if proof.same_greedy else 'no'} |"
        for proof in proofs
    ]
    return "\n".join(lines)
