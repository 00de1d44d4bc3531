"""Who drives: the rank scheduler, which asks a schedule once a step and applies the answer."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
