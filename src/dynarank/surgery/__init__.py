"""How does a model change? The verbs, and the one transaction behind them."""
