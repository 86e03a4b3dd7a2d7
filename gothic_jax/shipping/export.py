"""An exported model: a folder that is complete or not there, proved, with its card and manifest."""

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
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
from gothic_jax.text.voices import ALL
from gothic_jax.text.works import find_text, read_text, split_works
from gothic_jax.writing.settings import Sampling, Settings
from gothic_jax.writing.writer import Writer

WINDOWS = 4
"""Windows of text on which an export is compared."""
SAMPLE_TOKENS = 120
QUANTUM = 32
"""q8_0 has a scale for each so many weights of a row."""


def export(checkpoint: Checkpoint, folder: Path, request: Request, *, overwrite: bool) -> None:
    """Writes the forms into a folder, each in one of its own where there are several.

    Raises UserError where the folder is there already and is not an export to overwrite, a package
    is missing, or a file cannot be written. A folder of that name is then as it was.
    """
    config = checkpoint.meta.model_config
    if request.kind == "q8_0" and config.n_embd % QUANTUM and request.forms != ("hf",):
        raise UserError(
            f"--type q8_0 needs a width that is a multiple of {QUANTUM}, not {config.n_embd}; use"
            " f16"
        )
    _refuse_what_is_there(folder, overwrite=overwrite)
    params = checkpoint.named_params()
    under_way = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(under_way, ignore_errors=True)
        under_way.mkdir(parents=True)
        for form in request.forms:
            place = _place(under_way, form, request)
            place.mkdir(exist_ok=True)
            if form == "hf":
                tensors = to_huggingface(params, config)
                huggingface.write(place, tensors, config, checkpoint.tokenizer, request.dtype)
                card = "".join(f"{line}\n" for line in _card(checkpoint, request))
                (place / "README.md").write_text(card, encoding="utf-8")
                continue
            file = place / _gguf_name(request)
            tensors = to_gguf(params, config)
            llama.write(file, tensors, config, checkpoint.tokenizer, request.name, request.kind)
            if form == "ollama":
                (place / "Modelfile").write_text(llama.modelfile(file.name, config))
        with ThreadPoolExecutor(manifest.HASHERS) as pool:
            manifest.write(under_way, {}, pool)
        if folder.exists():
            shutil.rmtree(folder)
        under_way.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(under_way, ignore_errors=True)


def prove(
    checkpoint: Checkpoint, folder: Path, request: Request, text: Path | None
) -> tuple[list[verify.Proof], list[str]]:
    """Compares an export with this program; and which forms no program here can run.

    Compares on `text`, or on the run's validation text, or where that is not here on what the model
    itself writes. Adds the table to the card. Raises UserError where a form is another model.
    """
    config, tokenizer = checkpoint.meta.model_config, checkpoint.tokenizer
    missing = [
        f"{form}: {' and '.join(lacking)} not installed (scripts/install.sh ship)"
        for form in request.forms
        if (lacking := _lacking(form))
    ]
    forms = [form for form in request.forms if not _lacking(form)]
    if "gguf" in forms and "ollama" in forms:
        forms.remove("ollama")  # the same file
    if not forms:
        return [], missing
    params = checkpoint.params(SingleDeviceSharding(jax.devices()[0]))
    own = verify.reference(params, config, tokenizer, _text(checkpoint, text), WINDOWS)
    proofs = []
    for form in forms:
        place = _place(folder, form, request)
        if form == "hf":
            proofs.append(verify.huggingface(place, own, request.dtype))
            _add_to_card(folder, place, proofs)
        else:
            proofs.append(verify.llama_cpp(place / _gguf_name(request), own, request.kind))
    if wrong := [f"{each.form}: {', '.join(each.failures)}" for each in proofs if each.failures]:
        raise UserError(
            f"the export in {folder} is not the same model: {'; '.join(wrong)}. Do not pass it on"
        )
    return proofs, missing


def _lacking(form: str) -> list[str]:
    needed = ("transformers", "torch") if form == "hf" else ("xllamacpp",)
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _place(folder: Path, form: str, request: Request) -> Path:
    return folder / form if len(request.forms) > 1 else folder


def _gguf_name(request: Request) -> str:
    return f"{request.name}-{request.kind}.gguf"


def _refuse_what_is_there(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} is there already; --overwrite replaces it, or name another")
    # A person's own files are never deleted: an export is what its manifest says, and no more.
    try:
        manifest.verify(folder)
    except manifest.Damaged as damage:
        raise UserError(
            f"--overwrite replaces an export as it was written, and {folder} is none ({damage});"
            " name another folder"
        ) from damage


def _text(checkpoint: Checkpoint, given: Path | None) -> str:
    meta = checkpoint.meta
    path = given or find_text(meta.config["val_file"], Path(meta.config["data_dir"]))
    if given is not None or path.is_file():
        return split_works(read_text(path))[0].text
    return " ".join(text for _, text in _samples(checkpoint, samples=WINDOWS))


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
        f" {config.n_embd}, trained from scratch with gothic_jax. It reads {config.block_size}"
        " tokens."
    )
    yield ""
    yield f"It writes in these voices: {', '.join(voices) or 'none in particular'}."
    yield (
        "A text opens with its voice's token, such as"
        f" `<|{voices[0] if voices else 'any'}|>`, and `<|any|>` is no voice in particular."
        " The chat template takes the voice as system message, or as the argument `voice`. To"
        " tokenize a text in which such a marker is a word, give `split_special_tokens=True`."
    )
    yield ""
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


def _add_to_card(folder: Path, place: Path, proofs: Sequence[verify.Proof]) -> None:
    with (place / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\n## Compared with the original\n\n{verify.table(proofs)}\n")
    (folder / manifest.NAME).unlink()
    with ThreadPoolExecutor(manifest.HASHERS) as pool:
        manifest.write(folder, {}, pool)
