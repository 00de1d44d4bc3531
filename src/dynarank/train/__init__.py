"""Recipes, tasks and the training loop behind `dynarank train`."""
