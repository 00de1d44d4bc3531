"""The figures of the documents, derived from the records again: a module for each page."""
