"""Every network of the zoo through `demp_fx.compile`, beside Torch-Pruning: `python -m
benchmarks.zoo`."""
