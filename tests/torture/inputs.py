"""S1, S2: tokenizers, settings, prompts and texts of whatever kind."""

import contextlib
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gothic_jax.commands import train
from gothic_jax.config import changed_by, get_config, parse_overrides, validate
from gothic_jax.errors import UserError
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import encode_text
from gothic_jax.text.works import read_text, split_works
from tests.common import TEXT, Workplace
from tests.torture.world import Figure, in_lanes, limited

MEMORY = 4 << 30
"""Bytes that a process in these trials may take."""
PROBE = 'Said the duchess: "caf\u00e9" \u2014 and\n\n  the \U0001f3a9 agreed.\t'
REGEX = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
PADDING = {
    "strategy": {"Fixed": 2**60}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "",
}  # fmt: skip
NORMALIZERS = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1000}] * 99}
HOSTILE: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "\0", "a" * 10_000, [], {},
    [[]], REGEX, PADDING, NORMALIZERS,
    {"type": "BPE"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"},
    {"type": "Unigram", "vocab": [], "unk_id": 7},
    {"type": "WordPiece", "vocab": {}, "unk_token": "?", "max_input_chars_per_word": 0},
    {"max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Right"},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
]  # fmt: skip


def mutated(content: bytes, rng: random.Random, hostile: list[Any] = HOSTILE) -> bytes:
    """A JSON text with one to three changes: of bytes, or of values, to hostile ones."""
    for _ in range(rng.randint(1, 3)):
        if content and rng.random() < 0.4:
            changed = bytearray(content)
            at = rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[at] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[at : at + rng.randint(1, 200)]
                case 2:
                    changed[at:at] = rng.randbytes(rng.randint(1, 20))
                case _:
                    changed[at:at] = b"[" * rng.choice([10, 100_000])
            content = bytes(changed)
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            continue
        node, key = value, None
        while isinstance(node, dict | list) and node:
            parent = node
            key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
            node = parent[key]
            if rng.random() < 0.4:
                break
        if key is None:
            continue
        match rng.randrange(4):
            case 0:
                del parent[key]
            case 1:
                other = rng.choice([*value])
                parent[key] = value[other]
            case _:
                parent[key] = rng.choice(hostile)
        try:
            content = json.dumps(value).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            continue
    return content


def comes_back(text: str, tokenizer: Tokenizer) -> bool:
    """Whether the bytes of a text's tokens are those of the text."""
    return b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()


def _try_tokenizers(path: str, first: int, last: int) -> None:
    """In a process of its own: says the number of each trial before it begins."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    content = Path(path).read_bytes()
    for number in range(first, last):
        print(f"trial {number}", flush=True)
        try:
            tokenizer = Tokenizer.parse(mutated(content, random.Random(number)), "mutated")
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 500:
                print(f"wrong {number}: {error!r:.300}", flush=True)
            continue
        if not comes_back(PROBE, tokenizer):
            print(f"wrong {number}: text comes back as another", flush=True)


def tokenizers(workplace: Workplace, count: int) -> Figure:
    """S1: mutated tokenizer files work, or are refused in a line; bombs are refused."""
    path = workplace.root / "tokenizer.json"
    wrong: list[str] = []
    first = 0
    while first < count:
        call = f"_try_tokenizers({str(path)!r}, {first}, {count})"
        code = f"from tests.torture.inputs import _try_tokenizers; {call}"
        command = [sys.executable, "-c", code]
        last = f"trial {first}"
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=60 + count / 20
            )
            out, reason = result.stdout, f"code {result.returncode}: {result.stderr[-300:]}"
            if "panicked" in result.stderr:
                wrong.append(f"a panic: {result.stderr[:300]}")
            ended = result.returncode == 0
        except subprocess.TimeoutExpired as error:
            out, reason, ended = (error.stdout or b"").decode(), "it hangs", False
        lines = out.splitlines()
        wrong += [line for line in lines if line.startswith("wrong")]
        if ended:
            break
        last = next((line for line in reversed(lines) if line.startswith("trial")), last)
        wrong.append(f"{last}: {reason}")
        first = int(last.split()[1]) + 1
    bombs = _bombs(path.read_text())

    def explode(index: int) -> list[str]:
        name, content = [*bombs.items()][index]
        bomb = workplace.root / f"bomb-{index}.json"
        bomb.write_bytes(content)
        command = [
            *(sys.executable, "-m", "gothic_jax.commands.train", "--tokenizer", str(bomb)),
            *("--data-dir", str(workplace.root), "--out-dir", str(workplace.root / f"o{index}")),
        ]
        try:
            result = subprocess.run(
                limited("RLIMIT_DATA", MEMORY, command), cwd=workplace.root, capture_output=True,
                text=True, timeout=60,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [f"{name}: hangs"]
        if result.returncode != 2 or result.stderr.count("\n") != 1:
            return [f"{name}: code {result.returncode}: {result.stderr[-300:]}"]
        return []

    wrong += in_lanes(explode, len(bombs))
    return Figure(
        "S1", "mutated tokenizer files and size bombs: neither working nor refused in a line",
        count + len(bombs), wrong, f"{len(bombs)} bombs through gothic-train in 4 GiB",
    )  # fmt: skip


def _bombs(sound: str) -> dict[str, bytes]:
    def changed(**values: Any) -> bytes:
        return json.dumps(json.loads(sound) | values).encode()

    model = json.loads(sound)["model"]
    added = json.loads(sound)["added_tokens"]
    return {
        "100 MB of brackets": b"[" * 100_000_000,
        "100 MB of one string": b'"' + b"a" * 100_000_000 + b'"',
        "a token with id 4e9": changed(
            added_tokens=[*added, {**added[0], "id": 4_000_000_000, "content": "<|x|>"}]
        ),
        "ids up to 4e9": changed(model=model | {"vocab": model["vocab"] | {"zz": 4_000_000_000}}),
        "padding to 2**60": changed(padding=PADDING),
        "a regular expression that backtracks": changed(pre_tokenizer=REGEX),
        "a normalizer that multiplies": changed(normalizer=NORMALIZERS),
        "merges of what is not there": changed(model=model | {"merges": [["q", "zzz"]]}),
        "merges of nothing": changed(model=model | {"merges": [["", ""]]}),
        "random dropout": changed(model=model | {"dropout": 0.5}),
        "an empty added token": changed(added_tokens=[*added, {**added[0], "content": ""}]),
        "an empty file": b"",
        "not UTF-8": b"\xff\xfe" * 1000,
    }


VALUES = [
    "", "0", "-1", "1e400", "nan", "inf", "-inf", "1e-400", "99999999999999999999", "True", "None",
    "\u0000", "\udcff", "[1]", "{}", "(", "'", '"', "a=b", "--", "../..", "/dev/null", "1_000",
    "0x10", "\u0661", "1.5", "a" * 100_000, "\n", "${HOME}", "%s%n", "\u202e",
]  # fmt: skip


def settings(workplace: Workplace, count: int) -> Figure:
    """S2: settings of any name and value are taken, or refused in a line. Nothing is trained."""
    rng = random.Random(2)
    names = [
        "max_iters", "batch_size", "learning_rate", "model.n_layer", "model.n_embd", "model.n_head",
        "model.vocab_size", "model.architecture", "seed", "compute_dtype", "save_minutes",
        "out_dir", "data_dir", "model", "", "zzz", "model.", ".", "compile", "beta1", "train_file",
    ]  # fmt: skip
    wrong: list[str] = []
    for trial in range(count):
        arguments = []
        for _ in range(rng.randint(1, 4)):
            name = rng.choice(names) if rng.random() < 0.9 else _noise(rng)
            value = rng.choice(VALUES) if rng.random() < 0.7 else _noise(rng)
            form = rng.randrange(4)
            arguments += [
                [f"--config.{name}={value}"], [f"--config.{name}", value], [f"--{name}={value}"],
                [value],
            ][form]  # fmt: skip
        try:
            validate(changed_by(get_config(), parse_overrides(arguments)))
        except UserError:
            pass
        except Exception as error:
            wrong.append(f"trial {trial}: {arguments!r:.200}: {type(error).__name__}: {error}")
    for value in VALUES:
        # And through the command itself, which then stops for want of a text.
        places = ["--data-dir", f"{workplace.root}/none", "--out-dir", f"{workplace.root}/o"]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                code = train.main([*places, f"--config.tokenizer={value}"])
        except Exception as error:
            wrong.append(f"tokenizer {value!r:.100}: {type(error).__name__}: {error}")
        else:
            if code != 2:
                wrong.append(f"tokenizer {value!r:.100}: code {code}")
    return Figure("S2", "settings of any name and value", count + len(VALUES), wrong)


def _noise(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice([rng.randrange(128), rng.randrange(0x250)]))
        for _ in range(rng.randrange(12))
    )


def texts(workplace: Workplace, count: int, *, long: bool) -> Figure:
    """S2: text files of any bytes are read exactly, or refused in a line."""
    tokenizer = Tokenizer.load(workplace.root / "tokenizer.json")
    rng = random.Random(3)
    wrong: list[str] = []
    pieces = [
        b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"<|wilde|>\n",
        b"\n<|endoftext|>\n", b"<|x", "caf\u00e9 \u2014 ".encode(), "\u2028\x1c\x85".encode(), b" ",
        b"word ", b"'s", "\U0001f3a9".encode(), b"\xf4\x90\x80\x80", b"\t\t", b"<|all|>\n",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        for trial in range(count):
            content = b"".join(rng.choices(pieces, k=rng.randrange(60)))
            path.write_bytes(content)
            try:
                text = read_text(path)
                encode_text(path, text, tokenizer)
            except UserError as error:
                sound = content.decode("utf-8-sig", "replace")
                works = split_works(sound.replace("\r\n", "\n").replace("\r", "\n"))
                if "\ufffd" not in sound and "\0" not in sound and works:
                    wrong.append(f"text {trial}: {content!r:.200}: refused: {error}")
                continue
            except Exception as error:
                wrong.append(f"text {trial}: {content!r:.200}: {type(error).__name__}: {error}")
                continue
            if not all(comes_back(work.text, tokenizer) for work in split_works(text)):
                wrong.append(f"text {trial}: {content!r:.200}: comes back as another")
    if long:
        wrong += _long_texts(workplace)
    return Figure(
        "S2", "text files: NUL, bad UTF-8, lone surrogates, BOM, empty, short, 100 MB lines",
        count + 2 * long, wrong,
    )  # fmt: skip


def _long_texts(workplace: Workplace) -> list[str]:
    """Lines of 100 MB through `gothic-tokenize` and the token cache, in 4 GiB: prose, one word."""
    wrong = []
    words = TEXT.replace("\n", " ").replace("<|", "").replace("|>", "")
    for name, line, expected in (
        ("prose", words * (100_000_000 // len(words)), 0),
        ("a word", "a" * 100_000_000, 2),
    ):
        path = workplace.root / "long.txt"
        path.write_text(line)
        program = (
            "import sys; from pathlib import Path\n"
            "from gothic_jax.errors import UserError\n"
            "from gothic_jax.text.tokens import encode_text\n"
            "from gothic_jax.text.works import read_text\n"
            "from gothic_jax.text.tokenizer import Tokenizer\n"
            "path = Path(sys.argv[1])\n"
            "try: encode_text(path, read_text(path), Tokenizer.load(Path(sys.argv[2])))\n"
            "except UserError: sys.exit(2)\n"
        )
        command = [sys.executable, "-c", program, str(path), str(workplace.root / "tokenizer.json")]
        result = subprocess.run(
            limited("RLIMIT_DATA", MEMORY, command), capture_output=True, text=True, timeout=600
        )
        if result.returncode != expected:
            wrong.append(f"100 MB of {name}: code {result.returncode}: {result.stderr[-300:]}")
        path.unlink()
    return wrong
