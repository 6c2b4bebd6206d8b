"""Bytes on disk: strict JSON, safetensors, the order of the bytes, the blob."""
