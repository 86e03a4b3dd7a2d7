"""PyTorch: training with a module of our own, plain or compiled, and writing with Transformers."""

import importlib
import math
import time
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.cases import Case, Decode, Model, Prepared, Train, Unable

Variant = Literal["eager", "compile", "transformers"]

_SEED = 0
_INIT_STD = 0.02


def prepare(case: Case, *, device: str, variant: Variant) -> Prepared:
    """A case that is compiled and warm on "cpu" or "cuda". Raises Unable."""
    if isinstance(case, Train) and variant == "transformers":
        raise Unable("Transformers is measured writing only")
    if isinstance(case, Decode) and variant != "transformers":
        raise Unable("PyTorch writes through Transformers")
    if isinstance(case, Train) and case.dtype == "float16":
        raise Unable("float16 would need loss scaling")
    if isinstance(case, Decode) and case.prompt + case.new_tokens > case.model.block_size:
        raise Unable("longer than the block size")
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise Unable("PyTorch is not installed") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise Unable("PyTorch sees no GPU")
    torch.manual_seed(_SEED)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    if isinstance(case, Train):
        run = _trainer(torch, case, device, compiled=variant == "compile")
    else:
        run = _writer(torch, case, device)
    facts = {"first_call": run()["run"]}
    if device == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    return Prepared(run, facts)


def _synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _trainer(
    torch: Any, case: Train, device: str, *, compiled: bool
) -> Callable[[], dict[str, float]]:
    model = build(torch, case.model).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=3e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model) if compiled else model
    batches = torch.randint(
        case.model.vocab_size,
        (case.iterations, case.micro_batches, case.batch, case.model.block_size + 1),
        device=device,
    )

    def run() -> dict[str, float]:
        _synchronize(torch, device)
        start = time.perf_counter()
        for iteration in batches:
            for micro_batch in iteration:
                with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                    loss = forward(micro_batch[:, :-1], micro_batch[:, 1:])
                (loss / case.micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _synchronize(torch, device)
        return {"run": time.perf_counter() - start}

    return run


def build(torch: Any, shape: Model) -> Any:
    """A module that gives the mean loss of `targets` after `tokens`; weights are float32."""
    nn: Any = torch.nn
    functional = nn.functional
    gemma = shape.architecture == "gemma"
    width, heads, head_dim = shape.n_embd, shape.n_head, shape.n_embd // shape.n_head

    def linear(n_in: int, n_out: int, std: float = _INIT_STD) -> Any:
        layer = nn.Linear(n_in, n_out, bias=not gemma)
        nn.init.normal_(layer.weight, std=std)
        if not gemma:
            nn.init.zeros_(layer.bias)
        return layer

    def norm() -> Any:
        return nn.RMSNorm(width, eps=1e-6) if gemma else nn.LayerNorm(width, eps=1e-5)

    residual_std = _INIT_STD / math.sqrt(2 * shape.n_layer)

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm = norm()
            self.qkv = linear(width, 3 * width)
            self.out = linear(width, width, residual_std)
            self.mlp_norm = norm()
            self.up = linear(width, (8 if gemma else 4) * width)
            self.down = linear(4 * width, width, residual_std)

        def forward(self, x: Any, rotation: Any) -> Any:
            qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, heads, head_dim))
            qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, batch, head, time, head_dim]
            query, key = rotate(qkv[:2], rotation) if gemma else qkv[:2]
            value = qkv[2]
            context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(context.transpose(1, 2).flatten(-2))
            hidden = self.up(self.mlp_norm(x))
            if gemma:
                gate, hidden = hidden.chunk(2, dim=-1)
                hidden = functional.gelu(gate, approximate="tanh") * hidden
            else:
                hidden = functional.gelu(hidden, approximate="tanh")
            return x + self.down(hidden)

    def rotate(x: Any, rotation: Any) -> Any:
        cos, sin = rotation
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
            x.dtype
        )

    class Transformer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Embedding(shape.vocab_size, width)
            # Gemma multiplies embeddings by sqrt(width): a token's own logit would start high.
            nn.init.normal_(
                self.token_embedding.weight,
                std=min(_INIT_STD, 4 / width) if gemma else _INIT_STD,
            )
            if gemma:
                half = head_dim // 2
                frequency = 10_000.0 ** (-torch.arange(half) / half)
                angle = torch.arange(shape.block_size)[:, None] * frequency
                self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]))
            else:
                self.position_embedding = nn.Embedding(shape.block_size, width)
                nn.init.normal_(self.position_embedding.weight, std=_INIT_STD)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.n_layer))
            self.final_norm = norm()

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.token_embedding(tokens)
            rotation = None
            if gemma:
                x = x * math.sqrt(width)
                rotation = self.rotation[:, : tokens.shape[1]]
            else:
                x = x + self.position_embedding.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x, rotation)
            logits = functional.linear(self.final_norm(x), self.token_embedding.weight)
            return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Transformer()


def _writer(torch: Any, case: Decode, device: str) -> Callable[[], dict[str, float]]:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise Unable("Transformers is not installed") from error
    shape = case.model
    # No end token: what is sampled ends nothing.
    common = {
        "vocab_size": shape.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if shape.architecture == "gpt2":
        config = transformers.GPT2Config(
            n_positions=shape.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            **common,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.GemmaConfig(
            max_position_embeddings=shape.block_size,
            hidden_size=shape.n_embd,
            intermediate_size=4 * shape.n_embd,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_head,
            head_dim=shape.n_embd // shape.n_head,
            **common,
        )
        model = transformers.GemmaForCausalLM(config)
    model = model.to(device, getattr(torch, case.dtype)).eval()
    prompt = torch.randint(1, shape.vocab_size, (case.streams, case.prompt), device=device)
    arrivals: list[float] = []

    class Streamer:
        """Is handed the prompt, then each token of all streams, copied to the host."""

        def put(self, _: Any) -> None:
            arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    streamer = Streamer()

    def run() -> dict[str, float]:
        arrivals.clear()
        _synchronize(torch, device)
        start = time.perf_counter()
        with torch.inference_mode():
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=case.new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=40,
                top_p=1.0,
                streamer=streamer,
            )
        _synchronize(torch, device)
        seconds = time.perf_counter() - start
        if written.shape[1] != case.prompt + case.new_tokens:
            raise RuntimeError(f"Transformers wrote {written.shape[1] - case.prompt} tokens")
        return {"run": seconds, "first_token": arrivals[1] - start}

    return run
