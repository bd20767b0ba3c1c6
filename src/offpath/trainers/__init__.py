"""Topologies in the trainers that people use; each of the libraries is imported by its own module alone.

`offpath.trainers.lightning` needs the extra `offpath[lightning]`, `offpath.trainers.transformers` the extra
`offpath[transformers]`.
"""
