"""What an embedding is worth: metrics in pure numpy, the paper's two tasks, controls, and the report."""
