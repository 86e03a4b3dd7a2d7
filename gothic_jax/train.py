"""`python -m gothic_jax.train`: the same as gothic-train."""

import sys

from gothic_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
