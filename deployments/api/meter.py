"""What one API request leaves in the metrics. Times are taken here, in the gateway: as near to the client as we are."""

from collections.abc import Callable

from engine.sequence import Request
from monitoring.recorder import Recorder


class RequestMeter:
    """Counts one API request, all its prompts and samples together, from arrival to end."""

    def __init__(self, recorder: Recorder, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back. The request arrives now."""
        self._recorder = recorder
        self._clock = clock
        self._arrival = clock()
        self._first: dict[int, float] = {}
        """Time of the first token, by choice."""
        self._last: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._unfinished: set[int] = set()
        self._is_resumed = False

    def submitted(self, requests: tuple[Request, ...]) -> None:
        """The requests are valid and on their way to the backend."""
        params = requests[0].params
        self._unfinished = set(range(len(requests) * params.n))
        self._recorder.observe("manta:request_params_n", params.n)
        if params.max_tokens is not None:
            self._recorder.observe("manta:request_params_max_tokens", params.max_tokens)
        for request in requests:
            self._recorder.observe("manta:request_prompt_tokens", len(request.prompt_token_ids))

    def resumed(self, requests: tuple[Request, ...]) -> None:
        """The requests go on from what came at another gateway, which has observed what was to be observed then."""
        self._unfinished = set(range(len(requests) * requests[0].params.n))
        self._is_resumed = True

    def replayed(self, choice: int, count: int) -> None:
        """A choice had brought `count` more tokens there."""
        self._first[choice] = self._last[choice] = self._clock()
        self._num_tokens[choice] = self._num_tokens.get(choice, 0) + count

    def ended_elsewhere(self, choice: int) -> None:
        """A choice had ended there."""
        self._unfinished.discard(choice)

    def tokens(self, choice: int, count: int) -> None:
        """A choice brought `count` tokens. Tokens that came together share the time since the previous ones."""
        now = self._clock()
        last = self._last.get(choice)
        if last is not None:
            self._recorder.observe("manta:inter_token_latency_seconds", (now - last) / count, times=count)
        else:
            if not self._first and not self._is_resumed:
                self._recorder.observe("manta:time_to_first_token_seconds", now - self._arrival)
            self._first[choice] = now
        self._last[choice] = now
        self._num_tokens[choice] = self._num_tokens.get(choice, 0) + count

    def finished(self, choice: int, reason: str) -> None:
        """A choice ended."""
        self._unfinished.discard(choice)
        self._recorder.increment("manta:request_success_total", labels=(reason,))
        count = self._num_tokens.get(choice, 0)
        self._recorder.observe("manta:request_generation_tokens", count)
        if count > 1 and not self._is_resumed:
            mean = (self._last[choice] - self._first[choice]) / (count - 1)
            self._recorder.observe("manta:request_time_per_output_token_seconds", mean)

    def close(self, *, failed: bool) -> None:
        """The request is over; choices that did not finish were aborted, or failed with it."""
        for choice in tuple(self._unfinished):
            self.finished(choice, "error" if failed else "abort")
        if not self._is_resumed:
            self._recorder.observe("manta:e2e_request_latency_seconds", self._clock() - self._arrival)
