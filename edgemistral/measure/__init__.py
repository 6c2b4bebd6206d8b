"""Accuracy and speed: the float reference, perplexity and KL divergence, tokens per second."""
