"""The training step: its arithmetic, accumulation, optimizer, devices and what it learns."""

import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gothic_jax.commands import chat
from gothic_jax.config import get_config
from gothic_jax.errors import UserError
from gothic_jax.model.gpt import Params, graph, init_params
from gothic_jax.model.ops import NOTHING, token_losses
from gothic_jax.model.shape import ModelConfig
from gothic_jax.training.optimizer import (
    apply_gradient_sum,
    init_optimizer,
    learning_rate_schedule,
    make_optimizer,
)
from gothic_jax.training.step import Metrics, TrainState, data_mesh, make_train_step
from tests.common import SETTINGS, TINY, Workplace


def tiny_config(**settings: object) -> ConfigDict:
    config = get_config()
    config.update_from_flattened_dict(SETTINGS | {"model.dropout": 0.0} | settings)
    return config


def windows(config: ConfigDict, seed: int = 0) -> np.ndarray:
    shape = (config.gradient_accumulation_steps, config.batch_size, config.model.block_size + 1)
    random = np.random.default_rng(seed)
    return random.integers(config.model.vocab_size, size=shape).astype(np.int32)


def new_state(config: ConfigDict) -> TrainState:
    params = init_params(ModelConfig(**config.model), config.seed)
    return TrainState(params, init_optimizer(make_optimizer(config), params))


def step(
    config: ConfigDict, batch: np.ndarray, state: TrainState | None = None
) -> tuple[TrainState, Metrics]:
    return jax.jit(make_train_step(config, "xla"))(state or new_state(config), jnp.asarray(batch))


def assert_close(one: Params, other: Params, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def test_loss_is_the_negative_log_softmax_of_the_target() -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 4
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 7)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probabilities, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_losses(logits, targets), -np.log(picked), rtol=1e-5)


def test_k_micro_batches_equal_one_batch_of_all() -> None:
    divided = tiny_config(gradient_accumulation_steps=4, batch_size=2)
    whole = tiny_config(gradient_accumulation_steps=1, batch_size=8)
    batch = windows(divided)
    state, metrics = step(divided, batch)
    other, other_metrics = step(whole, batch.reshape(1, 8, -1))
    np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], other_metrics["gradient_norm"], rtol=1e-5)
    # AdamW's first step is lr * sign(gradient) nearly, which magnifies rounding near 0.
    assert_close(state.params, other.params, atol=2e-5)


@pytest.mark.long
def test_every_token_counts_the_same_however_windows_are_filled() -> None:
    """Windows of 32, 20 and 5 tokens: the mean is over the 57, in one batch and in three."""
    whole = tiny_config(gradient_accumulation_steps=1, batch_size=3)
    batch = windows(whole)
    batch[0, 1, 21:] = NOTHING
    batch[0, 2, 6:] = NOTHING
    model = nnx.merge(graph(ModelConfig(**whole.model), jnp.float32), new_state(whole).params)
    forward = nnx.jit(model)
    nats = [
        token_losses(forward(window[None, :-1]), window[None, 1:]).sum()
        for window in map(jnp.asarray, (batch[0, 0], batch[0, 1, :21], batch[0, 2, :6]))
    ]
    state, metrics = step(whole, batch)
    np.testing.assert_allclose(metrics["loss"], sum(nats) / 57, rtol=1e-5)
    divided = tiny_config(gradient_accumulation_steps=3, batch_size=1)
    other, other_metrics = step(divided, batch.reshape(3, 1, -1))
    np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], other_metrics["gradient_norm"], rtol=1e-5)
    assert_close(state.params, other.params, atol=2e-5)


def test_one_update_with_the_sum_equals_multisteps_fed_step_by_step() -> None:
    config = tiny_config(gradient_accumulation_steps=3)
    optimizer = make_optimizer(config)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    gradients = [jax.tree.map(lambda leaf, i=i: jnp.sin(leaf + i) * 3, params) for i in range(3)]
    stepwise, stepwise_state = params, optimizer.init(params)
    for gradient in gradients:
        updates, stepwise_state = optimizer.update(gradient, stepwise_state, stepwise)
        stepwise = optax.apply_updates(stepwise, updates)
    total = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
    at_once, state = apply_gradient_sum(
        optimizer, 3, total, init_optimizer(optimizer, params), params
    )
    assert_close(at_once, stepwise, rtol=1e-6)
    assert state.gradient_step == stepwise_state.gradient_step == 1
    assert_close(state.inner_opt_state, stepwise_state.inner_opt_state, rtol=1e-5, atol=1e-9)


def adamw_by_hand(
    params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], config: ConfigDict
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's AdamW (arXiv 1711.05101) after clipping by the global norm."""
    schedule = learning_rate_schedule(config)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, config.grad_clip / norm)
        new = {}
        for name, value in params.items():
            g = gradient[name] * scale
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            mean = first[name] / (1 - config.beta1**t)
            spread = np.sqrt(second[name] / (1 - config.beta2**t)) + 1e-8
            decay = config.weight_decay * value if value.ndim > 1 else 0.0
            new[name] = value - float(schedule(t - 1)) * (mean / spread + decay)
        params = new
    return params


def test_updates_are_clipped_adamw_with_decay_on_matrices_only() -> None:
    config = tiny_config(warmup_iters=2, weight_decay=0.5, grad_clip=1.0, learning_rate=0.1)
    params = {"matrix": np.full((2, 2), 2.0), "vector": np.full(2, -2.0)}
    # The first is longer than the clip, the second shorter.
    gradients = [
        {"matrix": np.array([[3.0, -1.0], [0.5, 2.0]]), "vector": np.array([-4.0, 0.2])},
        {"matrix": np.array([[0.1, 0.2], [-0.3, 0.1]]), "vector": np.array([0.3, -0.1])},
    ]
    optimizer = make_optimizer(config)
    ours = jax.tree.map(jnp.asarray, params)
    state = init_optimizer(optimizer, ours)
    for gradient in gradients:
        summed = jax.tree.map(lambda leaf: 2 * jnp.asarray(leaf), gradient)
        ours, state = apply_gradient_sum(optimizer, 2, summed, state, ours)
    assert_close(ours, adamw_by_hand(params, gradients, config), rtol=1e-5)


def test_muon_turns_kernels_by_the_learning_rate_and_leaves_the_rest_to_adamw() -> None:
    config = tiny_config(
        warmup_iters=0, weight_decay=0.5, grad_clip=100.0, learning_rate=0.1, optimizer="muon"
    )
    rng = np.random.default_rng(0)
    params = {
        "mlp": {"kernel": rng.normal(size=(8, 24))},
        "token_embedding": np.full((2, 2), 2.0),
        "norm": np.full(2, -2.0),
    }
    gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    optimizer = make_optimizer(config)
    ours = jax.tree.map(jnp.asarray, params)
    summed = jax.tree.map(lambda leaf: 2 * jnp.asarray(leaf), gradients)
    ours, _ = apply_gradient_sum(optimizer, 2, summed, init_optimizer(optimizer, ours), ours)
    kernel = params.pop("mlp")["kernel"]
    update = np.asarray(ours.pop("mlp")["kernel"]) - (1 - 0.1 * 0.5) * kernel
    # Five Newton-Schulz steps bring all singular values to between 0.68 and 1.13.
    turned = -update / (0.1 * 0.2 * np.sqrt(24))
    singular = np.linalg.svd(turned, compute_uv=False)
    assert 0.6 < singular.min() < singular.max() < 1.3
    left, _, right = np.linalg.svd(gradients.pop("mlp")["kernel"], full_matrices=False)
    assert np.trace(turned.T @ left @ right) > 0.8 * 8
    assert_close(ours, adamw_by_hand(params, [gradients], config), rtol=1e-5)


def test_muon_is_that_of_optax_whose_runs_go_on_with_it() -> None:
    settings = {"weight_decay": 0.5, "learning_rate": 0.1, "gradient_accumulation_steps": 1}
    config = tiny_config(optimizer="muon", **settings)
    theirs = optax.contrib.muon(
        learning_rate_schedule(config), beta=0.95, weight_decay=0.5, consistent_rms=0.2
    )
    kinds = {"kernel": theirs, "other": optax.set_to_zero()}
    theirs = optax.partition(kinds, lambda params: jax.tree.map(lambda _: "kernel", params))
    theirs = optax.chain(optax.clip_by_global_norm(config.grad_clip), theirs)
    optimizers = [make_optimizer(config), optax.MultiSteps(theirs, every_k_schedule=1)]

    def drawn(seed: int) -> Params:
        shapes = {"wide": (8, 24), "tall": (24, 8)}
        key = jax.random.key(seed)
        return {name: {"kernel": jax.random.normal(key, shape)} for name, shape in shapes.items()}

    def names(state: optax.MultiStepsState) -> set[str]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        return {path for path in paths if "other" not in path}

    params = [drawn(0), drawn(0)]
    states = [init_optimizer(optimizer, params[0]) for optimizer in optimizers]
    assert names(states[0]) == names(states[1])
    for seed in range(1, 4):
        for i, optimizer in enumerate(optimizers):
            params[i], states[i] = apply_gradient_sum(
                optimizer, 1, drawn(seed), states[i], params[i]
            )
    assert_close(params[0], params[1], rtol=1e-3, atol=1e-5)


def test_schedule_warms_up_then_falls_to_a_tenth() -> None:
    config = tiny_config(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr_ratio=0.1)
    schedule = learning_rate_schedule(config)
    assert 0 < schedule(0) < schedule(5) < schedule(9) < 1
    assert schedule(10) == pytest.approx(1)
    assert schedule(60) == pytest.approx(0.55)  # halfway down the cosine
    assert schedule(110) == pytest.approx(0.1)


def test_a_run_shorter_than_its_warmup_still_learns() -> None:
    schedule = learning_rate_schedule(tiny_config(max_iters=4, warmup_iters=500))
    assert 0 < schedule(0) < schedule(3)


def test_two_devices_give_the_loss_and_gradient_of_one() -> None:
    config = tiny_config(batch_size=4, **{"model.dropout": 0.1})
    results = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        mesh = data_mesh(devices)
        state = jax.device_put(new_state(config), NamedSharding(mesh, PartitionSpec()))
        sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
        program = jax.jit(make_train_step(config, "xla"))
        losses = []
        for seed in range(5):
            state, metrics = program(state, jax.device_put(windows(config, seed), sharding))
            losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == len(devices)
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_a_model_learns_a_batch_by_heart() -> None:
    config = tiny_config(max_iters=120, learning_rate=1e-2, warmup_iters=5)
    program = jax.jit(make_train_step(config, "xla"))
    state, batch = new_state(config), jnp.asarray(windows(config))
    first = last = None
    for _ in range(120):
        state, metrics = program(state, batch)
        last = float(metrics["loss"])
        first = first or last
    assert first == pytest.approx(np.log(TINY.vocab_size), rel=0.05)  # knows nothing yet
    assert last is not None
    assert last < 0.1


def test_the_compiled_step_writes_over_the_old_state() -> None:
    config = tiny_config()
    state = new_state(config)
    program = (
        jax.jit(make_train_step(config, "xla"), donate_argnums=0)
        .lower(state, jnp.asarray(windows(config)))
        .compile()
    )
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


@pytest.mark.long
def test_op_by_op_gives_the_loss_of_the_compiled_step(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"max_iters": 1, "eval_interval": 1, "sample_tokens": 1}
    assert workplace.train(**short) == 0
    compiled = capsys.readouterr().out
    other = workplace.root / "op-by-op"
    assert workplace.train("--no-compile", out_dir=other, **short) == 0
    op_by_op = capsys.readouterr().out
    assert "not compiled" in op_by_op

    def losses(out: str) -> list[float]:
        return [float(line.split("loss ")[1].split()[0]) for line in out.splitlines()
                if line.startswith("1/1")]  # fmt: skip

    np.testing.assert_allclose(losses(op_by_op), losses(compiled), atol=2e-4)


def test_the_run_says_what_it_will_do_and_did(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train() == 0
    out = capsys.readouterr().out
    assert "gemma, 26,720 parameters" in out
    assert "6 iterations of 128 are 768 tokens" in out
    assert "attention: xla" in out
    assert "estimated memory" in out
    assert "tokens/s" in out
    assert "3/6  validation: loss" in out
    assert "(lovecraft " in out
    assert f"gothic-chat --checkpoint {workplace.out_dir}/best" in out


def test_beyond_memory_the_cure_is_something_that_the_run_can_change(
    trained: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: jax.Device, n_bytes: int, what: str, cure: str) -> None:
        raise UserError(f"{what} needs {n_bytes} bytes; {cure}")

    monkeypatch.setattr("gothic_jax.training.loop.refuse_beyond_memory", refuse)
    new = trained.root / "new"
    assert trained.train(out_dir=new) == 2
    assert "or lower --config.model.block_size" in capsys.readouterr().err
    # From old weights, the model is given.
    assert trained.train("--init-from", f"{trained.out_dir}/best", out_dir=new) == 2
    assert capsys.readouterr().err.rstrip().endswith("which gives the same result")


def test_the_command_to_paste_is_quoted(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = workplace.root / "my model [v1]"
    assert workplace.train(out_dir=out_dir) == 0
    command = capsys.readouterr().out.split("talk to it: ")[1].splitlines()[0]
    words = shlex.split(command)
    assert words[:3] == ["gothic-chat", "--checkpoint", f"{out_dir}/best"]
    assert chat.main([*words[1:3], "--max-tokens", "2"]) == 0


def test_three_works_shorter_than_a_window_train(workplace: Workplace) -> None:
    works = "".join(f"<|{voice}|>\nThe tide was out.\n<|endoftext|>\n" for voice in
                    ("wilde", "lovecraft", "wilde"))  # fmt: skip
    (workplace.root / "mixed_train.txt").write_text(works)
    assert workplace.train() == 0


def test_patience_stops_a_run_that_no_longer_improves(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate this low changes no parameter: no evaluation is better than the first. (A high
    # one makes the loss jump up and down, in a manner that differs between JAX's releases.)
    code = workplace.train(max_iters=40, eval_interval=2, patience=2, learning_rate=1e-30)
    out = capsys.readouterr().out
    assert code == 0
    assert "stopped at iteration 6: validation has not improved for 2 evaluations" in out


@pytest.mark.gpu
def test_the_default_step_on_a_gpu_uses_cudnn_and_no_scatter() -> None:
    config = get_config()
    config.max_iters = 3
    state = new_state(config)
    compiled = (
        jax.jit(make_train_step(config, "cudnn"), donate_argnums=0)
        .lower(state, jnp.asarray(windows(config)))
        .compile()
    )
    program = compiled.as_text()
    assert "__cudnn$fmha" in program
    assert "scatter(" not in program
    for seed in range(3):
        state, metrics = compiled(state, jnp.asarray(windows(config, seed)))
        assert np.isfinite(float(metrics["loss"]))


def test_a_gpus_program_has_no_scatter_no_callback_and_one_adamw() -> None:
    config = tiny_config(compute_dtype="bfloat16", gradient_accumulation_steps=3)
    state = new_state(config)
    traced = jax.jit(make_train_step(config, "xla"), donate_argnums=0).trace(
        state, jnp.asarray(windows(config))
    )
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.scatter" not in program
    assert "callback" not in program
    donated = program.count("jax.buffer_donor") + program.count("tf.aliasing_output")
    assert donated == len(jax.tree.leaves(state)) - 1  # mini_step is set, never read
    # AdamW takes one root for each array of parameters; a norm is one root more.
    (micro_steps,) = (
        equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"
    )
    assert " sqrt " not in str(micro_steps.params["jaxpr"])
    roots = str(traced.jaxpr).count(" sqrt ")
    assert roots == len(jax.tree.leaves(state.params)) + 2  # to clip, and to report


@pytest.mark.parametrize(
    ("architecture", "block_size"), [("gemma", 16), ("gpt2", 15), ("gemma", 131), ("gpt2", 130)]
)
@pytest.mark.long
def test_a_bf16_step_is_close_to_the_f32_one_for_even_and_odd_shapes(
    architecture: str, block_size: int
) -> None:
    model = {"model.architecture": architecture, "model.block_size": block_size}
    figures = []
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(gradient_accumulation_steps=1, compute_dtype=dtype, **model)
        step = jax.jit(make_train_step(config, "xla-blocks"))
        _, metrics = step(new_state(config), jnp.asarray(windows(config)))
        figures.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    np.testing.assert_allclose(figures[1], figures[0], rtol=0.02)
