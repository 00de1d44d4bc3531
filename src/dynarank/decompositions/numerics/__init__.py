"""The linear and multilinear algebra under the decompositions."""
