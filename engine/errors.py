"""The names of what can go wrong inside one replica. Knows no HTTP status: `deployments.api.errors` maps these."""


class InvalidRequest(ValueError):
    """A request that can never be served as it was sent.

    `param` is the field to change, `code` a short machine-readable reason or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling of exceptions, and these cross processes.
        return (_rebuild_invalid_request, (type(self), self.message, self.param, self.code))


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt and `max_tokens` together, is longer than the model can attend to."""


class ModelError(Exception):
    """A model that cannot be loaded: says which file, what is wrong with it and what would be right, in one line."""


class PoolExhausted(Exception):
    """The page pool has fewer free pages than were asked for; nothing was allocated."""


class RanksLost(Exception):
    """A rank that others share a model with is gone, or too slow to be waited for: nothing can be computed any more."""


def _rebuild_invalid_request(
    kind: type[InvalidRequest], message: str, param: str | None, code: str | None
) -> InvalidRequest:
    return kind(message, param=param, code=code)
