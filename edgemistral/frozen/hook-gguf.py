"""PyInstaller's hook for gguf: only its reader is used, and its other modules would bring transformers and torch with them."""

excludedimports = ["transformers", "mistral_common", "torch", "huggingface_hub"]
