"""Measures of how good embeddings are: metrics in pure numpy, the paper's two tasks, controls, and the report."""
