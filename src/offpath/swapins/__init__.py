"""Products on sparse rows inside other people's packages; each of the packages is imported by its own module alone.

`offpath.swapins.sparsify` is for EleutherAI's `eai-sparsify` (extra `offpath[sparsify]`), `offpath.swapins.sae_lens`
for SAELens (extra `offpath[sae-lens]`).
"""
