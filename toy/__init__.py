"""The exact-answer playground: mixtures, a tiny DiT, metrics and pictures for w2svd.py."""

from toy.tasks import task

__all__ = ["task"]
