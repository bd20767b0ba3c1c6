"""Models on disk: one safetensors file that holds only the connections that exist."""

from offpath.storage.errors import StorageError as StorageError
from offpath.storage.loading import load as load
from offpath.storage.saving import save as save
