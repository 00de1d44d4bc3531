"""Tables and pictures of the records."""
