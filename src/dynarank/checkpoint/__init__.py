"""What survives a run: saving and loading, checkpoints for each step, and their verification."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
