"""Renders messages with a model's chat template, in a sandbox and within limits.

Owns the Jinja environment that Hugging Face's chat templates expect. Knows nothing of tokens.
A template comes with the model, so it is code that somebody else wrote: it reaches no Python
internals, changes no object, and its loops and its output have limits. What it may still
do is spend memory on strings that it never prints.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from text.errors import AssetError, MessagesRefused, PromptTooLong, TemplateFailed

MAX_RENDERED_CHARS = 16 * 2**20
# Numbers that all range() calls of one rendering may give out together: loops over range()
# can nest, and each alone would stay below the sandbox's own limit.
MAX_RANGE_TOTAL = 1_000_000
# Length of a repeated sequence, and bits of a power.
_MAX_PRODUCT = 1_000_000


class _Refusal(jinja2.TemplateError):
    """What the template's raise_exception() raises."""


class ChatTemplate:
    """One model's chat template, compiled; rendering is thread-safe.

    `variables` are the names the template sees besides the messages, such as bos_token.
    Raises AssetError where `source` (read from `file`) is not a valid template.
    """

    def __init__(
        self,
        source: str,
        *,
        file: str,
        variables: Mapping[str, str],
        max_chars: int = MAX_RENDERED_CHARS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._variables = dict(variables)
        self._max_chars = max_chars
        try:
            self._template = _environment(now).from_string(source)
        except (jinja2.TemplateError, ArithmeticError, RecursionError) as exc:
            raise AssetError(
                file, f"the chat template is not valid ({exc})", "correct or remove the template"
            ) from exc

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the prompt for (role, content) messages, ending where the answer begins.

        Raises MessagesRefused, TemplateFailed or PromptTooLong.
        """
        parts: list[str] = []
        left = self._max_chars
        try:
            for part in self._template.generate(
                self._variables,
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                range=_RangeBudget(MAX_RANGE_TOTAL).range,
            ):
                left -= len(part)
                if left < 0:
                    raise PromptTooLong(
                        f"the chat template's output has more than {self._max_chars} characters; "
                        "send fewer or shorter messages"
                    )
                parts.append(part)
        except PromptTooLong:
            raise
        except _Refusal as exc:
            raise MessagesRefused(
                f"the model's chat template refuses these messages: {exc}"
            ) from exc
        except Exception as exc:  # a template can raise anything that an expression can
            raise TemplateFailed(
                f"the model's chat template failed on these messages "
                f"({type(exc).__name__}: {str(exc)[:200]}); check their roles and order"
            ) from exc
        return "".join(parts)


class _RangeBudget:
    def __init__(self, total: int) -> None:
        self._left = total

    def range(self, *args: int) -> range:
        """Return a range and take its length from the budget; raises OverflowError."""
        numbers = range(*args)
        self._left -= len(numbers)
        if self._left < 0:
            raise OverflowError("the template counts too far")
        return numbers


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            size = _repeated(left, right) or _repeated(right, left)
        else:
            size = left.bit_length() * right if isinstance(left, int) else 0
        if size > _MAX_PRODUCT:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _repeated(sequence: Any, times: Any) -> int:
    """Return how long `sequence * times` would be, 0 where it is no repetition."""
    if isinstance(times, int) and isinstance(sequence, str | list | tuple):
        return len(sequence) * times
    return 0


class _SafeNamespace(Namespace):
    """Jinja's namespace without names that Python itself looks up."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a value may be called "self"
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


class _GenerationBlock(Extension):
    """Lets {% generation %}, which marks answers for training, stand for its contents."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> _Environment:
    """Return an environment with the names and filters that chat templates use."""

    def raise_exception(message: str) -> NoReturn:
        raise _Refusal(str(message))

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum")  # makes text without end
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=_SafeNamespace,
        dict=_new_dict,
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models were trained on it: unlike Jinja's own filter, without HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Stand for the type `dict`, which a template must not hold."""
    return dict(*args, **kwargs)
