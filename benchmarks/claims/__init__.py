"""What each page claims, derived from the records: one module a page, checked by `verify`.

`README.md` has `readme.py`, `docs/scale.md` `scale.py`, `docs/methods/decay.md`
`methods_decay.py`. A module has

- `PAGE`: the page's path from the root;
- `claims()`: yields pieces of the page's text with the figures filled in from the records or, where
  they follow by formula, by the library. Figures are never typed in here;
- `SETTINGS`: pieces of the page's text whose figures nobody measured here: settings, definitions,
  bounds that a test holds, figures of a cited paper;
- `NO_RESULTS`, on a page of `words.IN_WORDS`: pieces with a number or a comparison in words that
  tell no result: definitions, instructions, links.

A sentence in words is claimed as `says(sentence, *facts)`, with the facts that prove it; a word
that the records can give, such as the number of cuts, is filled in as figures are.

Pieces are short, a table row or a part of a sentence; line breaks do not matter. A page without
figures needs no module, one with settings alone no `claims()`.
"""
