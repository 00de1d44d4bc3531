"""Runs arms of experiments, keeps their records, and writes the tables and pictures of them."""
