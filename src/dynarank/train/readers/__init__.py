"""Readers of a user's own data: ``imagefolder:``, ``csv:``, ``npz:`` and ``hf:``.

Each has a function ``read(place, folder, **data_options)`` that returns training and test part, as
a data function does, see :mod:`dynarank.train.own_parts`.
"""
