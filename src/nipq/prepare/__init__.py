"""Getting hold of a model: trace it, check it, attach quantizers to its layers, and read their table."""
