r"""Asks a classifier that is not the model whose voice the model's texts are in.

    scripts/install.sh dev,plots
    .venv/bin/python scripts/attribution.py checkpoints/laptop/best \
        --output docs/results/attribution.json --picture docs/blend-curve.png

The classifier (character n-grams, TF-IDF, logistic regression) learns from the works themselves
and is tested on works that it has not seen. Then it is shown what the model writes in each of some
voices, by default those of the validation text; of two voices also blends, from all of the one to
all of the other. What each voice copies and repeats is measured beside the validation text.
"""

import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

from gothic_jax.checkpoints import checkpoint
from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.machine.device import select_device
from gothic_jax.measuring import novelty
from gothic_jax.measuring.novelty import PASSAGE_WORDS, cut_passages, find_words, summarise
from gothic_jax.text.works import find_text, read_text, split_works
from gothic_jax.writing.settings import Sampling, Settings
from gothic_jax.writing.writer import Writer

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = ("The", "It was", "There is", "In the", "When I", "He had", "And so", "One evening")
FOLDS = 10
SHORTEST = 20
REPEATED_WORDS = 3
DEFAULT = Sampling()


class Passages(NamedTuple):
    """Passages of a sample's length."""

    texts: list[str]
    voices: list[str]
    works: list[int]


def passages(paths: list[Path], words: int, voices: Sequence[str]) -> Passages:
    """The works of these voices in some texts, cut into passages."""
    result = Passages([], [], [])
    works = [work for path in paths for work in split_works(read_text(path))]
    for number, work in enumerate(work for work in works if work.voice in voices):
        for text in cut_passages(work.text, words):
            result.texts.append(text)
            result.voices.append(work.voice)
            result.works.append(number)
    return result


def make_classifier() -> Pipeline:
    """Not trained yet. All voices weigh the same, however much there is of each."""
    return make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=3, sublinear_tf=True),
        LogisticRegression(C=30.0, class_weight="balanced", max_iter=1000),
    )


def share_right(right: np.ndarray) -> dict[str, float]:
    """The share of what is right, with Wilson's 95% interval."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"share": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "of": n}


def leaving_works_out(known: Passages, folds: int) -> dict[str, dict[str, float]]:
    """How often the classifier is right about passages of works that it has not seen."""
    said = cross_val_predict(
        make_classifier(),
        known.texts,
        known.voices,
        groups=known.works,
        cv=StratifiedGroupKFold(folds, shuffle=True, random_state=0),
    )
    truth = np.array(known.voices)
    return {voice: share_right(said[truth == voice] == voice) for voice in sorted(set(truth))}


def written(
    writer: Writer,
    blend: dict[str, float],
    per_prompt: int,
    max_tokens: int,
    seed: int,
    sampling: Sampling,
) -> list[str]:
    """What the model writes after each of PROMPTS, which are left out themselves.

    Texts of under SHORTEST words, which say nothing of a voice, are left out too.
    """
    settings = Settings(sampling, max_tokens, blend, seed)
    texts = []
    for number, prompt in enumerate(PROMPTS):
        samples = writer.write(writer.encode(prompt), settings, per_prompt, seed + number)
        texts += [sample.text for sample in samples]
    return [text for text in texts if len(find_words(text)) >= SHORTEST]


def repeated(text: str) -> float:
    """The share of the text's sequences of REPEATED_WORDS words that stand in it before."""
    words = [match[0].casefold() for match in find_words(text)]
    found = list(zip(*(words[start:] for start in range(REPEATED_WORDS)), strict=False))
    return 1 - len(set(found)) / len(found)


def originality(index: novelty.Index, texts: list[str]) -> dict[str, Any]:
    """What texts share with the training works, and how much they repeat themselves."""
    measured = [index.measure(text) for text in texts]
    longest = [one.longest.words if one.longest else 0 for one in measured]
    return summarise(measured) | {
        "texts": len(texts),
        "longest_p99": float(np.percentile(longest, 99)),
        "repeated": float(np.mean([repeated(text) for text in texts])),
    }


def draw(report: dict[str, Any], picture: Path) -> None:
    """The blend curve: what share of the texts is given to the second voice, by its weight."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    first, second = report["voices"]
    rows = report["blends"]
    weights = [row["weight"] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    shares = [100 * row["attributed"]["share"] for row in rows]
    low = [100 * (row["attributed"]["share"] - row["attributed"]["low"]) for row in rows]
    high = [100 * (row["attributed"]["high"] - row["attributed"]["share"]) for row in rows]
    axes.errorbar(weights, shares, [low, high], marker="o", capsize=3, label="attributed texts")
    means = [100 * row["probability"] for row in rows]
    axes.plot(weights, means, marker="s", linestyle="--", label="mean probability")
    axes.set(
        xlabel=f"weight of {second}; {first} has the rest",
        ylabel=f"taken for {second}, %",
        xticks=weights,
        ylim=(-3, 103),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def _listed(share: dict[str, float]) -> str:
    return f"{share['share']:.0%} of {share['of']} ({share['low']:.0%} to {share['high']:.0%})"


def attribution_table(report: dict[str, Any]) -> str:
    """Of each voice: how often it is recognised, and whom else its texts are taken for."""
    lines = [
        "| voice | its works, left out | what the model writes | taken for |",
        "|---|---|---|---|",
    ]
    for voice, works in report["works_left_out"].items():
        own = report["written"][voice]
        others = [(name, n) for name, n in own["taken_for"].items() if name != voice]
        named = ", ".join(f"{name} {n}" for name, n in others[:3]) or "no one else"
        lines.append(f"| {voice} | {_listed(works)} | {_listed(own['right'])} | {named} |")
    return "\n".join(lines)


def blend_table(report: dict[str, Any]) -> str:
    """The blends as Markdown."""
    first, second = report["voices"]
    lines = [f"| blend | taken for {second} | mean probability |", "|---|---|---|"]
    for row in report["blends"]:
        weight = row["weight"]
        name = f"{first} {1 - weight:g}, {second} {weight:g}"
        lines.append(f"| {name} | {_listed(row['attributed'])} | {row['probability']:.2f} |")
    return "\n".join(lines)


def originality_table(report: dict[str, Any]) -> str:
    """What the texts share with the training works and repeat, as Markdown."""
    sizes = (2, 3, 4, 5)
    lines = [
        "| text | longest span: median | 99% | most | in spans of 8 words | new 2-, 3-, 4-, 5-grams"
        f" | {REPEATED_WORDS}-grams repeated |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in report["originality"].items():
        new = ", ".join(f"{figures['new_ngrams'][size - 1]:.0%}" for size in sizes)
        lines.append(
            f"| {name} | {figures['longest_median']} words | {figures['longest_p99']:.0f} |"
            f" {figures['longest_max']} | {figures['copied']:.2%} | {new} |"
            f" {figures['repeated']:.2%} |"
        )
    return "\n".join(lines)


def sampling_table(report: dict[str, Any]) -> str:
    """What other sampling settings would change, as Markdown."""
    theirs = report["originality"]["held out"]["repeated"]
    lines = [
        "| temperature, top-k, top-p | attributed to the right voice | longest span: 99%"
        f" | {REPEATED_WORDS}-grams repeated | of the held-out works' |",
        "|---|---|---|---|---|",
    ]
    for row in report["sampling"]:
        name = ", ".join(f"{value:g}" for value in row["sampling"])
        times = f"{row['repeated'] / theirs:.2f} times" if theirs else "they repeat none"
        lines.append(
            f"| {name} | {_listed(row['right'])} | {row['longest_p99']:.0f} words |"
            f" {row['repeated']:.2%} | {times} |"
        )
    return "\n".join(lines)


def _voices(arguments: Any, writer: Writer, held_out: Path) -> list[str]:
    """The voices asked about, in order; raises UserError where the model does not know one."""
    validated = {work.voice for work in split_works(read_text(held_out))}
    given = arguments.voices.split(",") if arguments.voices else sorted(validated, reverse=True)
    if unknown := [voice for voice in given if voice not in writer.voices]:
        raise UserError(f"the model has no voice {unknown[0]!r}; name some of its own: --voices")
    if len(set(given)) < max(2, len(given)):
        raise UserError("at least two voices can be told apart; name them with --voices A,B")
    return given


@command("attribution.py")
def main(argv: Sequence[str]) -> None:
    """Prints the tables, and writes report and picture where they are asked for."""
    parser = ArgumentParser(
        prog="attribution.py", description="Attribute what a model writes, by a classifier."
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--voices", help="as wilde,lovecraft (default: those validated)")
    parser.add_argument("--data-dir", type=Path, help="where the texts are now")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--picture", type=Path, help="the PNG file to write, of two voices")
    parser.add_argument("--per-prompt", type=int, default=64, help="texts for each prompt")
    parser.add_argument("--words", type=int, default=PASSAGE_WORDS, help="of a work's passage")
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument(
        "--sampling",
        type=_sampling,
        nargs="+",
        default=[],
        metavar="T,K,P",
        help="also measure these temperatures, top-k and top-p",
    )
    arguments = parser.parse_args(argv)

    for name, least in (("per_prompt", 1), ("words", SHORTEST), ("folds", 2)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if arguments.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib draws the picture: scripts/install.sh dev,plots")
    location = checkpoint.locate(arguments.checkpoint)
    meta = location.meta
    writer = Writer.load(location, select_device("auto"))
    data = arguments.data_dir or Path(meta.config["data_dir"])
    train, held_out = (find_text(meta.config[f"{name}_file"], data) for name in ("train", "val"))
    index = novelty.load(train, meta.train_sha256).words
    voices = _voices(arguments, writer, held_out)
    if arguments.picture is not None and len(voices) != 2:
        raise UserError(f"--picture shows two voices, not {len(voices)}; leave it out")
    theirs = passages([held_out], arguments.words, writer.voices).texts
    if not theirs:
        raise UserError(f"{held_out} has no passage of {arguments.words} words; lower --words")
    known = passages([train, held_out], arguments.words, voices)
    for voice in voices:
        works = {work for work, of in zip(known.works, known.voices, strict=True) if of == voice}
        if len(works) < arguments.folds:
            raise UserError(
                f"{train} and {held_out} have {len(works)} works of {voice} with"
                f" {arguments.words} words; --folds needs as many, and at least 2"
            )
    report: dict[str, Any] = {
        "command": " ".join(["scripts/attribution.py", *argv]),
        "checkpoint": str(location),
        "versions": environment.facts(),
        "voices": voices,
        "passage_words": arguments.words,
        "works_left_out": leaving_works_out(known, arguments.folds),
        "written": {},
        "blends": [],
        "originality": {},
    }
    classifier = make_classifier().fit(known.texts, known.voices)
    # A word is about four thirds of a token.
    max_tokens = math.ceil(arguments.words * 4 / 3)

    def texts_of(blend: dict[str, float], sampling: Sampling = DEFAULT) -> list[str]:
        texts = written(writer, blend, arguments.per_prompt, max_tokens, 0, sampling)
        if not texts:
            raise UserError(f"the model writes nothing of {SHORTEST} words; train it longer")
        return texts

    own = {voice: texts_of({voice: 1.0}) for voice in voices}
    for voice, texts in own.items():
        said = classifier.predict(texts)
        report["written"][voice] = {
            "right": share_right(said == voice),
            "taken_for": dict(Counter(said.tolist()).most_common()),
        }
        report["originality"][voice] = originality(index, texts)
    report["originality"]["held out"] = originality(index, theirs)
    if len(voices) == 2:
        report["blends"] = [*_blends(voices, own, texts_of, classifier)]
    report["sampling"] = []
    for sampling in arguments.sampling:
        by_voice = {voice: texts_of({voice: 1.0}, sampling) for voice in voices}
        right = [classifier.predict(texts) == voice for voice, texts in by_voice.items()]
        report["sampling"].append(
            {"sampling": sampling, "right": share_right(np.concatenate(right))}
            | originality(index, [text for texts in by_voice.values() for text in texts])
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.picture is not None:
        draw(report, arguments.picture)
    tables = [attribution_table(report), originality_table(report)]
    if report["blends"]:
        tables.insert(1, blend_table(report))
    if report["sampling"]:
        tables.append(sampling_table(report))
    print("\n\n".join(tables))


def _sampling(given: str) -> Sampling:
    """The settings of a text such as 0.8,40,0.9. Raises UserError."""
    try:
        temperature, top_k, top_p = given.split(",")
        sampling = Sampling(float(temperature), int(top_k), float(top_p))
    except ValueError:
        raise UserError(
            f"--sampling {given!r} must be temperature, top-k and top-p: 0.8,40,0.9"
        ) from None
    sampling.validate()
    return sampling


def _blends(
    voices: Sequence[str],
    own: dict[str, list[str]],
    texts_of: Callable[[dict[str, float]], list[str]],
    classifier: Pipeline,
) -> Iterator[dict[str, Any]]:
    """For each of WEIGHTS of the second voice, what is attributed to it."""
    first, second = voices
    column = list(classifier.classes_).index(second)
    for weight in WEIGHTS:
        pure = {0.0: first, 1.0: second}.get(weight)
        texts = own[pure] if pure else texts_of({first: 1 - weight, second: weight})
        probability = classifier.predict_proba(texts)[:, column]
        yield {
            "weight": weight,
            "attributed": share_right(probability > 0.5),
            "probability": float(probability.mean()),
        }


if __name__ == "__main__":
    sys.exit(main())
