"""Sources of weights: folders in Hugging Face or Mistral layout, and GGUF files, all as the same tensors."""
