"""Token ids in, token ids out: the engine, the sampler, grammars. Nothing here knows text."""
