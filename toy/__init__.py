"""The exact-answer playground: mixtures, a tiny DiT, metrics and pictures for w2svd.py."""

__all__ = ["preset", "task"]


def __getattr__(name):
    """`toy.preset` and `toy.task`, loaded when asked for: `python -m toy.plots` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'toy' has no attribute {name!r}")
    from toy import tasks

    return getattr(tasks, name)
