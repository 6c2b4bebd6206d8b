"""Every error that a user can meet, as one tree.

    EdgeMistralError
    ├── BadInput                 what was given cannot be used: exit code 2
    │   ├── BadConfig            a config.json, params.json or blob config that no kernel here can run
    │   ├── BadCheckpoint        a source checkpoint: missing, extra, truncated or misshapen tensors, NaN
    │   ├── BadBlob              a model file that is not ours, truncated, or does not fit its own config
    │   ├── BadSession           a session file that is foreign, newer, damaged in its header, or in use
    │   ├── BadRequest           a parameter or a message of a request (`field` names it)
    │   └── ContextOverflow      more tokens than the context holds (`over` says by how many)
    ├── DamagedBlob              a checksum does not match: exit code 1
    ├── FileLost                 a file that is in use was cut, or its disk has gone: exit code 1
    ├── OutOfMemoryBudget        the plan needs more than --max-ram allows
    └── Cancelled                the caller asked to stop

Messages are one line and name the file, the tensor or the field that is wrong.
"""

from __future__ import annotations


class EdgeMistralError(Exception):
    """Base of all errors raised on purpose by this package."""


class BadInput(EdgeMistralError, ValueError):
    """What was given cannot be used."""


class BadConfig(BadInput):
    """A model configuration that is incomplete, inconsistent or of another architecture."""


class BadCheckpoint(BadInput):
    """A source checkpoint that cannot be read as the model that its config describes."""


class BadBlob(BadInput):
    """A model file that is not an edgemistral blob, is truncated, or contradicts its own config."""


class BadSession(BadInput):
    """A session file that is not one, belongs to another model or a newer edgemistral, or is in use."""


class BadRequest(BadInput):
    """A request's parameter or message is wrong; `field` is its name."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ContextOverflow(BadInput):
    """`n_tokens` do not fit into a context of `context` tokens; nothing was computed or lost."""

    def __init__(self, n_tokens: int, context: int) -> None:
        self.n_tokens, self.context, self.over = n_tokens, context, n_tokens - context
        super().__init__(f"{n_tokens} tokens are {self.over} more than the context of {context} holds")


class DamagedBlob(EdgeMistralError):
    """The bytes of a tensor do not match their checksum; `tensor` is its name."""

    def __init__(self, message: str, tensor: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class FileLost(EdgeMistralError):
    """A mapped file was cut, or its disk has gone, while it was in use: nothing that needs it can be computed any more."""


class OutOfMemoryBudget(EdgeMistralError):
    """The planned memory is larger than the given budget (both in bytes)."""

    def __init__(self, needed: int, budget: int) -> None:
        self.needed, self.budget = needed, budget
        super().__init__(f"needs {needed} bytes, {needed - budget} more than the budget of {budget}")


class Cancelled(EdgeMistralError):
    """The caller's cancel function asked to stop; what was computed so far stays valid."""
