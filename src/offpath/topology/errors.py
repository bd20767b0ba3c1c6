"""What goes wrong when a topology is changed."""


class TopologyError(ValueError):
    """A change of topology that cannot be made; model, optimizer and topology are as they were."""
