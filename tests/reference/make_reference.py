"""Compute the reference figures gpt2.npz and gemma.npz with Hugging Face Transformers.

Run from the root of the repository, in an environment of its own:

    python3 -m venv refvenv
    refvenv/bin/pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    refvenv/bin/python tests/reference/make_reference.py

The figures beside this file were made so, on a CPU, with one thread, in float32, with Python
3.11.7, torch 2.13.0 (+cpu), transformers 5.23.0 and numpy 2.4.6. The tests only read them: they
need neither torch nor transformers.

Each file holds, for the weights and tokens that `weights.py` makes:

- logits: float32, [2, 24, 61], at every position;
- loss: float32, the mean cross-entropy of the next token over the first 23 positions of each row;
- grad_norm_names: the names of the tensors, as in the Transformers state dict;
- grad_norms: float32, the Frobenius norm of the loss's gradient in each of those tensors. The
  tied embedding is there once, with the gradient of both its uses.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from weights import CONFIG, reference_tokens, reference_weights


def build_model(architecture: str) -> transformers.PreTrainedModel:
    """Build the Transformers model of an architecture, with weights of its own making."""
    width = CONFIG["n_embd"]
    if architecture == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=CONFIG["vocab_size"],
                n_positions=CONFIG["block_size"],
                n_embd=width,
                n_layer=CONFIG["n_layer"],
                n_head=CONFIG["n_head"],
                n_inner=4 * width,
                activation_function="gelu_new",
                layer_norm_epsilon=1e-5,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
                tie_word_embeddings=True,
                attn_implementation="eager",
            )
        )
    # Without pad_token_id=None, Gemma's default makes token 0 a padding token, and its embedding
    # gets no gradient from the input side.
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=CONFIG["vocab_size"],
            max_position_embeddings=CONFIG["block_size"],
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=CONFIG["n_layer"],
            num_attention_heads=CONFIG["n_head"],
            num_key_value_heads=CONFIG["n_head"],
            head_dim=width // CONFIG["n_head"],
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attention_bias=False,
            attention_dropout=0.0,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )


def check_gemma(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> None:
    """Check that Gemma scales its embeddings by sqrt(width) and has the activation asked for."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        first = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[0]
        torch.testing.assert_close(first, weight[tokens] * CONFIG["n_embd"] ** 0.5)
        x = torch.linspace(-4, 4, 101)
        torch.testing.assert_close(
            model.model.layers[0].mlp.act_fn(x), torch.nn.functional.gelu(x, approximate="tanh")
        )


def load_model(architecture: str) -> transformers.PreTrainedModel:
    """Build the model and put the reference weights into it, every one of them."""
    weights = reference_weights(architecture)
    model = build_model(architecture)
    result = model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in weights.items()}, strict=False
    )
    assert not result.unexpected_keys, result.unexpected_keys
    missing = {
        name
        for name in result.missing_keys
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    assert not missing, missing
    assert model.lm_head.weight is model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, value in weights.items():
        assert np.array_equal(parameters[name].detach().numpy(), value), name
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32
    return model.eval()


def compute(architecture: str) -> dict[str, np.ndarray]:
    """Compute the logits, the loss and the gradient norms of an architecture."""
    model = load_model(architecture)
    tokens = torch.from_numpy(reference_tokens()).long()
    if architecture == "gemma":
        check_gemma(model, tokens)
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, CONFIG["vocab_size"]), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        norms[name] = torch.linalg.vector_norm(parameter.grad).item()
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "grad_norm_names": np.array(list(norms)),
        "grad_norms": np.array(list(norms.values()), dtype=np.float32),
    }


def main() -> None:
    """Write the figures of both architectures beside this file."""
    torch.set_num_threads(1)
    for architecture in ("gpt2", "gemma"):
        figures = compute(architecture)
        np.savez(Path(__file__).with_name(f"{architecture}.npz"), **figures)
        count = sum(value.size for value in reference_weights(architecture).values())
        print(f"{architecture}: {count} parameters, loss {figures['loss']:.7f}")


if __name__ == "__main__":
    main()
