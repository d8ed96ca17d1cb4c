"""Owns the Inference service: what clients call. Wire messages end here.

Puts the parts in their order: the model, the prompt's tokens, the checks, then the request's life.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
from twinpool.v1 import inference_pb2, inference_pb2_grpc

from router.access_log import AccessLog
from router.account import Account
from router.callers import Callers, caps_of, owned_by, standing
from router.group import ModelGroup
from router.groups import Groups
from router.inflight import Job
from router.membership import Model
from router.metrics.requests import Outcomes
from router.outbox import Outbox
from router.proof import Proofs
from router.request import (
    MessagesPrompt,
    Prompt,
    Resumed,
    TextPrompt,
    TokensPrompt,
    ValidRequest,
)
from router.validate import (
    Caps,
    ModelLimits,
    check,
    check_prompt,
    check_resume,
    with_terms,
)
from router.wire import input_from_wire, prompt_from_wire, response_to_wire, terms_to_wire
from service.errors import (
    InvalidRequest,
    NotFound,
    Refused,
    ServiceError,
    Unavailable,
)
from service.security.access import current_caller
from service.trace import begin_trace
from text import PromptError, Tokenizer

ROLES = frozenset({"system", "user", "assistant", "tool"})
# Shorter prompts take less time than a thread's wake-up saves.
_INLINE_CHARS = 2048
_TOKENIZER_THREADS = 2
_ASSETS_TIMEOUT_S = 10.0


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves `twinpool.v1.Inference`."""

    def __init__(
        self,
        *,
        version: str,
        groups: Groups,
        unplaced: Outcomes,
        caps: Caps,
        default_timeout_s: float,
        clock: Callable[[], float],
        access_log: AccessLog | None = None,
        proofs: Proofs | None = None,
    ) -> None:
        self._version = version
        self._groups = groups
        self._unplaced = unplaced
        self._caps = caps
        self._default_timeout_s = default_timeout_s
        self._clock = clock
        self._access_log = access_log
        self._proofs = proofs or Proofs(None)
        self._callers = Callers()
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._is_draining = False
        self.open_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Refuses what is new and returns once every open request has ended."""
        self._is_draining = True
        await self._idle.wait()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # A plain coroutine that writes, not a generator: one that is cancelled while it is suspended
    # at a yield would be closed when the garbage collector finds it.
    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Generates an answer."""
        begin_trace()
        account = self._account("Generate")
        self.open_requests += 1
        self._idle.clear()
        try:
            group = self._group(request.model)
            account.enter(group.name, group.metrics.requests)
            with self._callers.admitted(current_caller()):
                await self._generate(group, request, context, account)
            account.outcome = "finished"
        except ServiceError as exc:
            account.outcome, account.reason = _outcome_of(exc), exc.reason
            raise
        except (asyncio.CancelledError, grpc.aio.UsageError):
            account.outcome = "aborted"
            raise
        finally:
            account.end()
            self.open_requests -= 1
            if self.open_requests == 0:
                self._idle.set()

    async def _generate(
        self,
        group: ModelGroup,
        request: inference_pb2.GenerateRequest,
        context: Any,
        account: Account,
    ) -> None:
        deadline = account.began_at + self._allowed_s(context)
        if not request.HasField("resume"):
            self._check_queue(request, group)
        model, tokenizer = await _served(group)
        checked, resumed = await self._check(request, group, model, tokenizer)
        job = Job(
            request_id=group.inflight.new_request_id(),
            request=group.inflight.with_seed(checked),
            model=model,
            tokenizer=tokenizer,
            deadline=deadline,
            resumed=resumed,
        )
        account.admit(job)
        outbox = Outbox()
        life = asyncio.create_task(group.inflight.serve(job, account.stats, outbox.put))
        life.add_done_callback(lambda _: outbox.close())
        try:
            await self._relay(job, account, outbox, context)
            await life
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)

    def _check_queue(self, request: inference_pb2.GenerateRequest, group: ModelGroup) -> None:
        """Refuses whom the queue has no place for while its prompt has not cost anything."""
        tenant, priority = standing(current_caller(), request.tenant, request.priority)
        new_tokens = request.stop.max_new_tokens or self._caps.default_max_new_tokens
        needed = len(request.prompt.token_ids.ids) + new_tokens
        group.admission.check_queue(tenant, priority, needed)

    async def _relay(self, job: Job, account: Account, outbox: Outbox, context: Any) -> None:
        """Writes the answer's parts as they come, until there are no more."""
        shown_id, prompt_tokens = job.shown_id, len(job.request.prompt_token_ids)
        is_first = True
        while (part := await outbox.next()) is not None:
            account.give(part)
            message = response_to_wire(shown_id, part, prompt_tokens, account.stats)
            if is_first:
                message.terms.CopyFrom(self._terms(job))
                is_first = False
            await context.write(message)

    def _terms(self, job: Job) -> inference_pb2.Terms:
        fingerprint = job.model.fingerprint
        proof = self._proofs.give(job.shown_id, job.request, fingerprint)
        return terms_to_wire(job.request, fingerprint, proof)

    def _account(self, method: str) -> Account:
        return Account(method, unplaced=self._unplaced, log=self._access_log, clock=self._clock)

    @contextmanager
    def _asked(self, method: str) -> Iterator[None]:
        """Writes the access log's line of a question."""
        begin_trace()
        account = self._account(method)
        try:
            yield
            account.outcome = "finished"
        except ServiceError as exc:
            account.outcome, account.reason = _outcome_of(exc), exc.reason
            raise
        except asyncio.CancelledError:
            account.outcome = "aborted"
            raise
        finally:
            account.write(self._clock())

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Any
    ) -> inference_pb2.DescribeResponse:
        """Says what a request to a model may ask for."""
        with self._asked("Describe"):
            group = self._group(request.model)
            model, tokenizer = await _served(group)
            return inference_pb2.DescribeResponse(
                model=model.name,
                architecture=model.architecture,
                max_model_len=group.pools.members.max_model_len,
                vocab_size=model.vocab_size,
                has_chat_template=tokenizer.has_chat_template,
                max_request_tokens=group.ledger.largest_request_tokens(),
                version=self._version,
            )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """Says which models are served."""
        with self._asked("ListModels"):
            self._check_serves()
            models = [_listed(group) for group in self._groups.all()]
            return inference_pb2.ListModelsResponse(models=models)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensResponse:
        """Counts the tokens a prompt has after template and tokenizer."""
        with self._asked("CountTokens"):
            group = self._group(request.model)
            model, tokenizer = await _served(group)
            limits = _limits(group, model, tokenizer)
            prompt = check_prompt(prompt_from_wire(request.prompt), limits, self._caps)
            tokens = await self._tokenize(prompt, tokenizer)
            return inference_pb2.CountTokensResponse(tokens=len(tokens))

    # ---- shared by the calls

    def _group(self, model: str) -> ModelGroup:
        """Returns where a model is served. Raises as `Groups.for_request`."""
        self._check_serves()
        return self._groups.for_request(model)

    def _check_serves(self) -> None:
        if self._is_draining:
            raise Unavailable("this router is stopping: use another one", reason="ROUTER_STOPS")

    async def _tokenize(self, prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Raises InvalidRequest for a prompt that template or tokenizer refuse."""
        match prompt:
            case TokensPrompt(token_ids):
                return token_ids
            case TextPrompt(text):
                field, chars = "prompt.text", len(text)

                def encode() -> list[int]:
                    return tokenizer.encode(text)

            case MessagesPrompt(messages):
                field, chars = "prompt.messages", sum(len(c) for _, c in messages)

                def encode() -> list[int]:
                    return tokenizer.encode_messages(messages)

        try:
            if chars <= _INLINE_CHARS:
                return tuple(encode())
            loop = asyncio.get_running_loop()
            return tuple(await loop.run_in_executor(self._threads, encode))
        except PromptError as exc:
            raise InvalidRequest(field, "a prompt that cannot be used", str(exc)) from exc

    async def _check(
        self,
        request: inference_pb2.GenerateRequest,
        group: ModelGroup,
        model: Model,
        tokenizer: Tokenizer,
    ) -> tuple[ValidRequest, Resumed | None]:
        """Checks a request and tokenizes it. Raises InvalidRequest, or Refused if it never fits."""
        given = input_from_wire(request)
        if given.resume is not None:
            given = with_terms(given, given.resume)
        caller = current_caller()
        limits = _limits(group, model, tokenizer)
        prompt = check_prompt(given.prompt, limits, self._caps)
        token_ids = await self._tokenize(prompt, tokenizer)
        caps = caps_of(caller, self._caps)
        checked = owned_by(caller, check(given, token_ids, limits, caps))
        if given.resume is None:
            return checked, None
        resume, fingerprint = given.resume, model.fingerprint
        resumed = check_resume(resume, checked, limits, fingerprint)
        goes_ahead = self._proofs.holds(
            resume.proof, resumed.request_id, checked, fingerprint, guarded=caller is not None
        )
        return checked, replace(resumed, goes_ahead=goes_ahead)

    def _allowed_s(self, context: Any) -> float:
        remaining_s: float | None = context.time_remaining()
        return self._default_timeout_s if remaining_s is None else remaining_s


async def _served(group: ModelGroup) -> tuple[Model, Tokenizer]:
    """Returns a model and its tokenizer; waits a moment for files that are on their way."""
    model, tokenizers = group.model, group.pools.tokenizers
    tokenizer = tokenizers.get(model.assets_digest)
    if tokenizer is None:
        try:
            async with asyncio.timeout(_ASSETS_TIMEOUT_S):
                tokenizer = await tokenizers.wait(model.assets_digest)
        except TimeoutError as exc:
            raise Unavailable(
                "no instance has sent the model's tokenizer yet",
                reason="NO_TOKENIZER",
                retry_after_s=1.0,
            ) from exc
    return model, tokenizer


def _limits(group: ModelGroup, model: Model, tokenizer: Tokenizer) -> ModelLimits:
    return ModelLimits(
        vocab_size=model.vocab_size,
        max_model_len=group.pools.members.max_model_len,
        known_roles=ROLES if tokenizer.has_chat_template else None,
        largest_prompt=group.ledger.largest_prompt_tokens() or None,
        largest_request=group.ledger.largest_request_tokens() or None,
    )


def _listed(group: ModelGroup) -> inference_pb2.ServedModel:
    return inference_pb2.ServedModel(
        name=group.name,
        architecture=group.model.architecture,
        max_model_len=group.pools.members.max_model_len,
        max_request_tokens=group.ledger.largest_request_tokens(),
        ready=group.is_whole,
    )


def _outcome_of(error: ServiceError) -> str:
    if isinstance(error, Refused):
        return "refused"
    if isinstance(error, InvalidRequest | NotFound):
        return "invalid"
    return "failed"
