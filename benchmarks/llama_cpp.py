"""llama.cpp on a CPU, through the server that the package `xllamacpp` carries in-process.

The model is a GGUF file of random weights. Its tokenizer is a dummy: prompts are token ids.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, Decode, Dtype, Model, Prepared, Train, Unable

_SEED = 0
_INIT_STD = 0.02
_TOKEN_START = "t"
"""Each token of the dummy tokenizer is this and a number, so a text says how many it has."""


def prepare(case: Case) -> Prepared:
    """A decoding case, loaded and warm. Raises Unable."""
    if isinstance(case, Train):
        raise Unable("llama.cpp does not train")
    if case.prompt + case.new_tokens > case.model.block_size:
        raise Unable("longer than the block size")
    try:
        gguf = importlib.import_module("gguf")
        xllamacpp = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise Unable("llama.cpp (xllamacpp, gguf) is not installed") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _write(gguf, path, case.model, case.dtype)
        server = _serve(xllamacpp, path, case)

    prompts = np.random.default_rng(_SEED).integers(
        case.model.vocab_size, size=(case.streams, case.prompt)
    )
    request = {
        # As many prompts, as many choices, decoded together in the server's slots.
        "prompt": prompts.tolist(),
        "n_predict": case.new_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "samplers": ["top_k", "temperature"],
        "top_k": 40,
        "temperature": 0.8,
    }

    def run() -> dict[str, float]:
        start = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - start
        return {"run": seconds, "first_token": _first_token(answer, case, seconds)}

    return Prepared(run, {"first_call": run()["run"]})


def _first_token(answer: Any, case: Decode, seconds: float) -> float:
    """Seconds to the first token, by the server's clock, once its answer proves complete."""
    written = [choice["text"].count(_TOKEN_START) for choice in answer.get("choices", [])]
    if written != [case.new_tokens] * case.streams:
        raise RuntimeError(f"llama.cpp wrote {written} tokens; its answer: {answer}")
    timings = answer["timings"]  # of one stream; all of them keep step
    if timings["prompt_n"] != case.prompt or timings["predicted_n"] != case.new_tokens:
        raise RuntimeError(f"llama.cpp's timings are of other work: {timings}")
    if timings["prompt_ms"] + timings["predicted_ms"] > 1000 * seconds:
        raise RuntimeError(f"llama.cpp's timings exceed the clock's {seconds} s: {timings}")
    return float(timings["prompt_ms"]) / 1000


def _serve(xllamacpp: Any, path: Path, case: Decode) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.verbosity = 0
    params.n_parallel = case.streams
    params.n_ctx = case.streams * case.model.block_size
    # All prompts in one batch, so that no stream starts before the others.
    params.n_batch = max(params.n_batch, case.streams * case.prompt)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0  # each run reads its prompt again
    return xllamacpp.Server(params)


def _write(gguf: Any, path: Path, model: Model, dtype: Dtype) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.block_size)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(4 * model.n_embd)
    writer.add_head_count(model.n_head)
    if model.architecture == "gemma":
        writer.add_head_count_kv(model.n_head)
        writer.add_key_length(model.n_embd // model.n_head)
        writer.add_value_length(model.n_embd // model.n_head)
        writer.add_layer_norm_rms_eps(1e-6)
    else:
        writer.add_layer_norm_eps(1e-5)

    # A byte-level BPE vocabulary as far as llama.cpp asks for one. All tokens are ASCII: the
    # server holds back text that ends within a character.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"{_TOKEN_START}{index}" for index in range(model.vocab_size)])
    writer.add_token_merges([f"{_TOKEN_START} 0"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)

    rng = np.random.default_rng(_SEED)
    for name, shape in _tensors(model):
        if len(shape) == 2:
            tensor = rng.normal(0, _INIT_STD, shape).astype(np.float32)
            if dtype == "bfloat16":
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, tensor.astype(dtype))
        else:
            fill = 1 if name.endswith("norm.weight") else 0
            writer.add_tensor(name, np.full(shape, fill, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, [out, in]; the head is the token embedding."""
    width = model.n_embd
    biased = model.architecture == "gpt2"

    def layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        if biased:
            yield f"{name}.bias", shape[:1]

    yield "token_embd.weight", (model.vocab_size, width)
    if model.architecture == "gpt2":
        yield "position_embd.weight", (model.block_size, width)
    for index in range(model.n_layer):
        block = f"blk.{index}"
        yield from layer(f"{block}.attn_norm", width)
        if model.architecture == "gpt2":
            yield from layer(f"{block}.attn_qkv", 3 * width, width)
        else:
            for name in ("attn_q", "attn_k", "attn_v"):
                yield from layer(f"{block}.{name}", width, width)
        yield from layer(f"{block}.attn_output", width, width)
        yield from layer(f"{block}.ffn_norm", width)
        if model.architecture == "gemma":
            yield from layer(f"{block}.ffn_gate", 4 * width, width)
        yield from layer(f"{block}.ffn_up", 4 * width, width)
        yield from layer(f"{block}.ffn_down", width, 4 * width)
    yield from layer("output_norm", width)
