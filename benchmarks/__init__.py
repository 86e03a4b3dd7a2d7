"""Speed of gothic_jax beside other programs, measured on the machine at hand."""
