"""Recurrent layers: modules and cells, the loop over time, how each matrix is used."""
