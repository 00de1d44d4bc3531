"""How does a model change? The verbs, and the one transaction behind them."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
