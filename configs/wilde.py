r"""Wilde alone.

    gothic-tokenize --files data/processed/wilde_train.txt \
        --output data/tokenizer_wilde.json
    gothic-train --config=configs/wilde.py
"""

from ml_collections import ConfigDict

from gothic_jax.config import get_config as get_base_config


def get_config() -> ConfigDict:
    """The default model, trained on one voice."""
    config = get_base_config()
    config.train_file = "wilde_train.txt"
    config.val_file = "wilde_val.txt"
    config.tokenizer = "data/tokenizer_wilde.json"
    config.out_dir = "checkpoints_wilde"
    return config
