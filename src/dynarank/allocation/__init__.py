"""Allocation: how ranks are found, by a rule or within a budget."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
