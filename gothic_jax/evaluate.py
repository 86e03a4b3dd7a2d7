"""gothic-eval: loss, perplexity and bits per byte of a text, per voice.

Each text token is predicted exactly once, from as much of its own work as the window holds.
Special tokens are context: they count neither as predictions nor as bytes.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from gothic_jax import manifest, novelty
from gothic_jax.attention import Implementation, choose
from gothic_jax.checkpoint import Location, load_meta, load_params, load_tokenizer_copy, locate
from gothic_jax.cli import ArgumentParser, UserError, command
from gothic_jax.dataset import TokenText, encode_text
from gothic_jax.device import out_of_memory_told, select_device
from gothic_jax.files import sha256
from gothic_jax.model import GPT, Params, graph
from gothic_jax.seal import WRITING, differences, environment
from gothic_jax.texts import find_text, read_text
from gothic_jax.tokenizer import special_tokens, token_bytes, voices

ALL = "all"
"""The name under which the scores of all voices together stand."""


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Cross-entropy in nats of each target: logsumexp(logits) less the target's logit."""
    return _token_losses_forward(logits, targets)[0]


def _token_losses_forward(logits: Array, targets: Array) -> tuple[Array, Any]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normaliser - target_logits, (logits, targets, normaliser)


def _token_losses_backward(saved: Any, gradient: Array) -> tuple[Array, None]:
    logits, targets, normaliser = saved
    probabilities = jnp.exp(logits - normaliser[..., None])
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return (probabilities - is_target) * gradient[..., None], None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text: total nats over so many tokens and bytes of it."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """All of it, for JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


class Windows(NamedTuple):
    """A text cut for evaluation; row by row what goes in, what shall come out, what counts."""

    inputs: Int[np.ndarray, "window block"]
    targets: Int[np.ndarray, "window block"]
    counts: Bool[np.ndarray, "window block"]


def cut_windows(text: TokenText, specials: Sequence[int], block_size: int, stride: int) -> Windows:
    """Windows of `block_size` that together predict each text token once.

    Each window lies in one work and opens with that work's opener, as in training. A window
    starts `stride` tokens after the one before it in the work and predicts only what that one
    did not: with a stride below `block_size`, the first tokens of a window are mere context.
    """
    if not 1 <= stride <= block_size:
        raise UserError(f"--stride must lie between 1 and the block size {block_size}: {stride}")
    is_text = ~np.isin(text.tokens, specials)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_text, [False]]).astype(np.int8)))
    rows: list[tuple[np.ndarray, int, int]] = []  # the window's tokens, its opener, first to count
    for begin, end in edges.reshape(-1, 2):
        body, opener = text.tokens[begin:end], int(text.openers[begin])
        done = 0
        for start in range(0, len(body), stride):
            window = body[start : start + block_size]
            if start + len(window) > done:
                rows.append((window, opener, done - start))
                done = start + len(window)
    shape = (len(rows), block_size)
    windows = Windows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for row, (tokens, opener, first) in enumerate(rows):
        windows.inputs[row, 0] = opener
        windows.inputs[row, 1 : len(tokens)] = tokens[:-1]
        windows.targets[row, : len(tokens)] = tokens
        windows.counts[row, first : len(tokens)] = True
    return windows


LossFunction = Callable[
    [Params, Int[np.ndarray, "batch block"], Int[np.ndarray, "batch block"]], Array
]


def loss_function(
    graphdef: "nnx.GraphDef[GPT]",
    attention: Implementation,
    sharding: jax.sharding.Sharding | None = None,
) -> LossFunction:
    """Jitted (params, inputs, targets) -> nats of each target, [batch, block].

    The batch is laid out by `sharding`; by default it goes to the default device.
    """

    @jax.jit
    def jitted(params: Params, inputs: Array, targets: Array) -> Array:
        model = nnx.merge(graphdef, params)
        return token_losses(model(inputs, attention=attention), targets)

    def losses(params: Params, inputs: np.ndarray, targets: np.ndarray) -> Array:
        return jitted(params, *jax.device_put((inputs, targets), sharding))

    return losses


class Evaluator:
    """A text made ready to be scored again and again while a model learns."""

    def __init__(
        self,
        text: TokenText,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        stride: int | None = None,
        batch_size: int,
    ) -> None:
        specials = sorted(special_tokens(tokenizer).values())
        self._windows = cut_windows(
            text, specials, block_size, block_size if stride is None else stride
        )
        if not self._windows.counts.any():
            raise UserError("the text to evaluate holds no tokens; give a longer one")
        self._bytes = np.array([len(token) for token in token_bytes(tokenizer)])
        self._voices = {index: name for name, index in voices(tokenizer).items()}
        self._batch_size = batch_size

    def __call__(self, losses: LossFunction, params: Params) -> dict[str, Score]:
        """The score of `all` tokens, and of each voice in the text if it names any.

        Rows are summed in f64 on the host, so that the result does not depend on the batches.
        """
        inputs, targets, counts = self._windows
        pending = [(span, losses(params, inputs[span], targets[span])) for span in self._spans()]
        nats = np.zeros(len(inputs), np.float64)
        for span, batch in pending:
            nats[span] = np.sum(np.asarray(batch, np.float64), axis=1, where=counts[span])
        tokens = counts.sum(axis=1)
        n_bytes = np.sum(self._bytes[targets], axis=1, where=counts)

        def score(rows: Bool[np.ndarray, " window"]) -> Score:
            return Score(float(nats[rows].sum()), int(tokens[rows].sum()), int(n_bytes[rows].sum()))

        scores = {ALL: score(np.ones(len(inputs), bool))}
        for index, name in self._voices.items():
            rows = inputs[:, 0] == index
            if rows.any():
                scores[name] = score(rows)
        return scores

    def _spans(self) -> Iterator[Any]:
        """Index arrays of equal length, so that one program serves: the last repeats row 0.

        A repeated row is written twice with the same value, which changes nothing.
        """
        n = len(self._windows.inputs)
        for start in range(0, n, self._batch_size):
            rows = np.arange(start, start + self._batch_size)
            yield np.where(rows < n, rows, 0)


def format_scores(scores: dict[str, Score]) -> str:
    """A table of the scores, one line a voice."""
    lines = [
        f"{'voice':<12}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>11}{'bytes':>11}"
    ]
    lines += [
        f"{name:<12}{score.loss:>9.4f}{score.perplexity:>12.2f}{score.bits_per_byte:>11.4f}"
        f"{score.tokens:>11,}{score.bytes:>11,}"
        for name, score in scores.items()
    ]
    return "\n".join(lines)


def describe_seal(location: Location) -> Iterator[str]:
    """What a checkpoint was made of and by, and what of that is otherwise here.

    Raises UserError where the checkpoint is damaged.
    """
    yield f"seal         {manifest.verify(location.path)}"
    meta = load_meta(location)
    load_tokenizer_copy(location, meta)
    yield f"checkpoint   {location}: every file is as it was written"
    yield f"config       {sha256(json.dumps(meta.config, sort_keys=True).encode())}"
    yield f"tokenizer    {meta.tokenizer_sha256}"
    for name, digest in (("train_file", meta.train_sha256), ("val_file", meta.val_sha256)):
        path = find_text(meta.config[name], Path(meta.config["data_dir"]))
        # The settings may be a stranger's: no pipe and no device is read for them.
        if not path.is_file():
            found = f"{path} is not here"
        elif sha256(read_text(path).encode()) == digest:
            found = f"{path} is this text"
        else:
            found = f"DIFFERS: {path} is another text"
        yield f"{name:<13}{digest}  {found}"
    here = environment()
    for name, value in meta.environment.items():
        now = here.get(name, "")
        found = "as here" if value == now else f"DIFFERS: here {now or 'none'}"
        yield f"{name:<17}{value or 'none'}  ({found})"


@command("gothic-eval")
def main(argv: Sequence[str]) -> None:
    """Scores a text under a checkpoint, or checks the checkpoint itself."""
    parser = ArgumentParser(prog="gothic-eval", description="Score a text under a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or RUN/ITERATION")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--file", help="the text to score; a bare name is looked up in data/processed"
    )
    task.add_argument(
        "--verify", action="store_true", help="check the checkpoint's files, and print its seal"
    )
    task.add_argument(
        "--novelty", metavar="FILE", help="what a text shares word for word with the training works"
    )
    parser.add_argument("--stride", type=int, help="tokens between windows (default: block size)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    device = select_device(arguments.device)

    location = locate(arguments.checkpoint, exact=arguments.verify)
    if arguments.verify:
        for line in describe_seal(location):
            print(line)
        return
    meta = load_meta(location)
    if changed := differences(meta.environment, environment(), WRITING):
        print(f"warning: made with other versions ({'; '.join(changed)})", file=sys.stderr)
    if arguments.novelty is not None:
        loaded = novelty.load_for(meta.config, meta.train_sha256)
        text_to_measure = read_text(Path(arguments.novelty))
        measured = loaded.words.measure(text_to_measure)
        if arguments.json:
            print(json.dumps(measured.as_dict() | {"held_out": loaded.baseline}))
        else:
            print("\n".join(novelty.describe(measured, text_to_measure, loaded.baseline)))
        return
    tokenizer = load_tokenizer_copy(location, meta)
    config = meta.model_config
    path = find_text(arguments.file, Path("data/processed"))
    text = encode_text(path, tokenizer)
    for voice in text.unknown_voices:
        print(f"this model has no voice {voice}: scored as no voice's words", file=sys.stderr)
    evaluator = Evaluator(
        text,
        tokenizer,
        block_size=config.block_size,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
    )
    dtype = jnp.dtype(meta.config["compute_dtype"])
    attention, _ = choose(device, config.n_embd // config.n_head, dtype)
    losses = loss_function(graph(config, dtype), attention)
    with out_of_memory_told("lower --batch-size"):
        params = load_params(location, config, SingleDeviceSharding(device))
        scores = evaluator(losses, params)
    if arguments.json:
        report: dict[str, Any] = {"checkpoint": str(location), "file": arguments.file}
        report |= scores.pop(ALL).as_dict()
        report["voices"] = {voice: score.as_dict() for voice, score in scores.items()}
        print(json.dumps(report))
    else:
        print(f"{arguments.file} under {location}")
        print(format_scores(scores))


if __name__ == "__main__":
    sys.exit(main())
