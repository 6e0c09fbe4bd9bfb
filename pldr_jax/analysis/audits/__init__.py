"""Audits of the metric learner, of G_LM as an operator, and of decoding (arXiv 2609.34130)."""
