r"""Lovecraft alone.

    gothic-tokenize --files data/processed/lovecraft_train.txt \
        --output data/tokenizer_lovecraft.json
    gothic-train --config=configs/lovecraft.py
"""

from ml_collections import ConfigDict

from gothic_jax.config import get_config as get_base_config


def get_config() -> ConfigDict:
    """The default model, trained on one voice."""
    config = get_base_config()
    config.train_file = "lovecraft_train.txt"
    config.val_file = "lovecraft_val.txt"
    config.tokenizer = "data/tokenizer_lovecraft.json"
    config.out_dir = "checkpoints_lovecraft"
    return config
