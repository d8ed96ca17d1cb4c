"""Owns the proof that an answer was begun by a router of this cluster: its client hands it on.

Without one, whoever wants to be served first could say that its answer had begun elsewhere.
"""

from router.request import ValidRequest
from service.security.tokens import WorkerToken


class Proofs:
    """Signs with the workers' token, which a cluster's routers share; without it proves nothing."""

    def __init__(self, key: WorkerToken | None) -> None:
        self._key = key

    def give(self, request_id: str, request: ValidRequest, fingerprint: str) -> bytes:
        """Returns the proof for one request's answer; empty where there is no key."""
        if self._key is None:
            return b""
        return self._key.sign(_content(request_id, request, fingerprint))

    def holds(
        self,
        proof: bytes,
        request_id: str,
        request: ValidRequest,
        fingerprint: str,
        *,
        guarded: bool,
    ) -> bool:
        """Whether an answer is to be taken for one that has begun.

        Without a key its client is believed, unless it is `guarded`: others show tokens as well.
        """
        if self._key is None:
            return not guarded
        return self._key.has_signed(_content(request_id, request, fingerprint), proof)


def _content(request_id: str, request: ValidRequest, fingerprint: str) -> bytes:
    """Returns what tells one answer from any other, whoever asked for it."""
    settled = f"{request.sampling.seed}\0{request.stop.max_new_tokens}\0{fingerprint}"
    whose = f"{request_id}\0{settled}\0{request.tenant}\0"
    return b"resume\0" + whose.encode() + request.prompt_digest()
