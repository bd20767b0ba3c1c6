"""The products on NVIDIA GPUs. Nothing here is imported before a tensor on such a device asks for it."""
