"""What layers compute, by the fastest exact way that this machine has.

Each module holds one operation: the plain way in PyTorch, and beside it what a CPU runs during
inference. Results differ by rounding alone.
"""
