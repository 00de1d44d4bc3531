"""How does a model change: the verbs, and the one transaction behind them."""
