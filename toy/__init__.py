"""The exact-answer playground: mixtures, a tiny DiT, metrics and pictures for w2svd.py."""

from toy.tasks import preset, task

__all__ = ["preset", "task"]
