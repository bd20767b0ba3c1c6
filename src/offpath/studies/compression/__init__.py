"""Pretrained transformers, pruned and made sparse: a checkpoint, its benchmark, and the study of MiniLM."""
