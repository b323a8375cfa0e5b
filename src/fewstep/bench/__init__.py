"""How quick is it? The same work on fewstep and on its peers, in turns, and beside the machine.

work               what is done: model, task, part, size, steps, batch, dtype
checkpoints        models of full size with random weights, in diffusers' layout
sides, exported    who does it: fewstep, diffusers, OpenVINO, ONNX Runtime
child, process     a process for each side, and its other end
turns              A B A B: only one works at a time
limits             how many operations it takes, and how many this machine can do in a second
report, plot       medians, ranges, ratios, the fraction of the limit; JSON, tables, bars

Nothing here imports torch or a peer before a process of its own needs it.
"""

from __future__ import annotations
