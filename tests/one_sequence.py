"""A transformer with one sequence, for tests that need no more."""

from __future__ import annotations

import numpy as np

from edgemistral.runtime.segments import Row, Sequence
from edgemistral.runtime.transformer import Transformer


class OneSequence:
    """`forward` appends ids and returns the logits of the last of them; `truncate` forgets."""

    def __init__(self, *arguments, **options):
        self.transformer = Transformer(*arguments, **options)
        self.sequence = Sequence(self.transformer.pool)

    def __getattr__(self, name):
        return getattr(self.transformer, name)

    @property
    def length(self):
        return self.sequence.length

    def forward(self, ids, n_logits):
        return self.transformer.step([Row(self.sequence, ids, n_logits)]).copy()

    def truncate(self, length):
        self.sequence.cut(length)

    def forward_all(self, ids):
        """Logits at every position of `ids`, in steps of `chunk`."""
        parts = [ids[at : at + self.chunk] for at in range(0, len(ids), self.chunk)]
        return np.concatenate([self.forward(part, len(part)) for part in parts])
