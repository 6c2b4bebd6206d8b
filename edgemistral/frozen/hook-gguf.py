"""PyInstaller's hook for gguf: only its reader is used; its other modules would add transformers and torch."""

excludedimports = ["transformers", "mistral_common", "torch", "huggingface_hub"]
