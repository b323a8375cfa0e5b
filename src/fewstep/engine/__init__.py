"""How work is run: recorded as CUDA graphs (graphs.py), compiled block by block (compiling.py),
in fewer bits (quantize.py). Only the last changes a picture beyond rounding.

What a pipeline hands in are functions of tensors, and networks.
"""
