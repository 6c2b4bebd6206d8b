"""How exact and how fast: the float reference, perplexity and KL divergence, speed."""
