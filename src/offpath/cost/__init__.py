"""What computing costs: bytes, and the machine that a measurement was made on."""

from offpath.cost.bytes import TrainingBytes as TrainingBytes, training_bytes as training_bytes
from offpath.cost.machine import Machine as Machine, this_machine as this_machine
