"""An exported model: a folder that is complete or not there, proved, with its card and manifest."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.model.layouts import to_gguf, to_huggingface
from gothic_jax.shipping import huggingface, llama, verify
from gothic_jax.shipping.request import Request
from gothic_jax.text.voices import ALL, voice_token
from gothic_jax.text.works import find_text, read_text, works_of
from gothic_jax.writing.settings import Sampling, Settings
from gothic_jax.writing.writer import Writer

WINDOWS = 4
"""Windows of text on which an export is compared."""
LEAST_TOKENS = 8 * WINDOWS
SAMPLE_TOKENS = 120
CARD = "README.md"
MARK = "export.json"
"""The file that tells an export from other folders."""
QUANTUM = 32
"""q8_0 has a scale for each so many weights of a row."""


def export(
    checkpoint: Checkpoint, folder: Path, request: Request, *, overwrite: bool, text: str | None
) -> tuple[list[verify.Proof], list[str]]:
    """Writes the forms, each into a folder of its own where there are several, and proves them.

    They are compared with this program on `text`, and what each comparison found is returned, with
    the forms that no program here can run; with None nothing is compared. Raises UserError where
    the folder is there already and is not an export to overwrite, a package is missing, a file
    cannot be written, or a form is another model: the folder is then as it was.
    """
    folder = folder.absolute()
    config = checkpoint.meta.model_config
    if {"gguf", "ollama"} & {*request.forms}:
        llama.load_package("gguf")
        if request.kind == "q8_0" and config.n_embd % QUANTUM:
            raise UserError(
                f"--type q8_0 needs a width that is a multiple of {QUANTUM}, not {config.n_embd};"
                " use f16"
            )
    try:
        _refuse_what_is_there(folder, overwrite=overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:
            new = Path(place) / "new"
            new.mkdir()
            _write(checkpoint, new, request)
            found = ([], []) if text is None else _prove(checkpoint, new, request, text)
            (new / MARK).write_text(json.dumps({"seal": checkpoint.seal, "name": request.name}))
            with ThreadPoolExecutor(manifest.HASHERS) as pool:
                manifest.write(new, {}, pool)
            _refuse_what_is_there(folder, overwrite=overwrite)  # it may have changed since
            old = Path(place) / "old"  # goes with the temporary folder
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return found


def _write(checkpoint: Checkpoint, folder: Path, request: Request) -> None:
    config, tokenizer = checkpoint.meta.model_config, checkpoint.tokenizer
    params = checkpoint.named_params()
    for form in request.forms:
        place = place_of(folder, form, request)
        place.mkdir(exist_ok=True)
        if form == "hf":
            huggingface.write(
                place, to_huggingface(params, config), config, tokenizer, request.dtype
            )
            card = "".join(f"{line}\n" for line in _card(checkpoint, request))
            (place / CARD).write_text(card, encoding="utf-8")
            continue
        file = place / _gguf_name(request)
        tensors = to_gguf(params, config)
        llama.write(file, tensors, config, tokenizer, request.name, request.kind)
        if form == "ollama":
            (place / "Modelfile").write_text(llama.modelfile(file.name, config, tokenizer.voices))


def _prove(
    checkpoint: Checkpoint, folder: Path, request: Request, text: str
) -> tuple[list[verify.Proof], list[str]]:
    """Compares what was written with this program, and adds the tables to the cards."""
    forms = [form for form in request.forms if not _lacking(form)]
    missing = [
        f"{form}: {' and '.join(lacking)} not installed (scripts/install.sh ship)"
        for form in request.forms
        if (lacking := _lacking(form))
    ]
    if "gguf" in forms and "ollama" in forms:
        forms.remove("ollama")  # the same file
    if not forms:
        return [], missing
    config = checkpoint.meta.model_config
    params = checkpoint.params(SingleDeviceSharding(jax.devices("cpu")[0]))
    own = verify.reference(params, config, checkpoint.tokenizer, text, WINDOWS)
    proofs = []
    for form in forms:
        place = place_of(folder, form, request)
        if form == "hf":
            proof = verify.huggingface(place, own, request.dtype)
            with (place / CARD).open("a", encoding="utf-8") as card:
                card.write(f"\n## Compared with the original\n\n{verify.table([proof])}\n")
        else:
            proof = verify.llama_cpp(place / _gguf_name(request), own, request.kind)
        proofs.append(proof)
    if wrong := [f"{each.form}: {', '.join(each.failures)}" for each in proofs if each.failures]:
        raise UserError(
            f"the export is not the same model: {'; '.join(wrong)}. Nothing is kept; --no-verify"
            " writes it all the same"
        )
    return proofs, missing


def _lacking(form: str) -> list[str]:
    needed = ("transformers", "torch") if form == "hf" else ("xllamacpp",)
    return [name for name in needed if importlib.util.find_spec(name) is None]


def place_of(folder: Path, form: str, request: Request) -> Path:
    """Where a form is, in the folder of an export."""
    return folder / form if len(request.forms) > 1 else folder


def _gguf_name(request: Request) -> str:
    return f"{request.name}-{request.kind}.gguf"


def _refuse_what_is_there(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} is there already; --overwrite replaces it, or name another")
    # Nothing else is ever deleted: an export is what its manifest says, and no more.
    if not (folder / MARK).is_file():
        raise UserError(
            f"--overwrite replaces an export, and {folder} is none; name another folder"
        )
    try:
        manifest.verify(folder)
    except manifest.Damaged as damage:
        raise UserError(
            f"--overwrite replaces an export as it was written, and {folder} has changed"
            f" ({damage}); name another folder"
        ) from damage


def text_to_compare_on(checkpoint: Checkpoint, given: Path | None) -> str:
    """The first work of a text: of `given`, or of the run's validation text.

    Where that is not here, it is what the model writes itself. Raises UserError where a text is too
    short, or `given` cannot be read.
    """
    meta = checkpoint.meta
    path = given or find_text(meta.config["val_file"], Path(meta.config["data_dir"]))
    if given is None and not path.is_file():
        return " ".join(text for _, text in _samples(checkpoint, samples=WINDOWS))
    text = works_of(path, read_text(path))[0].text
    if len(checkpoint.tokenizer.encode(text)) < LEAST_TOKENS:
        raise UserError(f"the first work of {path} has under {LEAST_TOKENS} tokens; name another")
    return text


def _samples(checkpoint: Checkpoint, samples: int) -> Iterator[tuple[str, str]]:
    """Samples in each validated voice, with the voice; the first that come, of seed 1."""
    writer = Writer.load(checkpoint, jax.devices()[0])
    voices = [voice for voice in checkpoint.meta.scores or {} if voice != ALL]
    prompt = writer.encode(verify.PROMPT)
    for voice in voices or [""]:
        settings = Settings(Sampling(), SAMPLE_TOKENS, {voice: 1.0} if voice else {}, seed=1)
        for sample in writer.write(prompt, settings, samples, seed=1):
            yield voice, verify.PROMPT + sample.text


def _card(checkpoint: Checkpoint, request: Request) -> Iterator[str]:
    """The README.md of a Hugging Face folder."""
    meta, tokenizer = checkpoint.meta, checkpoint.tokenizer
    voices = [*tokenizer.voices]
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "---"
    yield f"# {request.name}"
    yield ""
    config = meta.model_config
    yield (
        f"A {config.architecture} model of {config.n_layer} layers, {config.n_head} heads and width"
        f" {config.n_embd}. It reads {config.block_size} tokens."
    )
    yield ""
    if voices:
        yield f"It writes in these voices: {', '.join(voices)}."
        yield f"A text opens with its voice's token, such as `{voice_token(voices[0])}`."
    yield (
        "`<|any|>` opens a text in no voice in particular. The chat template takes the voice as"
        " system message, or as the argument `voice`. With `split_special_tokens=True` the"
        " tokenizer reads such a marker in a text as ordinary characters."
    )
    yield ""
    if not checkpoint.is_foreign:
        yield "| text | SHA-256 |"
        yield "|---|---|"
        yield f"| training, {Path(meta.config['train_file']).name} | {meta.train_sha256} |"
        yield f"| validation, {Path(meta.config['val_file']).name} | {meta.val_sha256} |"
        yield ""
    if meta.scores:
        yield "| validation text | loss | bits per byte |"
        yield "|---|---|---|"
        for voice, score in meta.scores.items():
            yield f"| {voice} | {score['loss']:.4f} | {score['bits_per_byte']:.4f} |"
        yield ""
    yield f"Exported from iteration {meta.iteration:,}; seal {checkpoint.seal}."
    yield ""
    yield f'The first samples of seed 1 after "{verify.PROMPT}", with gothic-chat\'s settings:'
    for voice, text in _samples(checkpoint, samples=1):
        yield ""
        yield f"**{voice or 'any'}**"
        yield ""
        yield from (f"> {line}".rstrip() for line in text.splitlines())
