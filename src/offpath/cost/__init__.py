"""What computing costs: bytes, time, the sparsity from which on it pays, and the machine that it was measured on."""

from offpath.cost.allocator import keep_freed_memory as keep_freed_memory
from offpath.cost.bytes import (
    TrainingBytes as TrainingBytes,
    memory_bytes as memory_bytes,
    model_bytes as model_bytes,
    training_bytes as training_bytes,
)
from offpath.cost.crossover import BreakEven as BreakEven, break_even as break_even
from offpath.cost.machine import (
    Machine as Machine,
    Part as Part,
    gpu_parts as gpu_parts,
    this_machine as this_machine,
)
from offpath.cost.timing import Timing as Timing, interleaved as interleaved
