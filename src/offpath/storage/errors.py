"""What is raised when a model cannot be stored, or a file cannot be loaded."""


class StorageError(ValueError):
    """A model that cannot be stored, or a file that is broken, foreign, or belongs to another model."""
