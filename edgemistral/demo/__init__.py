"""The model that runs when none is named: made on the first use, kept in the cache folder."""

from edgemistral.demo.make import demo_model

__all__ = ["demo_model"]
