"""A model of both voices that a laptop's CPU trains on the real corpus in less than an hour.

gothic-train --config=configs/laptop.py
"""

from ml_collections import ConfigDict

from gothic_jax.config import get_config as get_base_config


def get_config() -> ConfigDict:
    """4.3M parameters; 1,200 iterations of 8,192 tokens: about 6 passes over the texts."""
    config = get_base_config()
    config.out_dir = "checkpoints/laptop"
    config.max_iters = 1200
    config.batch_size = 16
    config.gradient_accumulation_steps = 2
    config.learning_rate = 2e-3
    config.warmup_iters = 60
    config.beta2 = 0.98
    config.eval_interval = 200
    config.compute_dtype = "float32"  # few laptops have bfloat16 units
    config.model.block_size = 256
    config.model.n_layer = 6
    config.model.n_head = 3
    config.model.n_embd = 192
    # Six passes are too few to memorise the texts;
    # in a run of twelve passes, the validation loss rises from the sixth on.
    config.model.dropout = 0.0
    return config
