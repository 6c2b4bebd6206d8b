"""The offline quantizer: a Mistral checkpoint on disk becomes one 4-bit or 8-bit blob."""

from edgemistral_quantize.convert import quantize

__all__ = ["quantize"]
