"""Linear and multilinear algebra for the decompositions."""
