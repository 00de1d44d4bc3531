"""Which schedule for this model and run: fitted to a budget, or found by a probe."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
