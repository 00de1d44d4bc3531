"""Recurrent layers in the three forms: modules, cells, and the loop over time."""
