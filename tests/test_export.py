"""gothic-export: what it writes, what it refuses, and that a wrong export is found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gothic_jax.checkpoints.checkpoint import leaf_name, locate
from gothic_jax.commands import evaluate, export
from gothic_jax.machine import manifest
from gothic_jax.model.gpt import init_params
from gothic_jax.model.layouts import to_gguf, to_huggingface
from gothic_jax.model.shape import ModelConfig
from gothic_jax.shipping import huggingface, llama
from gothic_jax.shipping.verify import Proof
from tests.common import TINY, Workplace, run

runtimes = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("torch", "transformers", "xllamacpp")),
    reason="the programs that are exported for are not installed: scripts/install.sh ship",
)
trainer = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("torch", "transformers", "accelerate")),
    reason="transformers cannot train here: scripts/install.sh ship",
)
GPT2 = ModelConfig(**vars(TINY) | {"architecture": "gpt2"})


def named(config: ModelConfig) -> dict[str, np.ndarray]:
    """New parameters, none of which is 0 or 1."""
    drawn = np.random.default_rng(0)
    leaves = jax.tree.leaves_with_path(init_params(config, 0))
    return {
        leaf_name(path): np.asarray(leaf) + drawn.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in leaves
    }


def test_gemma_in_other_names_has_each_number_once() -> None:
    params = named(TINY)
    ours = params["blocks.0.attention.qkv.kernel"]
    for tensors, names, layer in (
        (to_huggingface(params, TINY), ("self_attn.{}_proj.weight", "mlp.{}_proj.weight"),
         "model.layers.0."),
        (to_gguf(params, TINY), ("attn_{}.weight", "ffn_{}.weight"), "blk.0."),
    ):  # fmt: skip
        assert sum(a.size for a in tensors.values()) == sum(a.size for a in params.values())
        parts = [tensors[layer + names[0].format(part)] for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts), ours.T)
        gate, up = (tensors[layer + names[1].format(part)] for part in ("gate", "up"))
        np.testing.assert_array_equal(
            np.concatenate([gate, up]), params["blocks.0.mlp.up.kernel"].T
        )
    scale = params["final_norm.scale"]
    assert np.array_equal(to_huggingface(params, TINY)["model.norm.weight"], scale - 1)
    assert np.array_equal(to_gguf(params, TINY)["output_norm.weight"], scale)


def test_gpt2_keeps_its_kernels_for_transformers_and_turns_them_for_llama_cpp() -> None:
    params = named(GPT2)
    theirs, gguf = to_huggingface(params, GPT2), to_gguf(params, GPT2)
    assert len(theirs) == len(gguf) == len(params)
    kernel = params["blocks.0.mlp.up.kernel"]
    np.testing.assert_array_equal(theirs["transformer.h.0.mlp.c_fc.weight"], kernel)
    np.testing.assert_array_equal(gguf["blk.0.ffn_up.weight"], kernel.T)
    np.testing.assert_array_equal(theirs["transformer.ln_f.bias"], params["final_norm.bias"])


def test_a_folder_for_transformers_needs_no_other_package(
    trained: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "mine"
    command = ["--checkpoint", str(trained.out_dir), "--output", str(folder), "--no-verify"]
    assert export.main([*command, "--to", "hf"]) == 0
    out = capsys.readouterr().out
    seal, kept = manifest.verify(folder, keep=("config.json", "README.md"))
    config = json.loads(kept["config.json"])
    assert (config["head_dim"], config["vocab_size"]) == (16, 320)
    checkpoint = locate(str(trained.out_dir))
    card = kept["README.md"].decode()
    for fact in (checkpoint.seal, checkpoint.meta.train_sha256, "**wilde**", "| lovecraft |"):
        assert fact in card
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044
        assert f"{path}: {path.stat().st_size:,} bytes" in out
    weights = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        weights["model.embed_tokens.weight"], checkpoint.named_params()["token_embedding"]
    )
    # What is there stays, unless it is an export and is to be replaced.
    assert export.main([*command, "--to", "hf"]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert export.main([*command, "--to", "hf", "--overwrite", "--dtype", "bfloat16"]) == 0
    assert manifest.verify(folder)[0] != seal
    (folder / "my notes.txt").write_text("mine")
    assert export.main([*command, "--to", "hf", "--overwrite"]) == 2
    assert "my notes.txt is not in the manifest" in capsys.readouterr().err
    assert (folder / "my notes.txt").read_text() == "mine"


def test_only_an_export_is_ever_overwritten(
    trained: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(trained.out_dir), "--no-verify", "--to", "hf", "--overwrite"]
    mine = tmp_path / ".out.tmp"
    mine.mkdir()
    for folder in (trained.out_dir / "6", trained.root):
        before = sorted(folder.rglob("*"))
        assert export.main([*command, "--output", str(folder)]) == 2
        assert f"{folder} is none" in capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before
    assert export.main([*command, "--output", str(tmp_path / "out")]) == 0
    assert mine.is_dir()
    text = tmp_path / "markers.txt"
    text.write_text("<|wilde|>\n<|endoftext|>\n")
    for given, told in ((text, "no text"), (tmp_path / "none", "none"), (tmp_path / "s", "tokens")):
        (tmp_path / "s").write_text("Hm.")
        flags = ["--to", "hf", "--text", str(given), "--output", str(tmp_path / "other")]
        assert export.main(["--checkpoint", str(trained.out_dir), *flags]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
        assert not (tmp_path / "other").exists()


def test_nothing_is_left_of_an_export_that_failed(
    trained: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    command = ["--checkpoint", str(trained.out_dir), "--output", str(tmp_path / "out" / "x")]
    with monkeypatch.context() as context:
        context.setattr(huggingface, "write", full)
        assert export.main([*command, "--to", "hf"]) == 2
    assert "No space left" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "gguf", None)
        assert export.main([*command, "--to", "gguf"]) == 2
    assert "scripts/install.sh ship" in capsys.readouterr().err
    assert [*(tmp_path / "out").iterdir()] == []


def test_ollama_is_told_what_the_checkpoint_writes_with() -> None:
    lines = llama.modelfile("m-f16.gguf", TINY, ["wilde", "poe"]).splitlines()
    assert lines[0] == "FROM ./m-f16.gguf"
    # A conversation has its voice once, at its beginning.
    assert lines[1] == (
        'TEMPLATE """{{ $voice := "any" }}{{ range .Messages }}{{ if eq .Role "system" }}'
        '{{ if or (eq .Content "any") (eq .Content "wilde") (eq .Content "poe") }}'
        "{{ $voice = .Content }}{{ end }}{{ end }}{{ end }}<|{{ $voice }}|>"
        '{{ range .Messages }}{{ if ne .Role "system" }}{{ .Content }}{{ end }}{{ end }}"""'
    )
    assert "PARAMETER num_ctx 32" in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert "PARAMETER temperature 1.0" in lines
    assert "PARAMETER repeat_penalty 1.0" in lines


@runtimes
@pytest.mark.long
@pytest.mark.parametrize("architecture", ["gemma", "gpt2"])
def test_the_exported_files_are_the_same_model_elsewhere(
    workplace: Workplace, tmp_path: Path, architecture: str
) -> None:
    assert workplace.train(**{"model.architecture": architecture, "model.n_layer": 2}) == 0
    for kind, dtype in (("f32", "float32"), ("q8_0", "bfloat16")):
        folder = tmp_path / kind
        command = ["--checkpoint", str(workplace.out_dir), "--output", str(folder)]
        done = run("export", [*command, "--type", kind, "--dtype", dtype], tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"| hf {dtype} | transformers" in done.stdout
        assert f"| gguf {kind} | llama.cpp" in done.stdout
        assert "111 of 111" in done.stdout
        assert f"| hf {dtype} |" in (folder / "hf" / "README.md").read_text()
        assert (folder / "ollama" / "Modelfile").is_file()
        manifest.verify(folder)


STEPS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
folder, text, place = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(open(text).read())["input_ids"]
windows = [ids[start : start + 32] for start in range(0, 32 * 8, 32)]
rows = [{"input_ids": window, "labels": window} for window in windows]
def loss():
    batch = torch.tensor(windows)
    with torch.no_grad():
        return model.eval()(input_ids=batch, labels=batch).loss.item()
losses = [loss()]
for steps in (1, 8):
    arguments = TrainingArguments(place, max_steps=steps, per_device_train_batch_size=8,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    last = Trainer(model=model, args=arguments, train_dataset=rows)
    last.train()
    losses.append(loss())
last.save_model(place)
tokenizer.save_pretrained(place)
print(*losses)
"""


@trainer
@pytest.mark.long
@pytest.mark.parametrize("architecture", ["gemma", "gpt2"])
def test_transformers_trains_it_and_what_it_saves_opens_here(
    workplace: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
) -> None:
    assert workplace.train(**{"model.architecture": architecture}) == 0
    folder, saved = tmp_path / "hf", tmp_path / "saved"
    command = ["--checkpoint", str(workplace.out_dir), "--output", str(folder), "--to", "hf"]
    assert export.main([*command, "--no-verify"]) == 0
    text = workplace.root / "mixed_train.txt"
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(folder), str(text), str(saved)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, one, nine = map(float, done.stdout.splitlines()[-1].split())
    assert nine < one < before
    losses = []
    for place in (folder, saved):
        capsys.readouterr()
        assert evaluate.main(["--checkpoint", str(place), "--file", str(text), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("form", "logit", "bits_per_byte", "refused"),
    [
        ("hf float32", 0.9e-5, 0.0, False),
        ("hf float32", 1.1e-5, 0.0, True),
        ("hf float32", np.nan, 0.0, True),
        ("gguf f16", 0.009, 0.9e-4, False),
        ("gguf f16", 0.011, 0.0, True),
        ("gguf f16", 0.0, 1.1e-4, True),
        ("gguf q8_0", 0.2, 0.9e-3, False),
        ("gguf q8_0", 0.2, 1.1e-3, True),
        ("gguf q8_0", 0.2, np.nan, True),
    ],
)
def test_an_export_is_as_near_as_its_type_allows(
    form: str, logit: float, bits_per_byte: float, refused: bool
) -> None:
    proof = Proof(form, "it", 111, 0, logit, 2 + bits_per_byte, 2.0, same_greedy=True)
    assert bool(proof.failures) is refused
    assert proof._replace(texts_differing=1).failures


WRONG = {
    "a norm": """
from gothic_jax.model import layouts
own = layouts.to_gguf
export.to_gguf = lambda params, config: {
    name: array - 1 if "norm" in name else array for name, array in own(params, config).items()}
""",
    "a gate": """
from gothic_jax.model import layouts
own = layouts.to_huggingface
def swapped(params, config):
    tensors = own(params, config)
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    return tensors
export.to_huggingface = swapped
""",
    "an epsilon": """
own = huggingface.model_config
huggingface.model_config = lambda config: own(config) | {"rms_norm_eps": 1e-5}
""",
    "a pre-tokenizer": """
import gguf
own = gguf.GGUFWriter.add_tokenizer_pre
gguf.GGUFWriter.add_tokenizer_pre = lambda self, _: own(self, "default")
""",
}


@runtimes
@pytest.mark.long
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_export_is_refused(workplace: Workplace, tmp_path: Path, wrong: str) -> None:
    # Trained until the parts of the model matter.
    assert workplace.train(max_iters=100, eval_interval=100, **{"model.dropout": 0.0}) == 0
    form = "hf" if wrong in ("a gate", "an epsilon") else "gguf"
    program = (
        "from gothic_jax.shipping import export, huggingface\n"
        f"{WRONG[wrong]}\n"
        "from gothic_jax.commands.export import main\n"
        f"raise SystemExit(main({['--checkpoint', str(workplace.out_dir), '--to', form]!r}"
        f" + ['--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "is not the same model" in done.stderr
    assert not (tmp_path / "out").exists()
