r"""A tiny model of the bundled sample corpus, to try everything on a laptop's CPU.

    gothic-tokenize --files data/sample/mixed_train.txt --vocab-size 1024 \
        --output data/tokenizer_sample.json
    gothic-train --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from gothic_jax.config import get_config as get_base_config


def get_config() -> ConfigDict:
    """1.2M parameters; the sample corpus is far too small for good prose."""
    config = get_base_config()
    config.data_dir = "data/sample"
    config.tokenizer = "data/tokenizer_sample.json"
    config.out_dir = "checkpoints/quickstart"
    config.max_iters = 300
    config.batch_size = 16
    config.gradient_accumulation_steps = 1
    config.learning_rate = 2e-3
    config.warmup_iters = 30
    config.weight_decay = 0.5
    config.eval_interval = 50
    config.log_interval = 25
    config.compute_dtype = "float32"  # few laptops have bfloat16 units
    config.model.block_size = 128
    config.model.vocab_size = 1024
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.n_embd = 128
    config.model.dropout = 0.2
    return config
