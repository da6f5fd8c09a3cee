"""Multi-query associative recall, as in the paper's figure 8."""
