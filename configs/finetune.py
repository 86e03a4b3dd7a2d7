"""Fine-tuning of the model that comes with the repository, here on the bundled sample corpus.

gothic-train --config=configs/finetune.py --init-from checkpoints/gothic-dandy
"""

from ml_collections import ConfigDict

from gothic_jax.config import get_config as get_base_config


def get_config() -> ConfigDict:
    """15 iterations of 4,096 tokens; the model is the old one."""
    config = get_base_config()
    config.data_dir = "data/sample"
    config.out_dir = "checkpoints/finetuned"
    config.max_iters = 15
    config.batch_size = 16
    config.gradient_accumulation_steps = 1
    config.optimizer = "muon"
    config.learning_rate = 1e-3
    config.min_lr_ratio = 0.0
    config.warmup_iters = 3
    config.eval_interval = 5
    config.log_interval = 5
    config.compute_dtype = "float32"  # few laptops have bfloat16 units
    config.model.dropout = 0.1
    return config
